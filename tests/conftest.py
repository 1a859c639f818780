"""Fixtures that many tests share, and the guard that keeps every test on this machine."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from examples.s3_server import S3Server, s3_server


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tests share few cores; where nothing needs torch it stays unloaded."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What workers remember of this machine's speed stays in the tests; they inherit the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that opens a connection to another machine."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _check_local(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _check_local(self, address)
        return connect_ex(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)


def _check_local(sock: socket.socket, address: Any) -> None:
    # Connecting a datagram socket sends nothing; Ray does so to learn its own address.
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type & socket.SOCK_DGRAM:
        return
    if not _is_local(sock.family, address[0]):
        pytest.fail(f"this test tried to connect to {address}; tests stay on this machine")


def _is_local(family: int, host: str) -> bool:
    """Whether an address belongs to this machine: then a socket can be bound to it."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return False
    return True


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server on loopback. Tests that use it are marked ``s3``."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_env(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with this process's AWS settings pointing at it and at nothing else."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[str]:
    """The name of a fresh bucket, which goes with what is in it."""
    name = f"test-{secrets.token_hex(6)}"
    s3.create_bucket(name)
    yield name
    client = s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket=name, Delete={"Objects": keys, "Quiet": True})
    client.delete_bucket(Bucket=name)
