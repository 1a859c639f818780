from types import SimpleNamespace

import pytest

from merging.options import MergeOptions
from service.api.planning import with_defaults
from service.api.schemas import PlanRequest


@pytest.mark.parametrize(
    ("setting", "option", "used"), [(None, None, None), (8, None, 8), (8, 2, 2), (None, 2, 2)]
)
def test_options_go_before_what_the_service_counts_on(
    setting: int | None, option: int | None, used: int | None
) -> None:
    services = SimpleNamespace(
        settings=SimpleNamespace(workers_per_job=setting, statistics_uri=None)
    )
    request = PlanRequest(
        recipe={}, output_uri="/out", options=MergeOptions(workers=option, seed=3)
    )
    assert with_defaults(services, request).options == MergeOptions(workers=used, seed=3)


@pytest.mark.parametrize(
    ("setting", "option", "used"), [(None, None, None), ("/a", None, "/a"), ("/a", "/b", "/b")]
)
def test_statistics_are_kept_where_the_service_says_unless_options_do(
    setting: str | None, option: str | None, used: str | None
) -> None:
    settings = SimpleNamespace(workers_per_job=None, statistics_uri=setting)
    request = PlanRequest(recipe={}, output_uri="/out", options=MergeOptions(statistics_uri=option))
    found = with_defaults(SimpleNamespace(settings=settings), request)
    assert found.options == MergeOptions(statistics_uri=used)
