"""The demo's own models: a small base model, and one expert for each kind of text.

They are ordinary Hugging Face folders of the Llama architecture, in several safetensors files. The
base reads English and a little of everything. An expert is the base, trained further on one kind,
with some of the base's English in between and its token embeddings left as they are.

Weights are kept in bfloat16, as published models are: rounding moves a weight by about one part in
a thousand, and training an expert by a quarter, so that task vectors survive it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples.demo.corpus import BASE_KIND, EXPERT_KINDS, Corpus, corpus_digest
from examples.demo.evaluate import load_model, measure_losses
from examples.demo.settings import Settings
from examples.demo.tokens import cut_windows, train_tokenizer

_CACHE_FORMAT = 1  # raise it when the same settings come to mean other models
_WARM_UP_SHARE = 0.05
_BASE_WEIGHT_DECAY = 0.1
_MAX_GRADIENT_NORM = 1.0

OnStep = Callable[[int, int, float], None]
"""``on_step(step, num_steps, loss)``."""


class ModelCache:
    """The demo's models for one corpus and one choice of settings; made when first asked for.

    Each checkpoint appears in the cache whole or not at all, so that an interrupted run goes on
    with the first one that is missing.

    Attributes:
        folder: Where they are, each in a folder of its name.
        names: The base, then the experts by the kind of text that is theirs.
    """

    names = ("base", *EXPERT_KINDS)

    def __init__(self, cache: Path, corpus: Corpus, settings: Settings) -> None:
        text = json.dumps([_CACHE_FORMAT, corpus_digest(corpus), asdict(settings)])
        self.folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._corpus = corpus
        self._settings = settings

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of ``names`` that are not there yet."""
        return tuple(name for name in self.names if not (self.folder / name).exists())

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def make(self, name: str, on_step: OnStep) -> None:
        """Train ``base``, or the expert of a kind, and keep it."""
        train = self._train_base if name == "base" else partial(self._train_expert, name)
        model = train(on_step)
        tokenizer = self._tokenizer()
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
        )
        partial_folder = self.folder / f"{name}.partial"
        shutil.rmtree(partial_folder, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(
            partial_folder, max_shard_size=self._settings.weight_file_size
        )
        tokenizer.save_pretrained(partial_folder)
        partial_folder.rename(self.folder / name)

    def held_out(self) -> dict[str, torch.Tensor]:
        """Windows (windows×context) of every kind that no model has read."""
        path = self.folder / "held-out.safetensors"
        if not path.exists():
            count = self._settings.held_out_windows
            windows = {}
            for kind, text in self._corpus.items():
                cut = cut_windows(self._tokenizer(), text.held_out, self._settings.context)
                windows[kind] = cut[:: max(1, len(cut) // count)][:count].contiguous()
            save_file(windows, path)
        loaded: dict[str, torch.Tensor] = load_file(path)
        return loaded

    def losses(self) -> dict[str, dict[str, float]]:
        """Loss of each checkpoint on each kind of text; measured once."""
        path = self.folder / "losses.json"
        if not path.exists():
            windows = self.held_out()
            measured = {name: measure_losses(self.folder / name, windows) for name in self.names}
            path.write_text(json.dumps(measured))
        kept: dict[str, dict[str, float]] = json.loads(path.read_text())
        return kept

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            tokenizer = train_tokenizer(self._corpus, self._settings.vocabulary)
            partial_folder = self.folder / "tokenizer.partial"
            tokenizer.save_pretrained(partial_folder)
            partial_folder.rename(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _train_base(self, on_step: OnStep) -> LlamaForCausalLM:
        settings = self._settings
        shares = dict.fromkeys(EXPERT_KINDS, settings.base_share)
        shares[BASE_KIND] = 1 - sum(shares.values())
        model = _new_model(settings)
        windows = self._draw(shares, settings.base_steps, seed=settings.seed)
        _train(model, windows, settings, settings.base_rate, _BASE_WEIGHT_DECAY, on_step)
        return model

    def _train_expert(self, kind: str, on_step: OnStep) -> LlamaForCausalLM:
        settings = self._settings
        shares = {kind: 1 - settings.replay, BASE_KIND: settings.replay}
        model = load_model(self.folder / "base")
        model.get_input_embeddings().requires_grad_(requires_grad=False)
        seed = settings.seed + 1 + EXPERT_KINDS.index(kind)
        windows = self._draw(shares, settings.expert_steps, seed=seed)
        _train(model, windows, settings, settings.expert_rate, 0.0, on_step)
        return model

    def _draw(self, shares: dict[str, float], num_steps: int, *, seed: int) -> torch.Tensor:
        """Windows for a training run, mixed by ``shares``, in random order; repeated if too few."""
        generator = torch.Generator().manual_seed(seed)
        num_windows = num_steps * self._settings.batch
        drawn = []
        for kind, share in shares.items():
            documents = self._corpus[kind].training
            windows = cut_windows(self._tokenizer(), documents, self._settings.context)
            wanted = math.ceil(num_windows * share)
            rounds = [
                torch.randperm(len(windows), generator=generator)
                for _ in range(math.ceil(wanted / len(windows)))
            ]
            drawn.append(windows[torch.cat(rounds)[:wanted]])
        mixed = torch.cat(drawn)
        return mixed[torch.randperm(len(mixed), generator=generator)[:num_windows]]


def _new_model(settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=2 * settings.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms begin at one
                parameter.normal_(0, config.initializer_range, generator=generator)
    return model


def _train(
    model: LlamaForCausalLM,
    windows: torch.Tensor,
    settings: Settings,
    rate: float,
    weight_decay: float,
    on_step: OnStep,
) -> None:
    """AdamW over the windows in order, with warm-up and a cosine down to zero."""
    batches = windows.split(settings.batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    warm_up = max(1, round(_WARM_UP_SHARE * len(batches)))

    def rate_factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / len(batches))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step, len(batches), loss.item())
    model.eval()
