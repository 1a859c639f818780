"""Starting a local Ray, or joining a cluster as a driver."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from pathlib import Path

import ray

from workers.ray_wire import RayOptions

_OBJECT_STORE_BYTES = 128 << 20  # only plans, progress and receipts cross it
_SECONDS_TO_ANSWER = 5.0


def connect(options: RayOptions) -> str:
    """Start a local Ray, or become a driver of a cluster; returns Ray's session folder."""
    common = {
        "log_to_driver": False,
        "logging_level": options.log_level.upper(),
        "namespace": "mergeyard",
    }
    if options.address is not None:
        _knock(options.address)
        return str(ray.init(address=options.address, **common).address_info["session_dir"])
    context = ray.init(
        address="local",
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        # Ray opens this folder to everybody, so it lies in one that is closed.
        _temp_dir=str(_folder(options) / "ray"),
        **common,
    )
    return str(context.address_info["session_dir"])


def _knock(address: str) -> None:
    """Find out in seconds what Ray would find out in minutes."""
    try:
        socket.create_connection(parse_address(address), _SECONDS_TO_ANSWER).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"nothing answers at {address} ({error})") from None


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; raises ``ValueError`` for anything else."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _folder(options: RayOptions) -> Path:
    """The folder of a local Ray, whose sockets know no token: it must be ours alone."""
    if options.temp_dir is not None:
        folder = Path(options.temp_dir).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"mergeyard-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to other users; remove it or set temp_dir.")
    return folder
