"""Small results of earlier shards, read once before a shard's own work begins."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merging.dtypes import torch_dtype
from merging.execute.fetch import READ_THREADS
from merging.plan.plan import ShardWork, Source
from merging.storage.base import Storage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Given:
    """What was read, as flat host tensors, and in how many bytes and requests."""

    tensors: Mapping[Source, torch.Tensor] = field(default_factory=dict)
    bytes_read: int = 0
    requests: int = 0


def read_given(work: ShardWork, storage: Storage) -> Given:
    """Read all that a shard's problems are given, each range once, several at a time."""
    import torch

    sources = list(dict.fromkeys(s for problem in work.shard.problems for s in problem.given))
    if not sources:
        return Given()

    def read(source: Source) -> torch.Tensor:
        file = work.files[source.file]
        data = torch.empty(source.num_bytes, dtype=torch.uint8)
        storage.read_into(file.uri, source.start, data.numpy().data, version=file.version)
        return data.view(torch_dtype(source.dtype))

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="given") as threads:
        tensors = dict(zip(sources, threads.map(read, sources), strict=True))
    return Given(tensors, sum(source.num_bytes for source in sources), len(sources))
