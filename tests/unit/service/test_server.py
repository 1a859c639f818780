from __future__ import annotations

import socket

import pytest

from merging.errors import MergeError
from service.server import address_of, bind


def test_port_zero_takes_a_free_one() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener, "/merge") == f"http://127.0.0.1:{port}/merge"


def test_a_socket_that_answers_without_delay_names_its_protocol() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_an_address_of_all_interfaces_is_shown_as_one_that_can_be_opened() -> None:
    with bind("0.0.0.0", 0) as listener:
        assert address_of(listener).startswith("http://127.0.0.1:")


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_address_is_shown_in_brackets() -> None:
    with bind("::1", 0) as listener:
        assert address_of(listener).startswith("http://[::1]:")


def test_a_port_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MergeError) as caught:
            bind("127.0.0.1", port)
    assert f"port {port}: another process listens there" in caught.value.detail


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(MergeError) as caught:
        bind("192.0.2.1", 0)
    assert "192.0.2.1" in caught.value.detail
