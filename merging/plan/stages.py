"""Which shards need which: files that shards make while the plan runs, for later shards to read."""

from __future__ import annotations

from collections.abc import Container

from merging.plan.plan import Plan


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
