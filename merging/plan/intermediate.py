"""The shards of a plan that make files for later ones, as they are added stage after stage."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import msgspec

from merging.dtypes import ITEM_SIZE
from merging.method import Geometry, MergeMethod, get_method
from merging.plan.cost import Budgets, problem_cost, problem_load, with_cost
from merging.plan.packing import made_file, make_shard, pack, tensor_sources
from merging.plan.plan import COPY, Problem, Shard, Source, SourceFile
from merging.plan.variants import VariantSettings
from merging.steps import step_of


class Intermediates:
    """Collects stages before the output's shards.

    Args:
        settings: The plan's, to which settings of steps are added.
        files: The plan's, to which intermediate files are added.
        budgets: What a worker may use.
        max_shard_size: Largest file in bytes.
        output_uri: Folder of the output.

    Attributes:
        shards: What is to be done before the rest of the output's shards, in order.
        budgets: What a worker may use.
        output_uri: Folder of the output.
        settings: The plan's.
    """

    def __init__(
        self,
        settings: VariantSettings,
        files: list[SourceFile],
        budgets: Budgets,
        *,
        max_shard_size: int,
        output_uri: str,
    ) -> None:
        self.shards: list[Shard] = []
        self.budgets = budgets
        self.settings = settings
        self._files = files
        self._max_shard_size = max_shard_size
        self.output_uri = output_uri

    @property
    def problems(self) -> list[Problem]:
        """All problems of all stages."""
        return [problem for shard in self.shards for problem in shard.problems]

    def method(self, problem: Problem) -> MergeMethod | None:
        """The method of a problem; None of a copy."""
        name = self.settings.settings[problem.setting].method
        return None if name == COPY else get_method(name)

    def parameters(self, problem: Problem) -> Any:
        """The recipe-level parameters of a problem."""
        return self.settings.parameters(problem.setting)

    def of_variant(self, problem: Problem, number: int) -> Problem:
        """The problem as one of that variant alone."""
        return msgspec.structs.replace(problem, setting=self.settings.only(problem.setting, number))

    def of_step(self, problem: Problem, step: str, without: Container[str] = ()) -> Problem:
        """The problem as one of this step of its method, with what that costs.

        Args:
            problem: As of the method.
            step: Its name.
            without: Recipe-level parameters that it does not depend on.
        """
        variants = self.settings.methods(problem.setting)
        steps = [(step_of(method, step), own) for method, own in variants if method is not None]
        cost = problem_cost(steps, problem_load(problem), self.budgets)
        setting = self.settings.step(problem.setting, step, without)
        return with_cost(msgspec.structs.replace(problem, setting=setting), cost)

    def stored_as(self, problem: Problem, dtype: str) -> Problem:
        """The problem with another type of its result, and what that costs."""
        if problem.dtype == dtype:
            return problem
        changed = msgspec.structs.replace(problem, dtype=dtype)
        return self.of_step(changed, self.settings.settings[problem.setting].step)

    def write(self, problems: Sequence[Problem], stage: str) -> list[Source]:
        """Have these results written to intermediate files; where each will be."""
        return [first for first, *_ in self.write_each(problems, stage)]

    def write_each(self, problems: Sequence[Problem], stage: str) -> list[tuple[Source, ...]]:
        """The same, and where the result of each variant will be: in one file if all do the same,
        given the same.
        """
        first, count = len(self.shards), self.settings.num_variants
        places: dict[str, tuple[Source, ...]] = {}
        for shard in pack(problems, self._max_shard_size, first_index=first, stage=stage):
            num_files = count if any(map(self._differs, shard.problems)) else 1
            files = [number if num_files > 1 else 0 for number in range(count)]
            found = self._add(msgspec.structs.replace(shard, num_files=num_files))
            for name, source in found.items():
                places[name] = tuple(
                    msgspec.structs.replace(source, file=source.file + file) for file in files
                )
        return [places[problem.tensor_name] for problem in problems]

    def _differs(self, problem: Problem) -> bool:
        """Whether variants have different results."""
        return problem.num_given_apart > 0 or bool(self.settings.settings[problem.setting].others)

    def write_apart(self, problems: Sequence[Problem], stage: str) -> list[Source]:
        """The same with a file for each: several may be for one tensor."""
        sources = []
        for number, problem in enumerate(problems, 1):
            name = f"{stage}-{number:05d}-of-{len(problems):05d}.safetensors"
            shard = make_shard(len(self.shards), name, [problem], kind="intermediate")
            sources.append(self._add(shard)[problem.tensor_name])
        return sources

    def write_file(
        self, problems: Sequence[Problem], file_name: str, folder: str = ""
    ) -> dict[str, Source]:
        """Have these results, made together, written to one file; where each will be.

        Args:
            problems: Whose results.
            file_name: Of the file.
            folder: Where it is kept for other merges; by default it goes with this one.
        """
        shard = make_shard(len(self.shards), file_name, problems, kind="intermediate")
        return self._add(msgspec.structs.replace(shard, folder=folder))

    def write_output(self, problems: Sequence[Problem]) -> dict[str, Source]:
        """Have these tensors of the output written before others; where each will be."""
        first = len(self.shards)
        places: dict[str, Source] = {}
        for shard in pack(problems, self._max_shard_size, first_index=first):
            places |= self._add(shard)
        return places

    def unwritten(self, problems: Sequence[Problem]) -> list[Problem]:
        """Those whose tensors of the output are not written yet."""
        done = {p.tensor_name for s in self.shards if s.is_output for p in s.problems}
        return [problem for problem in problems if problem.tensor_name not in done]

    def _add(self, shard: Shard) -> dict[str, Source]:
        sources = tensor_sources(shard, len(self._files))
        files = range(shard.num_files)
        self._files += [made_file(self.output_uri, shard, number) for number in files]
        self.shards.append(shard)
        return sources


def is_double(problem: Problem) -> bool:
    """Whether an input is float64, so that the method computes in float64."""
    return any(source.dtype == "F64" for source in problem.sources)


def problem_geometry(problem: Problem) -> Geometry:
    """A problem's tensor as cost functions see it."""
    return Geometry(
        problem.shape, problem.num_experts, transposed=problem.transposed, ranks=problem.ranks
    )


def part_of(source: Source, entries: slice) -> Source:
    """Some entries of a source."""
    size = ITEM_SIZE[source.dtype]
    first, last, _ = entries.indices(source.num_bytes // size)
    return msgspec.structs.replace(
        source, start=source.start + first * size, end=source.start + last * size
    )
