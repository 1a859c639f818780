from types import SimpleNamespace
from typing import Any

import pytest

from merging.options import MergeOptions
from merging.recipe import parse_recipe
from service.api.planning import with_defaults
from service.api.schemas import PlanRequest

LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]}
LOT = {
    "merge_method": "lot",
    "base_model": "/base",
    "models": [{"model": "/a"}, {"model": "/b"}],
    "calibration": {"data": "/samples.jsonl"},
}


def options_with_defaults(
    recipe: dict[str, Any], given: MergeOptions, **settings: Any
) -> MergeOptions:
    services: Any = SimpleNamespace(
        settings=SimpleNamespace(**{"workers_per_job": None, "statistics_uri": None, **settings})
    )
    request = PlanRequest(recipe=recipe, output_uri="/out", options=given)
    return with_defaults(services, request, parse_recipe(recipe)).options


@pytest.mark.parametrize(
    ("setting", "option", "used"), [(None, None, None), (8, None, 8), (8, 2, 2), (None, 2, 2)]
)
def test_options_go_before_what_the_service_counts_on(
    setting: int | None, option: int | None, used: int | None
) -> None:
    given = MergeOptions(workers=option, seed=3)
    found = options_with_defaults(LINEAR, given, workers_per_job=setting)
    assert found == MergeOptions(workers=used, seed=3)


@pytest.mark.parametrize(
    ("setting", "option", "used"), [(None, None, None), ("/a", None, "/a"), ("/a", "/b", "/b")]
)
def test_statistics_are_kept_where_the_service_says_unless_options_do(
    setting: str | None, option: str | None, used: str | None
) -> None:
    given = MergeOptions(statistics_uri=option)
    found = options_with_defaults(LOT, given, statistics_uri=setting)
    assert found == MergeOptions(statistics_uri=used)


@pytest.mark.parametrize("method", ["linear", "regmean_plus_plus"])
def test_the_services_folder_is_not_for_merges_without_statistics_to_keep(method: str) -> None:
    recipe = LINEAR if method == "linear" else {**LOT, "merge_method": method}
    recipe = {k: v for k, v in recipe.items() if method == "linear" or k != "base_model"}
    assert options_with_defaults(recipe, MergeOptions(), statistics_uri="/a") == MergeOptions()
