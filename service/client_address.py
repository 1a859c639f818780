"""From where a request comes, if a proxy stands before us or not."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_IPV6_PREFIX = 64  # what one client has; it may choose any address within


def client_address(scope: Scope, trusted_proxies: Sequence[Network]) -> str:
    """The client's address; of IPv6 its network. Empty if there is none, as of a Unix socket.

    ``X-Forwarded-For`` counts only as far as it was written by trusted proxies: from its end up to
    the first address that is not one of theirs. What stands before that may be anybody's invention.
    """
    peer = scope.get("client")
    found = _parse(peer[0]) if peer else None
    forwarded = ",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")
    while found is not None and forwarded and _is_in(found, trusted_proxies):
        sent_by = _parse(forwarded.pop())
        if sent_by is None:
            break
        found = sent_by
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((found, _IPV6_PREFIX), strict=False))
    return "" if found is None else str(found)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_in(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Sequence[Network]
) -> bool:
    return any(address in network for network in networks)
