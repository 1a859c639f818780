"""The process that talks to Ray, apart from the controller: ``python -m workers.ray_driver``.

Ray ends a driver process outright when it cannot reach its head for a minute, keeps silent about
tasks until then, and binds the life of a local Ray to the thread that started it. In a process of
its own all this can be neither seen nor felt by the API and the runner: whatever goes wrong, this
process ends, and the pool starts another.

Reads :mod:`workers.ray_wire` commands from stdin, writes notices to stdout, and ends at the end of
stdin, so that it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import ray
from ray.exceptions import (
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)

from merging.errors import MergeError, WorkerError
from workers.in_flight import Key, cancelled_error
from workers.messages import PoolEvent, ShardDone, ShardFailed, ShardTask
from workers.ray_connect import connect, parse_address
from workers.ray_task import stream_shard
from workers.ray_wire import (
    Cancel,
    Connected,
    Lost,
    Notice,
    Placed,
    RayOptions,
    Slots,
    Start,
    Submit,
    decode_command,
    encode,
)

_LONGEST_LINE = 1 << 30
_SECONDS_BETWEEN_CHECKS = 1.0
_SECONDS_TO_CLOSE = 5.0
_SECONDS_TO_ANSWER = 5.0
_PATIENCE_SECONDS = 45.0  # a head may restart; Ray itself gives up after 60


@dataclass(slots=True)
class _Followed:
    """A task in Ray's hands: who follows it, and the node that it is on, once it is on one."""

    task: ShardTask
    stream: Any
    follower: asyncio.Task[None]
    node_id: str | None = None
    is_cancelled: bool = False


class Driver:
    """Submits, follows and cancels tasks on a Ray that is connected.

    Args:
        options: See :class:`workers.ray_wire.RayOptions`.
        engine: Dotted path of the function that produces a shard.
        output: Where notices go.
    """

    def __init__(self, options: RayOptions, engine: str, output: BinaryIO) -> None:
        self._options = options
        self._engine = engine
        self._output = output
        self._followed: dict[Key, _Followed] = {}
        self._group = asyncio.TaskGroup()
        context = ray.get_runtime_context()
        nodes = ray.nodes()
        self._alive = {node["NodeID"] for node in nodes if node["Alive"]}
        self._losses = 0
        self._address: str = context.gcs_address
        self._node_id = context.get_node_id()
        # Where the head and this machine's raylet, through which everything goes, listen.
        here = next(node for node in nodes if node["NodeID"] == self._node_id)
        self._doors = [
            parse_address(self._address),
            (here["NodeManagerAddress"], here["NodeManagerPort"]),
        ]
        has_gpus = any(node["Resources"].get("GPU", 0.0) >= 1 for node in nodes)
        gpus = options.gpus_per_task
        self._gpus_per_task = float(has_gpus) if gpus is None else gpus
        self._slots = count_slots(nodes, options, self._gpus_per_task)
        # max_calls=0 keeps worker processes, with their CUDA context and connections, for the
        # next task. max_retries=0: the runner retries, since it counts and records attempts.
        # SPREAD, because shards are bound by each machine's network before its cores.
        self._stream_shard = ray.remote(
            num_cpus=options.cpus_per_task,
            num_gpus=self._gpus_per_task,
            num_returns="streaming",
            max_calls=0,
            max_retries=0,
            scheduling_strategy="SPREAD",
        )(stream_shard)

    async def run(self, session: str, source: BinaryIO) -> None:
        """Serve commands until ``source`` ends, then cancel what is left."""
        reader = asyncio.StreamReader(limit=_LONGEST_LINE)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
        self._send(Connected(self._address, session, self._slots))
        async with self._group:  # a defect in any of its tasks ends the process
            watch = self._group.create_task(self._watch())
            while line := await reader.readline():
                command = decode_command(line)
                if isinstance(command, Submit):
                    self._start(command.task)
                elif isinstance(command, Cancel):
                    self._cancel(command)
            followers = [followed.follower for followed in self._followed.values()]
            for followed in self._followed.values():
                ray.cancel(followed.stream)
            if followers:
                await asyncio.wait(followers, timeout=_SECONDS_TO_CLOSE)
            for rest in (watch, *followers):
                rest.cancel()

    def _cancel(self, command: Cancel) -> None:
        followed = self._followed.get((command.job_id, command.shard_index))
        if followed is not None:
            followed.is_cancelled = True
            ray.cancel(followed.stream, force=command.now)

    def _start(self, task: ShardTask) -> None:
        # Ray queues requests for the same resources behind one another, and one that it sent to a
        # lost node gets no answer for minutes. So with each loss they become other ones, by a byte.
        memory = abs(self._options.memory_per_task - self._losses)
        stream = self._stream_shard.options(memory=memory or None).remote(
            msgspec.json.encode(task), self._engine
        )
        follower = self._group.create_task(self._follow(task, stream))
        self._followed[task.key] = _Followed(task, stream, follower)

    async def _follow(self, task: ShardTask, stream: Any) -> None:
        """Pass on the events of one task; exactly one of them is its end."""
        error: MergeError = WorkerError(
            "The worker stopped without a word about the shard.", retryable=True
        )
        try:
            async for item in stream:
                event = msgspec.json.decode(await item, type=PoolEvent | Placed)
                if isinstance(event, Placed):
                    self._followed[task.key].node_id = event.node_id
                    continue
                if isinstance(event, (ShardDone, ShardFailed)):
                    self._finish(task, event)
                    return
                self._send(event)
        except RayError as fault:
            error = error_from_ray(fault)
        self._fail(task, error)

    def _fail(self, task: ShardTask, error: MergeError) -> None:
        end = ShardFailed(task.job_id, task.work.shard.index, task.attempt, error.to_dict())
        self._finish(task, end)

    def _finish(self, task: ShardTask, end: PoolEvent) -> None:
        del self._followed[task.key]
        self._send(end)

    def _give_up_nodes(self, alive: set[str]) -> None:
        """Take tasks away from nodes that Ray has given up.

        Ray tells of them only once their connections fail, which without any answer, as when a
        network is cut, takes it some seven minutes. Tasks that wait may wait for such a node:
        they are submitted anew.
        """
        is_any_lost = bool(self._alive - alive)
        self._losses += is_any_lost
        self._alive = alive
        for followed in list(self._followed.values()):
            is_waiting = followed.node_id is None
            if is_any_lost if is_waiting else followed.node_id not in alive:
                followed.follower.cancel()
                if is_waiting and not followed.is_cancelled:
                    ray.cancel(followed.stream)
                    self._start(followed.task)
                elif followed.is_cancelled:
                    self._fail(followed.task, cancelled_error())
                else:
                    lost = WorkerError("The worker's machine was lost.", retryable=True)
                    self._fail(followed.task, lost)

    async def _watch(self) -> None:
        """Tell the number of slots; end the process when Ray is out of reach for too long."""
        loop = asyncio.get_running_loop()
        reached = loop.time()
        while True:
            try:
                await self._check()
                reached = loop.time()
            except (OSError, RuntimeError, RayError) as error:
                # Nobody listens any more at a port of a local Ray: it does not come back.
                local = self._options.address is None
                gone = local and isinstance(error, ConnectionRefusedError)
                if gone or loop.time() - reached > _PATIENCE_SECONDS:
                    self._send(Lost("The Ray cluster stopped answering."))
                    # An orderly shutdown would wait for answers. The pool ends the processes.
                    os._exit(1)
            await asyncio.sleep(_SECONDS_BETWEEN_CHECKS)

    async def _check(self) -> None:
        """Raise unless the cluster answers and this machine is part of it; count its slots."""
        for door in self._doors:
            _, writer = await asyncio.wait_for(asyncio.open_connection(*door), _SECONDS_TO_ANSWER)
            writer.close()
        nodes = await asyncio.wait_for(asyncio.to_thread(ray.nodes), _SECONDS_TO_ANSWER)
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        if self._node_id not in alive:
            raise ConnectionError("This machine has left the cluster.")
        self._give_up_nodes(alive)
        slots = count_slots(nodes, self._options, self._gpus_per_task)
        if slots != self._slots:
            self._slots = slots
            self._send(Slots(slots))

    def _send(self, notice: Notice) -> None:
        # The pool reads all the time, so this does not wait.
        self._output.write(encode(notice))
        self._output.flush()


