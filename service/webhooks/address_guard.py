"""Which addresses may be called: a webhook must not reach into the network that we are in.

An address is looked at when an endpoint is made, for its form, and again at every connection, for
what its name resolves to. The connection is then made to the very number that was checked, so that
a name that changes its answer in between (rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpcore

from merging.errors import MergeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""``await resolve(host, port)``: the numbers of a name. Raises ``OSError``."""

_LONGEST_URL = 2048
_CHARACTERS = re.compile(r"[\x21-\x7e]+")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*[a-z]([a-z0-9-]{{0,61}}[a-z0-9])?")
"""Begins its last part with a letter: what ends in a number is one, in some odd form."""

_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            # metadata of clouds, where it is not link-local (that is refused anyway)
            "100.100.100.200/32",
            "168.63.129.16/32",
            "fd00:ec2::254/128",
            "fd20:ce::254/128",
            # not of the internet, which older Pythons do not know
            "192.0.0.0/24",
            "3fff::/20",
        ),
    )
)
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOOPBACK = ipaddress.ip_address("127.0.0.1")


class AddressError(MergeError):
    """An address that may not be called."""

    default_code = "address_refused"


class AddressGuard:
    """The rules of one deployment.

    Args:
        allowed_hosts: If given, only these may be called: names, numbers, or ``*.example.com``.
            They may be in a private network, since the operator named them.
        allow_loopback: This machine may be called, also without TLS: for development.
    """

    def __init__(self, allowed_hosts: Iterable[str] = (), *, allow_loopback: bool = False) -> None:
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._allow_loopback = allow_loopback

    def check_url(self, url: str) -> None:
        """Refuse an address for its form, or for the number that it is written with.

        Raises:
            AddressError: Saying what is wrong with it.
        """
        if len(url) > _LONGEST_URL or not _CHARACTERS.fullmatch(url) or "\\" in url:
            raise AddressError(
                f"The address has at most {_LONGEST_URL} characters, all of them visible ASCII"
                " without backslashes; write other names in punycode."
            )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise AddressError(f"The address cannot be read: {error}.") from None
        if "@" in parts.netloc or parts.fragment:
            raise AddressError("The address must have no user name, password or fragment.")
        if port == 0:
            raise AddressError("The address has no port 0.")
        if parts.scheme not in ("https", "http"):
            raise AddressError("The address begins with https://.")
        number = _number(host)
        if number is None and not _NAME.fullmatch(host):
            raise AddressError(
                f"{host[:100]!r} is no host: write a name, or a number in its usual form."
            )
        self._check_host(host)
        if number is not None:
            self.check_number(host, number, is_secure=parts.scheme == "https")
        elif host == "localhost" or host.endswith(".localhost"):
            self.check_number(host, _LOOPBACK, is_secure=parts.scheme == "https")
        elif parts.scheme != "https" and not self._allow_loopback:
            raise AddressError("The address begins with https://.")

    def _check_host(self, host: str) -> None:
        parents = (host[index:] for index, letter in enumerate(host) if letter == ".")
        listed = {host, *(f"*{parent}" for parent in parents)}
        if self._allowed_hosts and not listed & self._allowed_hosts:
            raise AddressError(f"{host} is not among the hosts that this deployment allows.")

    def check_number(self, host: str, number: Address, *, is_secure: bool) -> None:
        """Refuse a number that ``host`` stands for.

        Raises:
            AddressError: It is not public, or is called without TLS. The number is not told: what
                names of an inner network stand for is nobody's business.
        """
        if self._allow_loopback and _embedded(number).is_loopback:
            return
        if not is_secure:
            raise AddressError("The address begins with https://.")
        is_named = bool(self._allowed_hosts)  # the host has passed the list
        if not _is_public(number) and not (is_named and _is_private(number)):
            raise AddressError(f"{host} is not at a public address.")


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects for ``httpcore``, only to addresses that the guard lets pass.

    Args:
        guard: The rules.
        is_secure: The connection will use TLS.
        resolve: For tests; by default the system's.
    """

    def __init__(
        self, guard: AddressGuard, *, is_secure: bool, resolve: Resolve | None = None
    ) -> None:
        self._guard = guard
        self._is_secure = is_secure
        self._resolve = resolve or resolve_name
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - overrides
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check, connect to what was checked, and compare who answered.

        Raises:
            AddressError: One of the host's addresses may not be called.
            httpcore.ConnectError: No connection comes about.
        """
        try:
            numbers = [
                ipaddress.ip_address(text.partition("%")[0])
                for text in await self._resolve(host, port)
            ]
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved") from error
        for number in numbers:
            self._guard.check_number(host, number, is_secure=self._is_secure)
        if not numbers:
            raise httpcore.ConnectError(f"{host} has no address")
        stream = await self._connect(numbers, port, timeout, local_address, socket_options)
        peer = ipaddress.ip_address(stream.get_extra_info("server_addr")[0].partition("%")[0])
        if peer not in numbers:
            await stream.aclose()
            raise AddressError(f"{host} was answered for by another address than was called.")
        return stream

    async def _connect(
        self, numbers: Sequence[Address], port: int, *arguments: Any
    ) -> httpcore.AsyncNetworkStream:
        """The first that answers."""
        for number in numbers[:-1]:
            try:
                return await self._inner.connect_tcp(str(number), port, *arguments)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._inner.connect_tcp(str(numbers[-1]), port, *arguments)


async def resolve_name(host: str, port: int) -> list[str]:
    """The numbers that the system knows a name by."""
    found = await get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _number(host: str) -> Address | None:
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _embedded(number: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, Teredo, NAT64), or itself."""
    if isinstance(number, ipaddress.IPv4Address):
        return number
    if number in _NAT64:
        return ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    teredo = number.teredo
    return number.ipv4_mapped or number.sixtofour or (teredo[1] if teredo else number)


def _is_public(number: Address) -> bool:
    number = _embedded(number)
    is_given_out = number.version == 4 or number in _GLOBAL_UNICAST
    is_unicast = number.is_global and not number.is_multicast
    return is_given_out and is_unicast and not _is_in(_REFUSED, number)


def _is_private(number: Address) -> bool:
    """Of an inner network, and nothing more special than that."""
    number = _embedded(number)
    return _is_in(_PRIVATE, number) and not _is_in(_REFUSED, number)


def _is_in(networks: Iterable[Network], number: Address) -> bool:
    return any(number in network for network in networks)
