"""Hosts on one machine: network namespaces, joined by a bridge that this machine is also on."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
