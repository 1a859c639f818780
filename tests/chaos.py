"""Random faults for a while against random merges: ``python -m tests.chaos --seconds 300``.

Real processes on loopback: a PostgreSQL, an S3 server behind a proxy that misbehaves, API replicas
and runners. Says what it did, and that every job that was accepted ended once, with the bytes of an
undisturbed run or with nothing; the exit status is 1 otherwise. A seed makes the same choices again
(how they fall together with what the jobs do just then is up to the machine).
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.s3_server import S3Server, s3_server
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.publish import INDEX_NAME
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from service.client import ApiError
from tests.support.checkpoints import make_family
from tests.support.cluster import LEASE_SECONDS, Cluster, running_cluster
from tests.support.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.support.jobs_over_http import all_events, outlasting, wait_for
from tests.support.merges import recipe, weight_bytes
from tests.support.s3_models import download_prefix, upload_folder

OPTIONS = {"max_shard_size": "400KB", "memory_budget": "64MiB"}
BUCKET = "merges"
_LIVE_JOBS = 6
_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear", {}),
    ("task_arithmetic", {"weight": 0.4}),
    ("wudi", {"steps": 200}),
)


@dataclass(frozen=True)
class Merge:
    """A kind of merge, and the weight files that it gives when nobody interferes."""

    document: dict[str, Any]
    expected: dict[str, bytes]


@dataclass
class Job:
    """A job that was accepted."""

    id: str
    output: str
    merge: Merge
    is_cancelled: bool = False


@dataclass
class World:
    """Everything that runs, and everything that was asked of it."""

    folder: Path
    cluster: Cluster
    server: S3Server
    proxy: FaultProxy
    merges: list[Merge]
    say: Callable[[str], None]
    jobs: list[Job] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str]) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=120, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=None, help="of the choices; default: random")
    chosen = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if chosen.seed is None else chosen.seed
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    say(f"seed {seed}")
    with ExitStack() as stack:
        world = _build(stack, say)
        _disturb(world, random.Random(seed), chosen.seconds)
        losses = _judge(world)
    faults = ", ".join(f"{name} ×{count}" for name, count in sorted(world.faults.items()))
    say(f"did: {faults}")
    for loss in losses:
        say(f"LOST: {loss}")
    say(f"{len(world.jobs)} jobs, {len(losses)} losses; seed {seed}")
    return 1 if losses else 0


def _build(stack: ExitStack, say: Callable[[str], None]) -> World:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mergeyard-chaos-")))
    server = stack.enter_context(s3_server())
    server.create_bucket(BUCKET)
    proxy = stack.enter_context(fault_proxy(server.endpoint))
    merges = list(_merges(folder, server))
    environment = {**server.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
    roots = [str(folder), f"s3://{BUCKET}"]
    cluster = stack.enter_context(
        running_cluster(folder, roots, num_apis=2, num_runners=2, environment=environment)
    )
    say("2 API replicas, 2 runners, PostgreSQL and S3 are up")
    return World(folder, cluster, server, proxy, merges, say)


def _merges(folder: Path, server: S3Server) -> Iterator[Merge]:
    """Each method, once from files and once from S3."""
    family = make_family(folder / "models", num_experts=2, hidden=128, layers=4)
    base = upload_folder(server, family.base, BUCKET, "base")
    experts = [
        upload_folder(server, expert, BUCKET, f"expert-{number}")
        for number, expert in enumerate(family.experts)
    ]
    storage = open_storage()
    for method, parameters in _METHODS:
        local = recipe(family, method, **parameters)
        output = folder / f"undisturbed-{method}"
        options = MergeOptions(**OPTIONS)
        run_plan(make_plan(parse_recipe(local), storage, options, str(output)), storage)
        remote = {**local, "models": [{"model": expert} for expert in experts]}
        if "base_model" in local:
            remote["base_model"] = base
        for document in (local, remote):
            yield Merge(document, weight_bytes(output))


# -- what happens


def _disturb(world: World, chance: random.Random, seconds: float) -> None:
    """Keep some jobs going, and something happening to what they run on."""
    over = threading.Event()
    crowd = threading.Thread(
        target=_submit_jobs, args=(world, random.Random(chance.random()), over)
    )
    crowd.start()
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.5, 4.0))
            fault = chance.choice(_FAULTS)
            name = fault.__name__.strip("_").replace("_", " ")
            world.say(name)
            world.faults[name] += 1
            fault(world, chance)
    finally:
        over.set()
        crowd.join()
        world.proxy.set(every=0)
    world.cluster.start()
    world.say("no more faults; waiting for the jobs")


def _submit_jobs(world: World, chance: random.Random, over: threading.Event) -> None:
    while not over.wait(0.5):
        with suppress(ApiError, IndexError):  # nobody answers just now
            with world.cluster.client() as client:
                counts = client._call("GET", "/v1/jobs/counts")["counts"]
                live = sum(counts.values()) - sum(counts[s] for s in ("succeeded", "failed"))
                if live - counts["cancelled"] < _LIVE_JOBS:
                    _submit(world, chance)
            if chance.random() < 0.1:
                _cancel_one(world, chance)


def _submit(world: World, chance: random.Random) -> None:
    """A job whose acceptance is made sure of, however often that takes."""
    merge, key = chance.choice(world.merges), uuid.uuid4().hex
    place = chance.choice([str(world.folder / "outputs"), f"s3://{BUCKET}/outputs"])
    output = f"{place}/{key[:8]}"

    def submit() -> str:
        with _any_client(world) as client:
            job = client.submit(merge.document, output, idempotency_key=key, options=OPTIONS)
        return str(job["id"])

    world.jobs.append(Job(outlasting(submit), output, merge))


def _cancel_one(world: World, chance: random.Random) -> None:
    job = chance.choice(world.jobs[-_LIVE_JOBS:])
    with _any_client(world) as client:
        client.cancel(job.id, mode=chance.choice(["orderly", "now"]))
    job.is_cancelled = True
    world.faults["cancel a job"] += 1


def _any_client(world: World) -> Any:
    wait_for(lambda: any(api.is_running for api in world.cluster.apis), "an API replica")
    return world.cluster.client()


def _kill_a_runner(world: World, chance: random.Random) -> None:
    runner = chance.choice(world.cluster.runners)
    runner.kill()
    time.sleep(chance.uniform(0, 2 * LEASE_SECONDS))
    runner.start()


def _stop_a_runner_in_order(world: World, chance: random.Random) -> None:
    runner = chance.choice(world.cluster.runners)
    runner.stop()
    runner.start()


def _put_a_runner_to_sleep(world: World, chance: random.Random) -> None:
    process = chance.choice(world.cluster.runners).process
    process.send_signal(signal.SIGSTOP)
    time.sleep(chance.uniform(0, 3 * LEASE_SECONDS))
    process.send_signal(signal.SIGCONT)


def _kill_an_api_replica(world: World, chance: random.Random) -> None:
    api = chance.choice(world.cluster.apis)
    api.kill()
    api.start()


def _kill_the_database(world: World, chance: random.Random) -> None:
    world.cluster.postgres.kill()
    time.sleep(chance.uniform(0, LEASE_SECONDS))
    world.cluster.postgres.start()


def _kill_the_s3_server(world: World, chance: random.Random) -> None:
    world.server.kill()
    time.sleep(chance.uniform(0, 2))
    world.server.start()


def _break_connections_to_s3(world: World, chance: random.Random) -> None:
    faults = [fault for fault in Fault if fault is not Fault.STALL]  # a minute each
    world.proxy.set(*chance.sample(faults, 3), every=chance.randint(3, 6))
    time.sleep(chance.uniform(2, 6))
    world.proxy.set(every=0)


_FAULTS = (
    _kill_a_runner,
    _stop_a_runner_in_order,
    _put_a_runner_to_sleep,
    _kill_an_api_replica,
    _kill_the_database,
    _kill_the_s3_server,
    _break_connections_to_s3,
)


# -- what became of it


def _judge(world: World) -> list[str]:
    """What was lost: one line each."""
    losses = []
    for job in world.jobs:
        try:
            _check(world, job)
        except (AssertionError, ApiError) as error:
            losses.append(f"{job.id} at {job.output}: {error}")
    states = Counter(_read(world, job)["state"] for job in world.jobs)
    world.say(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    return losses


def _read(world: World, job: Job) -> dict[str, Any]:
    with world.cluster.client() as client:
        return client.job(job.id)


def _check(world: World, job: Job) -> None:
    wait_for(lambda: _read(world, job)["is_terminal"], f"the end of {job.id}")
    if (failed := _read(world, job))["state"] == "failed":
        # More went wrong than a job puts up with; then a retry must go on from where it was.
        world.say(f"{job.id} failed ({failed['error']['code']}): retried")
        world.faults["retry a failed job"] += 1
        with world.cluster.client() as client:
            client._call("POST", f"/v1/jobs/{job.id}/retry")
        wait_for(lambda: _read(world, job)["is_terminal"], f"the end of {job.id}")
    end = _read(world, job)
    with world.cluster.client() as client:
        events = all_events(client, job.id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), "gaps"
    endings = [event["attempt"] for event in events if event["type"] == "job.finished"]
    assert endings == list(range(1, end["attempt"] + 1)), f"ended {len(endings)} times"
    found = _fetch(world, job)
    if end["state"] == "succeeded":
        assert weight_bytes(found) == job.merge.expected, "other bytes than undisturbed"
        assert not list(found.glob(".mergeyard*")), "its workspace is still there"
    else:
        assert (end["state"], job.is_cancelled) == ("cancelled", True), end["error"]
        assert not (found / INDEX_NAME).exists(), "a cancelled job has a result"


def _fetch(world: World, job: Job) -> Path:
    """The output's files on this machine."""
    if not job.output.startswith("s3://"):
        return Path(job.output)
    return download_prefix(world.server, job.output, world.folder / "fetched" / job.id)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
