"""Handlers that give everything that goes wrong in a request the shape of a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from merging.errors import MergeError
from service.problems import problem, problem_from_error, problem_response

_CODES_BY_STATUS = {
    404: "no_such_route",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


def install_error_handlers(app: FastAPI) -> None:
    """Replace the framework's own answers, also those to unknown routes."""
    app.add_exception_handler(MergeError, _on_merge_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


class RequestFacts(TypedDict):
    """What a problem says about the request that it answers."""

    instance: str
    request_id: str | None


def request_facts(request: Request) -> RequestFacts:
    """The facts of a request that has passed the middleware."""
    return {
        "instance": request.scope["path"],
        "request_id": getattr(request.state, "request_id", None),
    }


async def _on_merge_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MergeError)
    return problem_response(problem_from_error(error, **request_facts(request)))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES_BY_STATUS.get(error.status_code, "malformed_request")
    path = request.scope["path"]
    detail = {
        "no_such_route": f"There is nothing at {path}; see /openapi.json.",
        "method_not_allowed": f"{path} does not take {request.method}.",
        "malformed_request": "The body cannot be read as JSON in UTF-8.",
    }.get(code, f"{error.detail}.")
    headers = {"Allow": _allowed_methods(request)} if code == "method_not_allowed" else None
    return problem_response(problem(code, detail, **request_facts(request)), headers)


def _allowed_methods(request: Request) -> str:
    """All methods of an address; the router names only those of the first route that it meets."""
    path = getattr(request.scope.get("route"), "path", "")
    return ", ".join(sorted(map(str.upper, request.app.openapi()["paths"].get(path, ()))))


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    items = error.errors()
    if items and items[0]["type"] == "json_invalid":
        reason = items[0]["ctx"]["error"]
        detail = f"The body is not JSON: {reason} at character {items[0]['loc'][-1]}."
        return problem_response(problem("malformed_request", detail, **request_facts(request)))
    body_field = getattr(request.scope.get("route"), "body_field", None)
    model = body_field.field_info.annotation if body_field is not None else None
    faults = tuple(_fault(item, model) for item in items)
    detail = (
        faults[0]["detail"]
        if len(faults) == 1
        else f"{len(faults)} things are wrong with the request; see 'errors'."
    )
    code = "unknown_field" if all(f["code"] == "unknown_field" for f in faults) else None
    body = problem(code or "invalid_request", detail, errors=faults, **request_facts(request))
    return problem_response(body)


def _fault(item: Mapping[str, Any], model: Any) -> dict[str, str]:
    """One pydantic error, told by where it stands in the request."""
    place, *path = item["loc"]
    name = str(path[-1]) if path else str(place)
    code, detail = "invalid_request", f"{name}: {item['msg'].removeprefix('Value error, ')}."
    if item["type"] == "extra_forbidden":
        known = _field_names(model, path[:-1])
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known))}."
        code, detail = "unknown_field", f"Unknown field {name!r}.{hint}"
    elif item["type"] == "missing" and not path:
        detail = "The request needs a JSON body."
    where = {"parameter": name}
    if place == "body":
        where = {"pointer": "".join(f"/{_escape(part)}" for part in path)}
    return {**where, "code": code, "detail": detail}


def _escape(part: object) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _field_names(model: Any, path: Sequence[object]) -> list[str]:
    """Names of the fields of the model that stands at ``path`` in a body."""
    for part in path:
        fields = getattr(model, "model_fields", {})
        model = fields[part].annotation if part in fields else None
    is_model = isinstance(model, type) and issubclass(model, BaseModel)
    return list(model.model_fields) if is_model else []
