"""The merge methods, as they declare themselves."""

from __future__ import annotations

from fastapi import APIRouter

from merging.errors import RecipeError
from merging.method import all_methods, get_method
from service.api.deps import guarded
from service.api.objects import MethodObject, Page
from service.auth import Scope
from service.problems import RequestError

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("", operation_id="methods.list", **guarded(Scope.JOBS_READ))
def list_methods() -> Page[MethodObject]:
    """All methods with JSON Schemas of their parameters."""
    data = [MethodObject.model_validate(method.describe()) for method in all_methods().values()]
    return Page(data=data)


@router.get("/{name}", operation_id="methods.get", **guarded(Scope.JOBS_READ))
def read_method(name: str) -> MethodObject:
    """One method."""
    try:
        return MethodObject.model_validate(get_method(name).describe())
    except RecipeError as error:
        raise RequestError(error.detail, code="not_found") from None
