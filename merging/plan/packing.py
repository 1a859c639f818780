"""Packing problems into shards: which tensor goes into which output file.

Rules, in this order:

1. Tensors stay in the model's order, so that the reads of a shard are few and long: embeddings,
   then layer by layer, then the rest; within a layer as they lie in the input's files.
2. A file is at most ``max_shard_size`` bytes, header included. A tensor is never cut; one that is
   larger has a file of its own.
3. A shard has at most 1/32 of the merge's operations (but 10¹² are never too many), unless it is
   one tensor: the costliest shard then does not set the finish time alone.
4. Under these limits as few shards as possible, and then as even in bytes as possible: the last
   file is not a small remainder.

Inside a file, tensors with wider entries come first, as the format's reference writer does it:
every tensor is then aligned to its entry size, which readers of mapped files need.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import msgspec

from merging.checkpoint.header import encode_header
from merging.dtypes import ITEM_SIZE
from merging.plan.plan import WORKSPACE, Kind, Problem, Shard, Source, SourceFile

FILE_METADATA = {"format": "pt"}
"""What transformers requires in the header of a weight file."""

_FLOPS_PARTS = 32
"""Enough shards of equal work to keep a few dozen workers busy to the end."""

_SMALL_FLOPS = 1e12
"""Seconds of one CPU core: splitting work below this costs more than it gains."""

_FRAME_BYTES = 64
"""Upper bound of a header's length field, braces, metadata and padding."""

_SEARCH_PARTS = 256
"""Evenness: the largest shard is at most 1/256 larger than it need be."""


def pack(
    problems: Sequence[Problem], max_shard_size: int, *, first_index: int = 0, stage: str = ""
) -> tuple[Shard, ...]:
    """Cut a list of problems, in the model's order, into shards.

    Args:
        problems: All problems of the merge, or of a stage of it.
        max_shard_size: Largest file in bytes.
        first_index: Shards that come before these.
        stage: Name of a stage that makes intermediate files; by default the files are the output's.
    """
    if not problems:
        return ()
    flops_limit = max(sum(p.flops for p in problems) / _FLOPS_PARTS, _SMALL_FLOPS)
    share = _stage_share if stage else _file_share
    sizes = [share(problem, max_shard_size) for problem in problems]
    work = [problem.flops for problem in problems]
    limit = _even_limit(sizes, work, max_shard_size - _FRAME_BYTES, flops_limit)
    bounds = [*_cut(sizes, work, limit, flops_limit), len(problems)]
    count = len(bounds) - 1
    return tuple(
        make_shard(
            first_index + number,
            _file_name(stage or "model", number, count),
            problems[start:end],
            kind="intermediate" if stage else "weights",
        )
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    )


def make_shard(index: int, file_name: str, problems: Sequence[Problem], *, kind: Kind) -> Shard:
    """The shard that makes a file of these tensors."""
    ordered = tuple(sorted(problems, key=lambda p: -ITEM_SIZE[p.dtype]))
    size = len(shard_header(ordered)) + sum(data_bytes(p) for p in ordered)
    return Shard(index, file_name, size, ordered, kind)


def shard_header(problems: Sequence[Problem]) -> bytes:
    """The header of the file that holds these tensors in this order."""
    return encode_header([(p.tensor_name, p.dtype, p.shape) for p in problems], FILE_METADATA)


def number_files(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """The shards, of which those of the output have the numbers of its files in their names."""
    names = {shard.index: shard.file_name for shard in shards if shard.kind != "weights"}
    outputs = [shard.index for shard in shards if shard.kind == "weights"]
    names |= {index: _file_name("model", n, len(outputs)) for n, index in enumerate(outputs)}
    return tuple(msgspec.structs.replace(s, file_name=names[s.index]) for s in shards)


def _file_name(stage: str, number: int, count: int) -> str:
    return f"{stage}-{number + 1:05d}-of-{count:05d}.safetensors"


def made_file(output_uri: str, shard: Shard, variant: int = 0) -> SourceFile:
    """A shard's file as a source of later shards, to be addressed and pinned when it is there."""
    folder = shard.folder or f"{output_uri}/{WORKSPACE}"
    uri = output_uri if shard.is_output else f"{folder}/{shard.file_name}"
    return SourceFile(uri, shard.size, "", shard.index, variant)


def tensor_sources(shard: Shard, file: int) -> dict[str, Source]:
    """Where the tensors lie in a shard's file, which has that number among the plan's files."""
    start = len(shard_header(shard.problems))
    sources = {}
    for problem in shard.problems:
        end = start + data_bytes(problem)
        sources[problem.tensor_name] = Source(file, start, end, problem.dtype)
        start = end
    return sources


def data_bytes(problem: Problem) -> int:
    """Bytes of the output tensor."""
    return problem.num_entries * ITEM_SIZE[problem.dtype]


def _file_share(problem: Problem, max_shard_size: int) -> int:
    """Upper bound of what the tensor adds to a file: its bytes and its entry in the header."""
    num_bytes = data_bytes(problem)
    offset = max(max_shard_size, num_bytes)
    entry = {"dtype": problem.dtype, "shape": problem.shape, "data_offsets": (offset, offset)}
    name = json.dumps(problem.tensor_name, ensure_ascii=False).encode()
    return num_bytes + len(msgspec.json.encode(entry)) + len(name) + len(":,")


def _stage_share(problem: Problem, max_shard_size: int) -> int:
    """The same for a stage, in which a tensor counts as what is read of it if that is more."""
    average = problem.bytes_read // len(problem.sources)
    return max(_file_share(problem, max_shard_size), average)


def _cut(
    sizes: Sequence[int], work: Sequence[float], size_limit: int, flops_limit: float
) -> list[int]:
    """First indices of the shards, each filled up to the limits."""
    starts = [0]
    size, flops = sizes[0], work[0]
    for index in range(1, len(sizes)):
        size += sizes[index]
        flops += work[index]
        if size > size_limit or flops > flops_limit:
            starts.append(index)
            size, flops = sizes[index], work[index]
    return starts


def _even_limit(
    sizes: Sequence[int], work: Sequence[float], size_limit: int, flops_limit: float
) -> int:
    """The smallest limit on sizes that needs no more shards than ``size_limit`` does."""
    fewest = len(_cut(sizes, work, size_limit, flops_limit))
    low, high = sum(sizes) // fewest, size_limit
    while high - low > max(high // _SEARCH_PARTS, 1):
        middle = (low + high) // 2
        if len(_cut(sizes, work, middle, flops_limit)) > fewest:
            low = middle
        else:
            high = middle
    return high
