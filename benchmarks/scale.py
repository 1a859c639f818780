"""How merges of 13B to 405B scale over GPUs: real plans, replayed at measured rates.

    python -m benchmarks.scale [--rates cpu|h100] [--models 13B 70B 405B] [--json FILE]

Plans are the planner's, made from headers of models that take no room. Each shard is then replayed
on the machine that is free first: fetch, solve and upload overlap, and the slowest sets its time.
Fetch and upload are this machine's client, measured against a real S3 server in CPU seconds per
byte (what one core for each does where the server keeps up), or a GPU's share of its machine's
network, whichever is less. Solving is measured on this machine's
CPU (``--rates cpu``), or an H100 as `H100` below assumes it.
"""

from __future__ import annotations

import argparse
import heapq
import os
import secrets
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from benchmarks.records import write_record
from benchmarks.sparse_models import SHAPES, write_sparse_model
from examples.s3_server import s3_server
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.timing import shard_seconds
from merging.probe import measure_rates
from merging.rates import Rates
from merging.recipe import parse_recipe
from merging.storage.router import open_storage

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GPUS_PER_MACHINE = 8
MACHINE_BYTES_PER_SECOND = 12.5e9  # 100 Gbit/s, all that goes in or out
STORE_BYTES_PER_SECOND = 100e9  # of all machines together
METHODS: dict[str, dict[str, float]] = {"ties": {"density": 0.5}, "swudi_a": {}, "wudi": {}}
NUM_EXPERTS = 3
SHARD_SIZE = "2GB"

# Assumed, not measured: float32 products at two thirds of the data sheet's 67 Tflop/s for large
# matrices and far less for small ones, element-wise work at 3.35 TB/s, entries over PCIe 5.
H100 = Rates(
    machine="assumed",
    device="cuda:0 H100",
    threads=1,
    steps=((256, 2e12), (1024, 2e13), (4096, 4.5e13)),
    operations=2e11,
    entries=1.2e10,
)

_OBJECT_BYTES = 64 << 20
_ROUNDS = 3


class Client(NamedTuple):
    """What one core moves between a store and memory, bytes a second of its own time."""

    fetch: float
    upload: float


def main() -> None:
    """Measure, plan, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", choices=["cpu", "h100"], default="h100")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    client = measure_client()
    solving = H100 if arguments.rates == "h100" else measure_rates("cpu", "cpu", 1)
    print(
        f"fetch {client.fetch / 1e6:.0f} MB/s and upload {client.upload / 1e6:.0f} MB/s a core;"
        f" solving on {solving.device} ({arguments.rates})"
    )
    results = []
    for model in arguments.models:
        for method in METHODS:
            begin = time.monotonic()
            plan = make_model_plan(model, method)
            seconds = time.monotonic() - begin
            print(f"\n{model} {method}: {len(plan.shards)} shards, planned in {seconds:.1f} s")
            rows = [replay(plan, solving, client, gpus) for gpus in GPUS]
            for row in rows:
                print(line(row))
            results.append(
                {"model": model, "method": method, "plan_seconds": seconds, "rows": rows}
            )
    if arguments.json:
        figures = {
            "client": client._asdict(),
            "solving": msgspec.to_builtins(solving),
            "results": results,
        }
        write_record(arguments.json, torch.device("cpu"), figures)


def make_model_plan(model: str, method: str) -> Plan:
    """The plan of a base model and its experts, all of the model's shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = ["base", *(f"expert-{number}" for number in range(NUM_EXPERTS))]
        paths = [str(write_sparse_model(folder / part, SHAPES[model])) for part in names]
        document = {
            "merge_method": method,
            "base_model": paths[0],
            "models": [{"model": path} for path in paths[1:]],
            "parameters": METHODS[method],
        }
        options = MergeOptions(
            max_shard_size=SHARD_SIZE, memory_budget="16GiB", device_memory_budget="70GiB"
        )
        return make_plan(parse_recipe(document), open_storage(), options, str(folder / "merged"))


def replay(plan: Plan, solving: Rates, client: Client, gpus: int) -> dict[str, Any]:
    """What a plan takes on so many GPUs."""
    machines = max(1, gpus // GPUS_PER_MACHINE)
    busy = min(gpus, len(plan.shards))  # Ray spreads them over the machines
    network = MACHINE_BYTES_PER_SECOND * min(machines, busy)
    narrowest = "network" if network <= STORE_BYTES_PER_SECOND else "store"
    share = min(network, STORE_BYTES_PER_SECOND) / busy
    rates = msgspec.structs.replace(
        solving,
        read={"file": min(client.fetch, share)},
        written={"file": min(client.upload, share)},
    )
    free = [(0.0, number) for number in range(gpus)]
    limits, moved, work = Counter[str](), Counter[int](), 0.0
    for shard in plan.shards:
        found = shard_seconds(plan, shard, rates)
        assert found is not None
        stages = {"fetch": found.read, "solve": found.solve, "upload": found.write}
        # In and out share a machine's network.
        stages[narrowest] = (shard.bytes_read + shard.size) / share
        taken = max(found.total, stages[narrowest])
        limits[max(stages, key=lambda stage: stages[stage])] += 1
        begin, number = heapq.heappop(free)
        heapq.heappush(free, (begin + taken, number))
        moved[number % machines] += shard.bytes_read + shard.size
        work += taken
    seconds = max(end for end, _ in free)
    is_short = gpus > len(plan.shards)
    return {
        "gpus": gpus,
        "seconds": round(seconds, 1),
        "idle_share": round(1 - work / (seconds * gpus), 3),
        "bytes_per_machine": max(moved.values()),
        "limit": "number of shards" if is_short else limits.most_common(1)[0][0],
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['gpus']:>4} GPUs  {row['seconds']:>9.1f} s  idle {row['idle_share']:>5.1%}"
        f"  {row['bytes_per_machine'] / 1e9:>8.1f} GB a machine  {row['limit']}"
    )


def measure_client() -> Client:
    """CPU seconds of this process for each byte fetched from, and uploaded to, an S3 server."""
    with s3_server() as server:
        os.environ.update(server.environment())
        server.create_bucket("scale")
        storage = open_storage()
        data = secrets.token_bytes(_OBJECT_BYTES)
        fetch, upload = [], []
        for number in range(_ROUNDS):
            uri = f"s3://scale/object-{number}"
            begin = time.process_time()
            with storage.open_writer(uri, _OBJECT_BYTES) as writer:
                writer.write(data)
                stat = writer.commit()
            upload.append(time.process_time() - begin)
            buffer = memoryview(bytearray(_OBJECT_BYTES))
            begin = time.process_time()
            storage.read_into(uri, 0, buffer, version=stat.version)
            fetch.append(time.process_time() - begin)
            assert buffer == data
    return Client(_OBJECT_BYTES / min(fetch), _OBJECT_BYTES / min(upload))


if __name__ == "__main__":
    main()
