"""The shards that run one expert on its samples, block by block.

The first turns the samples into tokens and runs what stands before the model's blocks; each of the
others runs one block. A shard reads the weights of its block and what the one before it left, the
hidden states of all samples, and leaves those for the next one beside its statistics.

Shapes are known from the recipe and from headers: a sample has ``length`` places, those that are
padding hold zeros in hidden states and -1 in tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from merging.checkpoint.index import TensorEntry, checkpoint_digest
from merging.plan.expert_samples import read_expert_samples, sample_sources, tokenizer_files
from merging.plan.images import Images
from merging.plan.inputs import Expert
from merging.plan.intermediate import Intermediates
from merging.plan.moving import Renumbering
from merging.plan.plan import STATISTICS, Problem, Setting, Source
from merging.plan.problems import ProblemBuilder
from merging.plan.runnable import architecture, hidden_width, role_of, split_by_block, stacks_of
from merging.plan.statistics_cost import forward_bytes, forward_flops, measured_entries
from merging.plan.statistics_work import (
    HIDDEN,
    IDS,
    STATISTICS_FORMAT,
    Measure,
    SampleWork,
    StatisticsWork,
    Weight,
    kept_name,
)
from merging.recipe import Recipe
from merging.recipe.calibration import join_calibration
from merging.sampled import LINEAR, NORM
from merging.storage.base import Storage

_SHARED_INPUT = {
    "attention.q": "attention",
    "attention.k": "attention",
    "attention.v": "attention",
    "mlp.gate": "mlp",
    "mlp.up": "mlp",
    "mlp.experts.gate": "mlp",
    "mlp.experts.up": "mlp",
    "mlp.shared_experts.gate": "mlp",
    "mlp.shared_experts.up": "mlp",
}
"""Roles of layers that read the same: one statistic serves them (the worker checks it)."""


@dataclass(frozen=True, slots=True)
class Measuring:
    """What the chains of all experts share.

    Attributes:
        measured: Tensors of which there are statistics, with what kind (:mod:`merging.sampled`).
        stages: To which shards are added.
        builder: Knows the plan's files and settings.
        recipe: Has the samples.
        storage: Where these are.
        threads: Torch threads of the shards.
        folder: Where statistics are kept for other merges; "" if they are not. Those of a chain
            through which the merged model runs are not.
    """

    measured: Mapping[str, str]
    stages: Intermediates
    builder: ProblemBuilder
    recipe: Recipe
    storage: Storage
    threads: int
    folder: str = ""


class ExpertChain:
    """Adds the shards that run one expert.

    Args:
        number: Its place among the experts.
        expert: Its checkpoint.
        measuring: What all chains share.
        warnings: What the user should know is added.

    Attributes:
        num_blocks: Of the model.
        key: Whatever its statistics follow from, as a text: equal keys, equal statistics.

    Raises:
        RecipeError: ``bad_parameter``: bad samples; ``incompatible_options``: texts and no
            tokenizer.
        StorageError: Samples cannot be read.
    """

    def __init__(
        self, number: int, expert: Expert, measuring: Measuring, warnings: list[str]
    ) -> None:
        self._number = number
        self._index = expert.index
        self._measured = measuring.measured
        self._stages = measuring.stages
        self._builder = measuring.builder
        self._storage = measuring.storage
        self._folder = measuring.folder
        recipe = measuring.recipe
        [(self._stack, blocks)] = stacks_of(expert.index).items()
        self.num_blocks = max(blocks) + 1
        own = recipe.models[expert.entry].calibration
        settings = join_calibration(recipe.calibration, own)
        assert settings is not None, "the recipe's reader sees to it"
        pointer = f"/models/{expert.entry}/calibration" if "data" in own else "/calibration"
        self._samples = read_expert_samples(settings, self._storage, pointer, self._index)
        asked = settings.samples
        count = self._samples.count
        if count < asked and "samples" in {*own, *recipe.calibration}:
            warnings.append(
                f"{self._index.uri} is run on {count} samples, of {asked} that"
                " are asked for: there are no more."
            )
        width = hidden_width(self._index)
        assert width is not None
        self._hidden_shape = (count, self._samples.length, width)
        self._parts = self._split()
        self._blocks = {e.name: block for block, own in self._parts.items() for e in own}
        self._tokenizer = tokenizer_files(self._index, self._samples, self._storage)
        self.key = self._key(measuring.threads)
        self._given: tuple[Source, ...] = ()

    def block_of(self, tensor_name: str) -> int:
        """The block whose shard reads a tensor; the last one for what no shard reads."""
        return self._blocks.get(tensor_name, self.num_blocks - 1)

    def renumbered(
        self, merged: Mapping[str, Source], renumbering: Renumbering | None
    ) -> dict[str, Source]:
        """Merged tensors with their rows in the order of the expert's tokens."""
        if renumbering is None:
            return dict(merged)
        return {name: renumbering.merged(self._index, name, at) for name, at in merged.items()}

    def run(
        self,
        block: int,
        *,
        measures: bool = True,
        leaves: bool = True,
        merged: Mapping[str, Source] | None = None,
    ) -> dict[str, Source]:
        """Add the shard that runs a block; none if it would find nothing.

        Args:
            block: Which one; -1 is what stands before them. What the one before it left goes in.
            measures: Statistics are taken.
            leaves: Hidden states behind the block are left for the next shards.
            merged: Tensors of the merged model, which are run in place of the expert's.

        Returns:
            Where statistics will be, by the names of tensors.
        """
        entries = self._parts[block]
        measured, made = self._measures(entries) if measures else ([], {})
        shapes: list[tuple[str, tuple[int, ...], str]] = []
        if leaves and block < 0:
            shapes.append((IDS, self._hidden_shape[:2], "I32"))
        if leaves:
            shapes.append((HIDDEN, self._hidden_shape, "F32"))
        num_tokens = math.prod(self._hidden_shape[:2])
        for m in measured:
            entries_with_counts = measured_entries(m, num_tokens) + (m.num_experts or 1)
            shapes.append((m.name, (entries_with_counts,), "F32"))
        if not shapes:
            return {}
        sample_work, files = self._sample_sources() if block < 0 else (None, ())
        work = self._work(
            block,
            entries,
            measured,
            is_last=block == self.num_blocks - 1 and not leaves,
            leaves=leaves,
            samples=sample_work,
            image_shape=self._samples.shape if isinstance(self._samples, Images) else (),
        )
        weights = [
            self._weight(entry) if merged is None else merged[entry.name] for entry in entries
        ]
        places = self._add(
            "statistics" if merged is None else "merged",
            work,
            shapes,
            (*self._given, *files, *weights),
            num_bytes=forward_bytes(work, self._hidden_shape[2], weights, files),
            flops=forward_flops(work),
        )
        if leaves:
            tokens = places[IDS] if block < 0 else self._given[0]
            self._given = (tokens, places[HIDDEN])
        return {name: places[statistic] for name, statistic in made.items()}

    def _weight(self, entry: TensorEntry) -> Source:
        return self._builder.source(self._index, entry, entry.name)

    def _work(
        self, block: int, entries: Sequence[TensorEntry], measures: Sequence[Measure], **more: Any
    ) -> StatisticsWork:
        """What a shard does with these tensors; ``more`` are other fields."""
        return StatisticsWork(
            uri=self._index.uri,
            config=self._index.config,
            architecture=architecture(self._index),
            stack=self._stack,
            block=block,
            weights=tuple(Weight(entry.name, entry.shape) for entry in entries),
            measures=tuple(measures),
            num_samples=self._hidden_shape[0],
            length=self._hidden_shape[1],
            batch=min(self._samples.settings.batch, self._hidden_shape[0]),
            sample_digest=self._samples.digest,
            **more,
        )

    def _add(
        self,
        stage: str,
        work: StatisticsWork,
        shapes: Sequence[tuple[str, tuple[int, ...], str]],
        given: tuple[Source, ...],
        *,
        num_bytes: int,
        flops: float,
    ) -> dict[str, Source]:
        """Add a shard that makes tensors of these names, shapes and types; where they will be."""
        setting = self._builder.settings.add(Setting(STATISTICS, msgspec.to_builtins(work)))
        problems = [
            Problem(name, shape, dtype, setting, base=None, experts=(), layer=work.block)
            for name, shape, dtype in shapes
        ]
        problems[0] = msgspec.structs.replace(
            problems[0], given=given, flops=flops, host_bytes=num_bytes, device_bytes=num_bytes
        )
        name = f"{stage}-{self._number + 1:05d}-{work.block + 1:05d}.safetensors"
        if self._folder:
            told = [work.weights, work.measures, work.leaves]
            key = msgspec.json.encode(told, order="deterministic").decode()
            name = kept_name(self.key + key, work.block + 1)
        return self._stages.write_file(problems, name, self._folder)

    def _key(self, threads: int) -> str:
        told = [
            STATISTICS_FORMAT,
            [importlib.metadata.version(name) for name in ("torch", "transformers")],
            threads,
            checkpoint_digest(self._index.uri, self._index.files),
            self._index.config,
            self._samples.digest,
            [(stat.uri.rpartition("/")[2], stat.size, stat.version) for stat in self._tokenizer],
            self._hidden_shape,
            self._samples.settings.batch,
        ]
        return json.dumps(told, sort_keys=True)

    def _split(self) -> dict[int, list[TensorEntry]]:
        """Tensors by the part that they belong to: a block, or -1 for what stands before them."""
        return split_by_block(self._index, self.num_blocks)

    def _measures(self, entries: Sequence[TensorEntry]) -> tuple[list[Measure], dict[str, str]]:
        """What is measured among these tensors, and under which name for each of them."""
        modules: dict[tuple[str, ...], list[str]] = {}
        kinds: dict[tuple[str, ...], tuple[str, int]] = {}
        stacks: list[Measure] = []
        rows = self._hidden_shape[0] * self._hidden_shape[1]
        for entry in entries:
            step = self._measured.get(entry.name)
            if step is None:
                continue
            role = role_of(self._index, entry)
            module = entry.name.removesuffix(".weight")
            if len(entry.shape) == 3:
                kind = "rows" if rows < entry.shape[2] else "gram"
                stacks.append(Measure(kind, entry.shape[2], (entry.name,), entry.shape[0]))
                continue
            width = entry.shape[0] if role.transposed or step == NORM else entry.shape[1]
            kind = "norm" if step == NORM else "rows" if rows < width else "gram"
            key: tuple[str, ...] = (module,)
            if step == LINEAR and role.kind in _SHARED_INPUT:
                key = (module.rpartition(".")[0], _SHARED_INPUT[role.kind], str(width))
            modules.setdefault(key, []).append(module)
            kinds[key] = (kind, width)
        measures = [Measure(*kinds[key], tuple(names)) for key, names in modules.items()]
        made = {f"{m}.weight": names[0] for names in modules.values() for m in names}
        made |= {stack.modules[0]: stack.name for stack in stacks}
        return measures + stacks, made

    def _sample_sources(self) -> tuple[SampleWork | None, tuple[Source, ...]]:
        return sample_sources(self._index, self._samples, self._tokenizer, self._builder)
