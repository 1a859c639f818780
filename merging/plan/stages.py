"""Which shards need which: files that shards make while the plan runs, for later shards to read."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import msgspec

from merging.plan.outputs import Totals
from merging.plan.plan import Plan, Problem, Shard, Source
from merging.storage.base import Storage


def shards_needed(plan: Plan) -> list[frozenset[int]]:
    """For each shard, those whose files it reads."""
    makers = {number: f.shard for number, f in enumerate(plan.files) if f.shard is not None}
    if not makers:
        return [frozenset()] * len(plan.shards)
    return [
        frozenset(
            makers[source.file]
            for problem in shard.problems
            for source in (*problem.sources, *problem.given)
            if source.file in makers
        )
        for shard in plan.shards
    ]


def shards_left(plan: Plan, done: Container[int]) -> set[int]:
    """The shards that are still to be done, given those that are.

    An intermediate file that is missing is only made again if something that is left reads it.
    """
    needed = shards_needed(plan)
    wanted = [shard.index for shard in plan.outputs]
    left: set[int] = set()
    while wanted:
        index = wanted.pop()
        if index not in done and index not in left:
            left.add(index)
            wanted += needed[index]
    return left


def without_idle_shards(plan: Plan, storage: Storage) -> Plan:
    """The plan without intermediate files that nothing reads.

    Such are a base's embeddings in another order where the method takes the experts' mean, and
    weights of a document that gives its tokenizer alone.
    """
    used = sorted(shards_left(plan, ()))
    if len(used) == len(plan.shards):
        return plan
    numbers = {old: new for new, old in enumerate(used)}
    files = [n for n, file in enumerate(plan.files) if file.shard is None or file.shard in numbers]
    places = {old: new for new, old in enumerate(files)}
    shards = tuple(
        msgspec.structs.replace(
            plan.shards[old],
            index=new,
            problems=tuple(
                with_files_at(problem, places.__getitem__) for problem in plan.shards[old].problems
            ),
        )
        for old, new in numbers.items()
    )
    kept = [plan.files[number] for number in files]
    return msgspec.structs.replace(
        plan,
        files=tuple(
            file if file.shard is None else msgspec.structs.replace(file, shard=numbers[file.shard])
            for file in kept
        ),
        shards=shards,
        totals=sum_up(shards, storage, plan.output_uri),
    )


def with_files_at(problem: Problem, place: Callable[[int], int]) -> Problem:
    """The problem with its sources in files of other numbers."""

    def move(sources: Sequence[Source]) -> tuple[Source, ...]:
        return tuple(msgspec.structs.replace(s, file=place(s.file)) for s in sources)

    return msgspec.structs.replace(
        problem,
        base=move([problem.base])[0] if problem.base else None,
        experts=move(problem.experts),
        given=move(problem.given),
    )


def sum_up(shards: Sequence[Shard], storage: Storage, output_uri: str) -> Totals:
    """Sums over all shards of a plan; the writers' buffers count where the output goes.

    Args:
        shards: All of them.
        storage: Where the output goes.
        output_uri: Its address.
    """
    problems = [problem for shard in shards for problem in shard.problems]
    return Totals(
        tensors=sum(len(shard.problems) for shard in shards if shard.is_output),
        bytes_read=sum(shard.bytes_read for shard in shards),
        bytes_written=sum(shard.bytes_written for shard in shards),
        flops=sum(problem.flops for problem in problems),
        max_host_bytes=max(
            max(problem.host_bytes for problem in shard.problems)
            + shard.num_files * storage.writer_bytes(output_uri, shard.size)
            for shard in shards
        ),
        max_device_bytes=max(problem.device_bytes for problem in problems),
        bytes_intermediate=sum(shard.bytes_written for shard in shards if not shard.is_output),
    )
