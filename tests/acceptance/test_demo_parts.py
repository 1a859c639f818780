"""The demo's recipes are ones that the service takes, and its figures mean what they say."""

from __future__ import annotations

import pytest

from examples.demo.corpus import BASE_KIND, EXPERT_KINDS
from examples.demo.recipes import MERGES, Merge
from merging.method import get_method
from merging.recipe import parse_recipe

pytest.importorskip("transformers")

BASE = {"python": 6.0, "cpp": 5.0, "json": 3.0, "english": 4.0}
EXPERTS = {
    "python": BASE | {"python": 5.0},
    "cpp": BASE | {"cpp": 3.0},
    "json": BASE | {"json": 2.5},
}


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.method)
def test_recipes_are_valid_and_merge_every_expert(merge: Merge) -> None:
    recipe = parse_recipe(merge.recipe("s3://bucket/models"))
    assert [entry.model for entry in recipe.models] == [
        f"s3://bucket/models/{kind}" for kind in EXPERT_KINDS
    ]
    assert (recipe.base_model is not None) == get_method(merge.method).needs_base
    assert not recipe.warnings


def test_gain_kept_is_the_share_of_the_experts_gains() -> None:
    from examples.demo.evaluate import gain_kept

    best = {kind: EXPERTS[kind][kind] for kind in EXPERT_KINDS}
    half = {kind: (BASE[kind] + best[kind]) / 2 for kind in EXPERT_KINDS}
    worse = {kind: 2 * BASE[kind] - best[kind] for kind in EXPERT_KINDS}
    kept = [gain_kept(BASE, EXPERTS, losses) for losses in (best, half, BASE, worse)]
    assert kept == pytest.approx([1.0, 0.5, 0.0, -1.0])


@pytest.mark.parametrize("merges", [{}, {"One": BASE, "Other": EXPERTS["cpp"]}])
def test_the_table_has_a_row_for_every_model_and_a_column_for_every_kind(
    merges: dict[str, dict[str, float]],
) -> None:
    from examples.demo.evaluate import results_table

    table = results_table(BASE, EXPERTS, merges)
    assert table.row_count == 1 + len(EXPERTS) + len(merges)
    headers = [column.header for column in table.columns]
    assert headers == ["model", *EXPERT_KINDS, BASE_KIND, "gain kept"]
