"""Hosts on one machine: network namespaces, joined by a bridge that this machine is also on.

A :class:`Machine` on a host has its own processes, name and ``/tmp/ray`` as well, so that a Ray
that runs there knows of no other.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_SUBNETS = "198.18"  # set aside for tests of networks (RFC 2544): nobody's address


@dataclass(frozen=True)
class Host:
    """A network namespace with an address of its own."""

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What goes before a command that shall run on the host."""
        return ["ip", "netns", "exec", self.name]

    @property
    def path(self) -> str:
        """The namespace as a file, for container engines."""
        return f"/run/netns/{self.name}"


class Machine:
    """A machine that is switched on: its first process, which waits, and what runs beside it.

    Args:
        name: Its name, as programs on it see it.
        folder: Stands in for its ``/tmp/ray``; made.
        host: Where it is in the network; None for this machine's own place.
    """

    def __init__(self, name: str, folder: Path, host: Host | None = None) -> None:
        folder.mkdir(parents=True)
        ray = Path("/tmp/ray")
        ray.mkdir(exist_ok=True)
        script = f"hostname {name} && mount --bind {folder} {ray} && echo on && exec sleep infinity"
        self._first = subprocess.Popen(
            [
                *(host.prefix if host else ()),
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", script),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "on\n":
            pytest.skip("namespaces of processes and mounts are not permitted here")
        self._programs: list[subprocess.Popen[bytes]] = []
        (inside,) = psutil.Process(self._first.pid).children()
        namespaces = ("--mount", "--uts", "--pid", *(["--net"] if host else []))
        self.prefix = ["nsenter", f"--target={inside.pid}", *namespaces, "--"]

    def run(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        """Start a program that runs until it ends or the machine is switched off."""
        with log.open("ab") as output:
            program = subprocess.Popen(
                [*self.prefix, *command], env=environment, stdout=output, stderr=output
            )
        self._programs.append(program)

    def switch_off(self) -> None:
        """End everything on it at once."""
        self._first.kill()  # and with it the child, and with that all of its namespace
        self._first.communicate()
        for program in self._programs:
            program.wait()


class Network:
    """A bridge with hosts; ``address`` is this machine's own on it."""

    def __init__(self) -> None:
        number = secrets.randbelow(255)
        self._tag = f"my{secrets.token_hex(3)}"
        self._numbers = itertools.count(2)
        self._subnet = f"{_SUBNETS}.{number}"
        self._hosts: list[Host] = []
        self.address = f"{self._subnet}.1"
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")

    def add_host(self) -> Host:
        """A further host, connected with all others."""
        number = next(self._numbers)
        host = Host(f"{self._tag}-{number}", f"{self._subnet}.{number}")
        _ip("netns", "add", host.name)
        self._hosts.append(host)
        _ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.name, "master", self._tag, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{host.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            # Leads nowhere, but programs learn their own address by asking for a way out.
            ("route", "add", "default", "dev", "eth0"),
        ):
            _ip("-n", host.name, *command)
        return host

    def cut_off(self, host: Host) -> None:
        """Pull the plug of a host: from now on nothing reaches it, and nobody is told."""
        _ip("link", "set", host.name, "down")

    def close(self) -> None:
        """Take everything down."""
        for host in self._hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False)
        subprocess.run(["ip", "link", "delete", self._tag], check=False)


@contextmanager
def network() -> Iterator[Network]:
    """A network for the length of a block; skips the test where none may be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (iproute2)")
    try:
        made = Network()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.close()


def _ip(*words: str) -> None:
    command: Sequence[str] = ["ip", *words]
    subprocess.run(command, check=True, capture_output=True, text=True)
