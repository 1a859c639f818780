import pytest
import torch

from merging.method import Geometry, get_method
from merging.ops.forms import LayerShape, adam_flops, cheapest, filter_flops
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference

FAMILY = ["wudi", "wudi_cfs", "swudi", "swudi_a", "swudi_soft"]


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (LayerShape(768, 768, 8), "gram"),
        (LayerShape(4096, 4096, 3), "gram"),
        (LayerShape(4096, 14336, 3), "gram"),
        (LayerShape(1024, 14336, 2), "rows"),
        (LayerShape(1, 4096, 8), "rows"),
    ],
)
def test_the_form_of_adam_is_the_one_with_fewer_operations(shape: LayerShape, form: str) -> None:
    flops = adam_flops(shape, 300)
    assert cheapest(flops) == form
    assert flops[form] == min(flops.values())  # type: ignore[index]


def test_steps_through_rows_pay_where_columns_exceed_twice_all_rows() -> None:
    for columns, form in ((3900, "gram"), (4200, "rows")):
        assert cheapest(adam_flops(LayerShape(512, columns, 4), 100_000)) == form


def test_a_filter_goes_through_rows_as_soon_as_they_are_fewer() -> None:
    assert cheapest(filter_flops(LayerShape(256, 1100, 4))) == "rows"
    assert cheapest(filter_flops(LayerShape(256, 1024, 4))) == "gram"
    assert "rows" not in filter_flops(LayerShape(256, 1024, 4))


@pytest.mark.parametrize("name", FAMILY)
def test_the_plan_counts_what_the_merge_reports(name: str) -> None:
    method = get_method(name)
    for shape, transposed in (((8, 100), False), ((40, 30), False), ((100, 8), True)):
        base, experts = make_models(shape, 3)
        figures: dict[str, object] = {}
        merge(name, base, experts, transposed=transposed, figures=figures)
        geometry = Geometry(shape, 3, transposed=transposed)
        assert figures["flops"] == method.cost(geometry, method.parameters()).flops
        assert figures["form"] == ("gram" if shape == (40, 30) else "rows")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", [(8, 100), (24, 80)])
def test_forms_agree(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = make_models(shape, 3, dtype=torch.float64, base_rms=0)
    results = []
    for form in ("gram", "rows"):
        monkeypatch.setattr("merging.ops.layers.cheapest", lambda _, form=form: form)
        figures: dict[str, object] = {}
        results.append(merge(name, base, experts, figures=figures))
        assert figures["form"] == form
    # An Adam step on a gradient that is 0 but for rounding has either sign.
    tolerance = 1e-6 if name == "wudi" else 1e-9
    assert relative_difference(results[0], results[1].numpy()) < tolerance


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_wudi_through_rows_follows_algorithm_1(num_experts: int) -> None:
    base, experts = make_models((6, 90), num_experts, dtype=torch.float64, base_rms=0, seed=3)
    vectors = oracle.task_vectors(base, experts)
    figures: dict[str, object] = {}
    merged = merge("wudi", base, experts, {"learning_rate": 1e-5}, figures=figures)
    assert figures["form"] == "rows"
    expected = oracle.wudi_update(vectors, steps=300, learning_rate=1e-5, epsilon=1e-8)
    if num_experts > 1:
        assert relative_difference(merged, expected) < 1e-7
