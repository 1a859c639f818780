"""The real engine on a storage that is throttled once: it stands in for a busy object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from merging.errors import StorageError
from merging.plan.plan import ShardWork
from merging.receipts import Receipt
from merging.storage.base import Storage
from workers.measured import run_shard

ENGINE = "tests.support.throttled_engine:run_throttled"


def run_throttled(work: ShardWork, storage: Storage, **rest: Any) -> Receipt:
    """Make a shard; the first read of tensors for an output is refused."""
    return run_shard(work, cast(Storage, _Throttled(storage, work.output_uri)), **rest)


class _Throttled:
    def __init__(self, storage: Storage, output_uri: str) -> None:
        self._storage = storage
        self._mark = Path(output_uri.removeprefix("file://")).with_suffix(".throttled")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read_into(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse once, then do it."""
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return self._storage.read_into(*args, **kwargs)
        raise StorageError("Slow down.", code="throttled", retryable=True)