def count_slots(nodes: list[dict[str, Any]], options: RayOptions, gpus_per_task: float) -> int:
    """Tasks that the machines of a cluster (``ray.nodes()``) can run at once."""
    demands = {
        "CPU": options.cpus_per_task,
        "GPU": gpus_per_task,
        "memory": float(options.memory_per_task),
    }
    total = 0
    for node in nodes:
        if node["Alive"]:
            has = node["Resources"]
            # The small term lets 1 / 0.1 be 10.
            fits = [has.get(name, 0.0) / need + 1e-9 for name, need in demands.items() if need]
            total += int(min(fits, default=0.0))
    return total


def error_from_ray(fault: Any) -> MergeError:
    """What an exception that Ray gave in place of a result means for the shard."""
    if isinstance(fault, TaskCancelledError):
        return cancelled_error()
    if isinstance(fault, OutOfMemoryError):
        return WorkerError(
            "Ray ended the worker because its machine ran out of memory. Run fewer shards per"
            " machine (more cpus_per_task or memory_per_task), or plan with a smaller"
            " memory_budget.",
            code="out_of_memory",
            retryable=True,
        )
    if isinstance(fault, RayTaskError):
        cause = fault.cause
        if isinstance(cause, MergeError):
            return cause
        return WorkerError(
            f"A Ray worker could not run the shard task ({type(cause).__name__})."
            " Run the same version of Mergeyard and Python on the controller and on every node.",
            code="wrong_version",
        )
    return WorkerError(
        f"The worker process or its machine was lost ({type(fault).__name__}).", retryable=True
    )


def main() -> int:
    """Connect, then serve until stdin ends."""
    # Ray and its libraries may print; only notices may reach the pool.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source = io.FileIO(sys.stdin.fileno(), closefd=False)
    start = decode_command(source.readline())
    assert isinstance(start, Start)
    try:
        session = connect(start.options)
    except Exception as error:  # noqa: BLE001 - Ray raises anything from RuntimeError to OSError
        reason = next(iter(str(error).splitlines()), "")[:300]
        output.write(encode(Lost(f"Ray cannot be reached or started: {reason}")))
        output.flush()
        return 1
    asyncio.run(Driver(start.options, start.engine, output).run(session, source))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
