"""Random requests made from the OpenAPI document are answered as it says, and never by a crash."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    allow_header_conformance,
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.api import LiveApi

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    allow_header_conformance,
]


def check_operation(operation: Any, headers: dict[str, str]) -> None:
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS)

    check()


@pytest.mark.slow
def test_random_requests(api: LiveApi) -> None:
    document = schemathesis.openapi.from_dict(api.openapi)
    document.config.update(base_url=api.url)
    api.submit("for-lists")
    checked = 0
    for result in document.get_all_operations():
        operation = result.ok()
        check_operation(operation, dict(api.admin.headers))
        checked += 1
    assert checked > 20
