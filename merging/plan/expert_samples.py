"""The samples of one expert, and the files from which a worker makes what the expert is run on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from merging.checkpoint.index import CheckpointIndex
from merging.errors import RecipeError, StorageError, at_place
from merging.plan.images import Images, is_vision, read_images
from merging.plan.plan import Source, SourceFile
from merging.plan.problems import ProblemBuilder
from merging.plan.samples import Samples, read_samples
from merging.plan.statistics_work import SampleWork
from merging.recipe.calibration import CalibrationSettings
from merging.storage.base import ObjectStat, Storage

_OTHER_COMPANIONS = re.compile(r"^generation_config|processor_config|^feature_extractor")
"""Files beside the weights that no tokenizer needs."""


def read_expert_samples(
    settings: CalibrationSettings, storage: Storage, pointer: str, index: CheckpointIndex
) -> Samples | Images:
    """Images for a model that sees such, else texts or tokens.

    Args:
        settings: Where they are.
        storage: To read them.
        pointer: The ``calibration`` of the recipe that names them.
        index: The expert's checkpoint.

    Raises:
        RecipeError: ``bad_parameter``: bad samples.
        StorageError: They cannot be read; with the place in the recipe.
    """
    vocab = index.config.get("vocab_size")
    vocab_size = vocab if isinstance(vocab, int) else None
    try:
        if is_vision(index.config):
            return read_images(settings, storage, pointer, index)
        return read_samples(settings, storage, pointer, vocab_size=vocab_size)
    except StorageError as error:
        raise at_place(error, pointer) from error


def tokenizer_files(
    index: CheckpointIndex, samples: Samples | Images, storage: Storage
) -> list[ObjectStat]:
    """Files of the expert's tokenizer; none where samples need none.

    Raises:
        RecipeError: ``incompatible_options``: there is no tokenizer.
    """
    if not samples.needs_tokenizer:
        return []
    names = [name for name in sorted(index.companions) if not _OTHER_COMPANIONS.search(name)]
    if all("chat_template" in name for name in names):
        detail = f"{index.uri} has no tokenizer; give token ids instead of texts."
        raise RecipeError(detail, code="incompatible_options")
    return [storage.stat(f"{index.uri}/{name}") for name in names]


def sample_sources(
    index: CheckpointIndex,
    samples: Samples | Images,
    tokenizer: Sequence[ObjectStat],
    builder: ProblemBuilder,
) -> tuple[SampleWork | None, tuple[Source, ...]]:
    """What the first shard of an expert needs to know of its samples, and what it reads of them.

    Args:
        index: The expert's checkpoint.
        samples: Its samples.
        tokenizer: From :func:`tokenizer_files`.
        builder: Files are added to the plan's.
    """

    def whole_file(stat: ObjectStat) -> Source:
        builder.files.append(SourceFile(stat.uri, stat.size, stat.version))
        return Source(len(builder.files) - 1, 0, stat.size, "U8")

    if isinstance(samples, Images):
        number = whole_file(samples.file).file
        return None, (Source(number, samples.start, samples.end, samples.dtype),)
    files = [*([samples.file] if samples.file else []), *tokenizer]
    work = SampleWork(
        settings=samples.settings.model_dump(mode="json"),
        items=None if samples.file else samples.items,
        uri=samples.file.uri if samples.file else "",
        tokenizer=tuple(stat.uri[len(index.uri) + 1 :] for stat in tokenizer),
    )
    return work, tuple(whole_file(stat) for stat in files)
