"""What the Ray pool and its driver process say to each other: one JSON object a line."""

from __future__ import annotations

import msgspec

from workers.messages import PoolEvent, ShardTask


class RayOptions(msgspec.Struct, frozen=True):
    """How to reach or start Ray, and what one shard task takes of it.

    Attributes:
        address: ``host:port`` of a cluster whose node this machine is; None starts a local Ray
            that ends with the pool.
        num_cpus: Cores that a local Ray hands out; None: all.
        num_gpus: GPUs that a local Ray hands out; None: all.
        cpus_per_task: Cores of a shard task.
        gpus_per_task: GPUs of a shard task, may be a fraction; None: 1 where the cluster has any
            when the pool connects, else 0.
        memory_per_task: Host bytes that Ray reserves for a shard task; 0 reserves none.
        temp_dir: Where a local Ray keeps sockets and logs; should be closed to other users. None:
            ``mergeyard-ray-<user id>`` in the system's temporary folder.
        token_path: File with Ray's authentication token; made (mode 0600) for a local Ray if it
            is missing. None: a fresh token that only the local Ray knows; for a cluster, what
            ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH`` of this process say.
        log_level: Of Ray's own messages.
        start_timeout: Seconds until starting or joining Ray is given up.
    """

    address: str | None = None
    num_cpus: int | None = None
    num_gpus: int | None = None
    cpus_per_task: float = 1.0
    gpus_per_task: float | None = None
    memory_per_task: int = 0
    temp_dir: str | None = None
    token_path: str | None = None
    log_level: str = "error"
    start_timeout: float = 60.0


class Start(msgspec.Struct, frozen=True, tag=True):
    """First word to the driver."""

    options: RayOptions
    engine: str


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a task."""

    task: ShardTask


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop one task."""

    job_id: str
    shard_index: int
    now: bool


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The driver is part of a cluster; ``session`` is Ray's folder of logs on the head."""

    address: str
    session: str
    slots: int


class Slots(msgspec.Struct, frozen=True, tag=True):
    """Tasks that the cluster can run at once has changed."""

    count: int


class Placed(msgspec.Struct, frozen=True, tag=True):
    """First word of a worker to the driver: the id of the Ray node that it is on."""

    node_id: str


class Lost(msgspec.Struct, frozen=True, tag=True):
    """Last word of a driver that cannot reach Ray."""

    detail: str


Command = Start | Submit | Cancel
Notice = PoolEvent | Connected | Slots | Lost


def encode(message: Command | Notice) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def decode_command(line: bytes) -> Command:
    """Inverse of :func:`encode` for the driver."""
    command: Command = msgspec.json.decode(line, type=Command)
    return command


def decode_notice(line: bytes) -> Notice:
    """Inverse of :func:`encode` for the pool."""
    notice: Notice = msgspec.json.decode(line, type=Notice)
    return notice
