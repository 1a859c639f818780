"""Plans in two stages, made of plans in one: for tests of intermediate work by itself."""

from __future__ import annotations

import msgspec

from merging.plan.packing import data_bytes, made_file, pack, tensor_sources
from merging.plan.plan import COPY, Plan, Problem, Setting


def in_two_stages(plan: Plan, max_shard_size: int = 1 << 30) -> Plan:
    """The same merge by way of intermediate files: one stage merges, the next one copies."""
    problems = [problem for shard in plan.shards for problem in shard.problems]
    first = pack(problems, max_shard_size, stage="merged")
    places = {
        name: source
        for shard in first
        for name, source in tensor_sources(shard, len(plan.files) + shard.index).items()
    }
    copies = [
        Problem(
            tensor_name=problem.tensor_name,
            shape=problem.shape,
            dtype=problem.dtype,
            setting=len(plan.settings),
            base=places[problem.tensor_name],
            experts=(),
            host_bytes=2 * data_bytes(problem),
            device_bytes=data_bytes(problem),
        )
        for problem in problems
    ]
    shards = (*first, *pack(copies, max_shard_size, first_index=len(first)))
    return msgspec.structs.replace(
        plan,
        files=(*plan.files, *(made_file(plan.output_uri, shard) for shard in first)),
        settings=(*plan.settings, Setting(COPY)),
        shards=shards,
        totals=msgspec.structs.replace(
            plan.totals,
            bytes_read=sum(shard.bytes_read for shard in shards),
            bytes_written=sum(shard.size for shard in shards),
            bytes_intermediate=sum(shard.size for shard in first),
        ),
    )
