"""Webhooks reach no further than they may."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence

import httpcore
import pytest

from service.webhooks.address_guard import AddressError, AddressGuard, GuardedBackend

FORBIDDEN = [
    # no TLS, other schemes
    "http://example.com/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "//example.com/",
    "example.com/hook",
    "",
    # credentials and parts that others read differently
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://@example.com/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com/#fragment",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://exa mple.com/",
    "https://example.com/\r\nHost: other",
    "https://exämple.com/",
    "https://example.com./",
    "https://-example.com/",
    "https:///path",
    "https://[::1",
    f"https://example.com/{'x' * 2048}",
    # this machine
    "https://localhost/",
    "https://LOCALHOST/",
    "https://hook.localhost/",
    "https://127.0.0.1/",
    "https://127.255.255.254/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[::]/",
    # numbers in other forms
    "https://2130706433/",
    "https://127.1/",
    "https://127.0.1/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1./",
    "https://example.123/",
    "https://１２７.0.0.1/",
    # private networks
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://198.18.0.1/",
    "https://192.0.0.192/",
    "https://[fc00::1]/",
    "https://[fd12:3456::1]/",
    "https://[fec0::1]/",
    # link-local and metadata
    "https://169.254.169.254/latest/meta-data/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[2606:4700::1%25eth0]/",
    "https://100.100.100.200/",
    "https://168.63.129.16/",
    "https://[fd00:ec2::254]/",
    "https://[fd20:ce::254]/",
    # IPv4 inside IPv6
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[::ffff:a9fe:a9fe]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::a00:1]/",
    "https://[64:ff9b:1::a00:1]/",
    "https://[2002:7f00:1::1]/",
    "https://[2002:a00:1::1]/",
    "https://[2001:0:4136:e378:8000:63bf:f5ff:fffe]/",
    # no unicast of the internet
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://240.0.0.1/",
    "https://192.0.2.1/",
    "https://[ff02::1]/",
    "https://[2001:db8::1]/",
    "https://[100::1]/",
    "https://[3fff::1]/",
]
ALLOWED = [
    "https://example.com",
    "https://example.com:8443/hook?team=a",
    "https://EXAMPLE.com/",
    "https://xn--exmple-cua.com/",
    "https://a_b.example.com/",
    "https://1.1.1.1/",
    "https://[2606:4700:4700::1111]/",
    "https://[::ffff:1.1.1.1]/",
    "https://[64:ff9b::101:101]/",
]


@pytest.mark.parametrize("url", FORBIDDEN)
def test_addresses_that_lead_elsewhere_are_refused(url: str) -> None:
    with pytest.raises(AddressError):
        AddressGuard().check_url(url)


@pytest.mark.parametrize("url", ALLOWED)
def test_public_addresses_are_allowed(url: str) -> None:
    AddressGuard().check_url(url)


def test_this_machine_is_allowed_in_development_only() -> None:
    guard = AddressGuard(allow_loopback=True)
    for url in ("http://127.0.0.1:9000/", "http://localhost/", "https://[::1]/"):
        guard.check_url(url)
    for url in ("http://1.1.1.1/", "http://10.0.0.1/", "https://10.0.0.1/", "https://0.0.0.0/"):
        with pytest.raises(AddressError):
            guard.check_url(url)


def test_a_list_of_hosts_leaves_out_all_others() -> None:
    guard = AddressGuard(["hooks.example.com", "*.corp.example", "10.1.2.3", "169.254.169.254"])
    for url in (
        "https://hooks.example.com/",
        "https://HOOKS.example.com/",
        "https://a.b.corp.example/",
        "https://10.1.2.3/",
    ):
        guard.check_url(url)
    for url in (
        "https://example.com/",
        "https://evil-hooks.example.com/",
        "https://corp.example/",
        "https://evilcorp.example/",
        "https://10.1.2.4/",
        "https://169.254.169.254/",
    ):
        with pytest.raises(AddressError):
            guard.check_url(url)


def connect(numbers: Sequence[str] | OSError) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        if isinstance(numbers, OSError):
            raise numbers
        return numbers

    backend = GuardedBackend(AddressGuard(), is_secure=True, resolve=resolve)
    asyncio.run(backend.connect_tcp("hooks.example.com", 9, timeout=5))


@pytest.mark.parametrize(
    "numbers",
    [
        ["127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["fe80::1%eth0"],
        ["1.1.1.1", "10.0.0.1"],
    ],
)
def test_a_name_that_stands_for_a_forbidden_number_is_not_connected_to(numbers: list[str]) -> None:
    with pytest.raises(AddressError) as caught:
        connect(numbers)
    assert not any(number in caught.value.detail for number in numbers)


@pytest.mark.parametrize("numbers", [OSError("no such name"), []])
def test_a_name_that_stands_for_nothing_gives_no_connection(numbers: list[str] | OSError) -> None:
    with pytest.raises(httpcore.ConnectError, match="hooks"):
        connect(numbers)


def test_named_hosts_may_be_private_but_never_more_special() -> None:
    guard = AddressGuard(["hooks.example.com"])
    for number in ("10.0.0.1", "192.168.0.1", "100.64.0.1", "fd00::1", "1.1.1.1"):
        guard.check_number("hooks.example.com", ipaddress.ip_address(number), is_secure=True)
    for number in ("127.0.0.1", "169.254.169.254", "fe80::1", "100.100.100.200", "224.0.0.1"):
        with pytest.raises(AddressError):
            guard.check_number("hooks.example.com", ipaddress.ip_address(number), is_secure=True)


def test_without_tls_a_name_may_stand_for_this_machine_only() -> None:
    guard = AddressGuard(allow_loopback=True)
    guard.check_number("hooks.example.com", ipaddress.ip_address("127.0.0.1"), is_secure=False)
    with pytest.raises(AddressError):
        guard.check_number("hooks.example.com", ipaddress.ip_address("1.1.1.1"), is_secure=False)


def test_another_peer_than_was_called_is_not_talked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class OtherPeer(httpcore.AsyncNetworkStream):
        def get_extra_info(self, info: str) -> tuple[str, int]:
            assert info == "server_addr"
            return ("127.0.0.1", 9)

        async def aclose(self) -> None:
            closed.append(True)

    async def connect_elsewhere(*_: object, **__: object) -> httpcore.AsyncNetworkStream:
        return OtherPeer()

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_elsewhere)
    with pytest.raises(AddressError, match="another address"):
        connect(["1.1.1.1"])
    assert closed == [True]
