"""A runner as a process of its own, to be killed; its argument is the store's address."""

from __future__ import annotations

import sys
import threading

import torch

from merging.storage.router import open_storage
from service.jobs.sql_store import open_store
from service.runner.loop import Runner
from service.runner.settings import RunnerSettings
from workers.local_pool import LocalPool


def main() -> None:
    """Drive jobs, one shard at a time, until killed."""
    torch.set_num_threads(1)
    settings = RunnerSettings(
        device="cpu",
        max_in_flight_shards=1,
        lease_seconds=2.0,
        heartbeat_seconds=0.2,
        claim_seconds=0.05,
    )
    Runner(open_store(sys.argv[1]), open_storage, LocalPool(1), settings).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
