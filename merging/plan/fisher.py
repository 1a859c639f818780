"""The shards that find the diagonal of an expert's Fisher information on its samples.

The chain of an expert (:mod:`merging.plan.expert_chain`) goes forward through all blocks and leaves
the hidden states before each. Then shards go back: the head first, which decides on the labels and
leaves the gradient behind the last block; then block after block; the embedding last. Each reads
the weights and the hidden states of its part, runs that again sample by sample, and leaves the
means of squared gradients of its tensors, and the gradient before its part for the next one. So a
worker holds one block, three times, and the activations.

Where the head's matrix is the embedding's, gradients come from both ends, and add up before they
are squared: the shard of the embedding runs the head again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import msgspec

from merging.checkpoint.index import TensorEntry
from merging.errors import Fault, RecipeError
from merging.plan.architectures import causal_architectures
from merging.plan.expert_chain import ExpertChain, Measuring
from merging.plan.inputs import Expert
from merging.plan.moving import Renumbering
from merging.plan.plan import Problem, Source
from merging.plan.runnable import architecture, is_of_head, role_of
from merging.plan.statistics_cost import backward_bytes, backward_flops
from merging.plan.statistics_work import GRADIENT, LABELS, SIZE, Backward, Measure
from merging.plan.tensors import is_tied
from merging.sampled import FISHER


def add_fisher(
    problems: Sequence[Problem],
    experts: Sequence[Expert],
    measuring: Measuring,
    seed: int,
    warnings: list[str],
) -> list[Problem]:
    """The problems of the output; those with a diagonal as a step of their method.

    Args:
        problems: All of them.
        experts: In recipe order.
        measuring: What the chains share.
        seed: For labels.
        warnings: What the user should know is added.

    Raises:
        RecipeError: ``incompatible_options``: a model that predicts no tokens; ``bad_parameter``:
            bad samples.
        StorageError: Samples cannot be read.
    """
    faults = [fault for expert in experts for fault in _unfit(expert)]
    if faults:
        raise RecipeError(faults[0].detail, code=faults[0].code, faults=faults)
    found: dict[str, dict[str, Source]] = {}
    keys = []
    for number, expert in enumerate(experts):
        chain = FisherChain(number, expert, measuring, seed, warnings)
        keys.append(chain.key)
        if chain.key not in found:
            found[chain.key] = chain.add()
    diagonals = [found[key] for key in keys]
    if vocabulary := measuring.builder.vocabulary:
        renumbering = Renumbering(vocabulary, measuring.builder, measuring.stages)
        diagonals = [
            {name: renumbering.statistic(expert.index, name, at) for name, at in own.items()}
            for own, expert in zip(diagonals, experts, strict=True)
        ]
    sizes = tuple(own[SIZE] for own in diagonals)

    def with_diagonals(problem: Problem) -> Problem:
        alternating = tuple(
            source
            for expert, own in zip(problem.experts, diagonals, strict=True)
            for source in (expert, own[problem.tensor_name])
        )
        changed = msgspec.structs.replace(problem, experts=alternating, given=sizes)
        return measuring.stages.of_step(changed, FISHER)

    return [with_diagonals(p) if p.tensor_name in measuring.measured else p for p in problems]


def _unfit(expert: Expert) -> list[Fault]:
    """Why an expert has no likelihood of tokens, if it has none."""
    index = expert.index
    if architecture(index) in causal_architectures():
        return []
    detail = (
        f"{index.uri} is a {architecture(index)}, which predicts no next tokens: there is no"
        " likelihood to take the Fisher information of. Merge causal language models, or use"
        " another method."
    )
    return [Fault(expert.pointer, "incompatible_options", detail)]


class FisherChain(ExpertChain):
    """Adds the shards that run one expert forward and back.

    Args:
        number: Its place among the experts.
        expert: Its checkpoint.
        measuring: What all chains share.
        seed: For labels.
        warnings: What the user should know is added.

    Attributes:
        key: As of any chain; and what labels and the size of all diagonals follow from.
    """

    def __init__(
        self, number: int, expert: Expert, measuring: Measuring, seed: int, warnings: list[str]
    ) -> None:
        self._is_tied = False
        super().__init__(number, expert, measuring, warnings)
        self._back = Backward(self._samples.settings.labels, seed, self._is_tied)
        self.key += json.dumps([self._back.labels, seed, sorted(self._measured)])

    def add(self) -> dict[str, Source]:
        """Add all shards: where the diagonals and their size will be, by the names of tensors."""
        hidden: list[Source] = []
        for block in range(-1, self.num_blocks):
            self.run(block, measures=False)
            hidden.append(self._given[1])
        tokens = self._given[0]
        lowest = min(b for b, own in self._parts.items() if any(map(self._is_measured, own)))
        found = self._go_back(self.num_blocks, (tokens, hidden[-1]))
        ends = (hidden[-1], found[LABELS]) if self._is_tied else ()
        for block in range(self.num_blocks - 1, lowest - 1, -1):
            before = (hidden[block],) if block >= 0 else ()
            given = (tokens, *before, found[GRADIENT], found[SIZE], *(() if before else ends))
            found |= self._go_back(block, given)
        return found

    def _is_measured(self, entry: TensorEntry) -> bool:
        return entry.name in self._measured

    def _split(self) -> dict[int, list[TensorEntry]]:
        """The same, with what stands behind the blocks as one more part."""
        parts = super()._split()
        before = {entry.shape for entry in parts[-1]}
        last = parts[self.num_blocks - 1]
        behind = [entry for entry in last if role_of(self._index, entry).layer < 0]
        heads = [entry for entry in self._index.tensors.values() if is_of_head(self._index, entry)]
        matrices = [entry for entry in heads if entry.shape in before and len(entry.shape) == 2]
        is_own = any(map(self._is_measured, matrices)) or not is_tied(self._index.config)
        self._is_tied = not (matrices and is_own)
        parts[self.num_blocks - 1] = [entry for entry in last if entry not in behind]
        parts[self.num_blocks] = behind + [
            entry for entry in heads if not (self._is_tied and entry in matrices)
        ]
        return parts

    def _go_back(self, block: int, given: tuple[Source, ...]) -> dict[str, Source]:
        """Add the shard that goes back through a part; where its results will be."""
        entries = list(self._parts[block])
        measured = [e for e in entries if self._is_measured(e)]
        is_head = block == self.num_blocks
        if self._is_tied and is_head:
            entries += self._parts[-1]
        elif self._is_tied and block < 0:
            entries += self._parts[self.num_blocks]
        shapes: list[tuple[str, tuple[int, ...], str]] = []
        if block >= 0:
            shapes.append((GRADIENT, self._hidden_shape, "F32"))
        if is_head:
            shapes.append((LABELS, self._hidden_shape[:2], "I32"))
        shapes += [(SIZE, (2,), "F32"), *((e.name, e.shape, "F32") for e in measured)]
        work = self._work(
            block,
            entries,
            [Measure("fisher", math.prod(e.shape), (e.name,)) for e in measured],
            is_last=is_head,
            leaves=False,
            backward=self._back,
        )
        weights = [self._weight(entry) for entry in entries]
        return self._add(
            "fisher",
            work,
            shapes,
            (*given, *weights),
            num_bytes=backward_bytes(work, self._hidden_shape[2], weights),
            flops=backward_flops(work),
        )
