"""From samples to what a model is run on: token ids, by the tokenizer of the expert; or images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from merging.errors import CheckpointError, Fault, RecipeError
from merging.plan.samples import Sample, is_tokens, parse_lines
from merging.plan.statistics_work import StatisticsWork
from merging.recipe.calibration import CalibrationSettings

PADDING = -1
"""In place of a token id."""


def read_tokens(work: StatisticsWork, files: Sequence[bytes]) -> torch.Tensor:
    """N×L token ids (int32), :data:`PADDING` behind the end of a sample.

    Args:
        work: Has the samples or says where they are.
        files: The samples' file, if there is one, then the tokenizer's.

    Raises:
        RecipeError: ``bad_parameter``: a sample has no tokens, or some that the model lacks.
        CheckpointError: ``config_invalid``: transformers refuses the tokenizer.
    """
    assert work.samples is not None
    settings = CalibrationSettings.model_validate(work.samples.settings)
    items: Sequence[Sample]
    if work.samples.items is None:
        data, *files = files
        items = parse_lines(data, settings, work.samples.uri)
    else:
        items = work.samples.items
    encode = None
    if work.samples.tokenizer:
        encode = _load_tokenizer(work, dict(zip(work.samples.tokenizer, files, strict=True)))
    tokens = torch.full((work.num_samples, work.length), PADDING, dtype=torch.int32)
    vocab = work.config.get("vocab_size")
    for number, item in enumerate(items):
        ids = item if is_tokens(item) else _encode(encode, item, settings)
        ids = list(ids)[: work.length]
        _check(ids, number, vocab if isinstance(vocab, int) else None)
        tokens[number, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return tokens


def check_images(work: StatisticsWork, stored: torch.Tensor) -> torch.Tensor:
    """N×C×H×W in float32, of images as they are stored.

    Raises:
        RecipeError: ``bad_parameter``: one holds NaN or infinity.
    """
    images = stored.view(work.num_samples, *work.image_shape).float()
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        detail = f"Image {int(finite.long().argmin()) + 1} of {work.uri} holds NaN or infinity."
        fault = Fault("/calibration", "bad_parameter", detail)
        raise RecipeError(detail, code="bad_parameter", faults=[fault])
    return images


def _encode(tokenizer: Any, item: Sample, settings: CalibrationSettings) -> list[int]:
    if settings.chat_template:
        messages = [{"role": "user", "content": item}] if isinstance(item, str) else item
        item = tokenizer.apply_chat_template(messages, tokenize=False)
    length, special = settings.max_length, not settings.chat_template
    ids: list[int] = tokenizer(
        item, truncation=True, max_length=length, add_special_tokens=special
    )["input_ids"]
    return ids


def _check(ids: Sequence[int], number: int, vocab_size: int | None) -> None:
    wrong = None
    if not ids:
        wrong = "has no tokens"
    elif vocab_size is not None and max(ids) >= vocab_size:
        wrong = (
            f"has the token id {max(ids)}, outside of the model's {vocab_size} tokens: the"
            " tokenizer is another model's"
        )
    if wrong:
        detail = f"Sample {number + 1} {wrong}."
        fault = Fault("/calibration", "bad_parameter", detail)
        raise RecipeError(detail, code="bad_parameter", faults=[fault])


def _load_tokenizer(work: StatisticsWork, files: dict[str, bytes]) -> Any:
    """Transformers' tokenizer from these files, without remote code."""
    from transformers import AutoTokenizer

    config = {key: value for key, value in work.config.items() if key != "auto_map"}
    with tempfile.TemporaryDirectory(prefix="mergeyard-") as folder:
        root = Path(folder)
        for name, data in {**files, "config.json": json.dumps(config).encode()}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise CheckpointError(
                f"transformers cannot load the tokenizer of {work.uri}:"
                f" {type(error).__name__}: {str(error)[:300]}. Give token ids instead of texts.",
                code="config_invalid",
                context={"uri": work.uri},
            ) from error
