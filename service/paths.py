"""Addresses as routes see them."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path without the prefix under which a proxy publishes us; it may be off already."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root else path


def route_template(scope: Scope) -> str | None:
    """The route that answered, as ``/v1/jobs/{job_id}``; None if none did."""
    found = getattr(scope.get("route"), "path", None) or scope["state"].get("route")
    return None if found is None else str(found)
