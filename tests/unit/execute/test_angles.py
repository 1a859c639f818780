"""Methods that go by angles, with tensors that are several times larger than the memory budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import NumericalError
from merging.local_run import run_plan
from merging.method import get_method
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family, tune, write_checkpoint
from tests.support.merges import load_merged
from tests.unit.execute.test_streaming import resident_bytes

MiB = 1 << 20
EMBEDDING = "model.embed_tokens.weight"

CASES: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "nuslerp, rows": {"nuslerp_flatten": False},
    "nuslerp, columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "model_stock, rows": {"filter_wise": True},
}
BUDGETS = {torch.bfloat16: ["20MiB", "24MiB"], torch.float64: ["40MiB", "48MiB"]}
METHODS = sorted({case.partition(",")[0] for case in CASES})


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Family]:
    """With embeddings of 3 million entries."""
    folder = tmp_path_factory.mktemp("models")
    return {
        dtype: make_family(
            folder / str(dtype), num_experts=3, vocab=12_288, hidden=256, layers=1, dtype=dtype
        )
        for dtype in (torch.bfloat16, torch.float64)
    }


def plan(folder: Path, models: list[Path], case: str, output: str, **options: Any) -> Plan:
    """The merge of experts, after the base, by one of the methods."""
    method = get_method(case.partition(",")[0])
    base, *experts = models
    document = {
        "merge_method": method.name,
        "models": [{"model": str(path)} for path in experts[: method.max_experts]],
        "parameters": CASES[case],
    }
    if method.needs_base or method.optional_base:
        document["base_model"] = str(base)
    return make_plan(
        parse_recipe(document), open_storage(), MergeOptions(**options), str(folder / output)
    )


def steps(plan: Plan) -> dict[str, set[str]]:
    """The tensors of every step of the method."""
    found: dict[str, set[str]] = {}
    for shard in plan.shards:
        for problem in shard.problems:
            found.setdefault(plan.settings[problem.setting].step, set()).add(problem.tensor_name)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bits_and_figures_do_not_depend_on_the_budget(
    case: str, dtype: torch.dtype, families: dict[torch.dtype, Family], tmp_path: Path
) -> None:
    family = families[dtype]
    models = [family.base, *family.experts]
    whole = plan(tmp_path, models, case, "whole")
    assert set(steps(whole)) == {""}
    expected = run_plan(whole, open_storage())
    for number, budget in enumerate(BUDGETS[dtype]):
        tiled = plan(tmp_path, models, case, str(number), memory_budget=budget)
        assert steps(tiled)["inner-products"] == steps(tiled)["finish"]
        assert steps(tiled)["finish"] >= {EMBEDDING, "lm_head.weight"}
        report = run_plan(tiled, open_storage())
        assert tiled.totals.max_host_bytes <= tiled.memory_budget
        assert report["peak_buffer_bytes"] <= tiled.memory_budget
        assert report["bytes_read"] == tiled.totals.bytes_read
        for found, one in zip(report["tensors"], expected["tensors"], strict=True):
            assert {**found, "seconds": 0} == {**one, "seconds": 0}
        merged = load_merged(tmp_path / str(number))
        for name, tensor in load_merged(tmp_path / "whole").items():
            assert torch.equal(merged[name], tensor), name


def test_only_what_does_not_fit_is_read_twice(
    families: dict[torch.dtype, Family], tmp_path: Path
) -> None:
    family = families[torch.bfloat16]
    models = [family.base, *family.experts]
    whole = plan(tmp_path, models, "karcher", "whole")
    tiled = plan(tmp_path, models, "karcher", "tiled", memory_budget="16MiB")
    embeddings = 2 * 3 * family.base_state[EMBEDDING].numel() * 2
    products = 2 * 8 * 3 * 3
    assert tiled.totals.bytes_read == whole.totals.bytes_read + embeddings + products


def test_variants_share_the_pass_that_finds_inner_products(
    families: dict[torch.dtype, Family], tmp_path: Path
) -> None:
    family = families[torch.bfloat16]
    document = {
        "merge_method": "slerp",
        "base_model": str(family.base),
        "models": [{"model": str(family.experts[0])}],
        "sweep": [{"name": f"t-{t}", "parameters": {"t": t}} for t in (0.2, 0.7)],
    }
    for budget in ("1GiB", "16MiB"):
        options = MergeOptions(memory_budget=budget)
        output = str(tmp_path / budget)
        found = make_plan(parse_recipe(document), open_storage(), options, output)
        run_plan(found, open_storage())
    assert [shard.num_files for shard in found.shards] == [1, 2]
    for name in ("t-0.2", "t-0.7"):
        whole = load_merged(tmp_path / "1GiB" / name)
        tiled = load_merged(tmp_path / "16MiB" / name)
        assert all(torch.equal(tensor, tiled[key]) for key, tensor in whole.items())


def test_an_error_between_the_passes_names_the_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(1 << 20, 4, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / str(number) for number in range(5)]
    for path, sign in zip(paths, (0, 1, 1, -1, -1), strict=True):
        write_checkpoint(path, {EMBEDDING: sign * tensor})
    tiled = plan(tmp_path, paths, "multislerp", "out", memory_budget="24MiB")
    assert "finish" in steps(tiled)
    with pytest.raises(NumericalError, match=EMBEDDING):
        run_plan(tiled, open_storage())


def merge_and_print_peak(folder: str, case: str, budget: str) -> None:
    """What the process below does: prints by how many bytes merging raised its peak."""
    torch.set_num_threads(1)
    models = [Path(folder) / name for name in ("base", "first", "second")]
    found = plan(Path(folder), models, case, "merged", memory_budget=int(budget))
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch keeps from its first product on
    before = resident_bytes("VmRSS")
    run_plan(found, open_storage())
    print(resident_bytes("VmHWM") - before)  # noqa: T201


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", METHODS)
def test_the_process_stays_within_a_budget_smaller_than_one_tensor(
    case: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {EMBEDDING: torch.randn(49_152, 1024, generator=generator).bfloat16()}
    write_checkpoint(tmp_path / "base", base)
    for number, name in enumerate(("first", "second")):
        write_checkpoint(tmp_path / name, tune(base, seed=number))
    budget = 48 * MiB
    assert base[EMBEDDING].numel() * 2 == 2 * budget
    program = (
        "import sys; from tests.unit.execute.test_angles import merge_and_print_peak as run;"
        " run(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), case, str(budget)],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.2 * budget
