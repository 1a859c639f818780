"""One file, one method; and the registry costs planners no numerics."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import merging.methods
from merging.errors import RecipeError
from merging.method import all_methods, get_method, register

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in Path(merging.methods.__path__[0]).glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_registers_one_method_of_its_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "register"
    ]
    assert len(calls) == 1
    method = get_method(path.stem)
    function = method.layer.solve if method.layer else method.merge
    assert function.__module__ == f"merging.methods.{path.stem}"


def test_no_method_comes_from_elsewhere() -> None:
    assert sorted(all_methods()) == [path.stem for path in FILES]


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_each_method_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    method = all_methods()[name]
    assert method.name == name
    assert method.title
    assert method.summary.endswith(".")
    assert "arXiv:" in method.source
    for model in (method.parameters, method.expert_parameters):
        for field_name, field in model.model_fields.items():
            assert field.description, f"{name}.{field_name} has no description"


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_each_method_has_its_own_tests(name: str) -> None:
    assert (ROOT / "tests" / "unit" / "methods" / f"test_{name}.py").is_file()


def test_exactly_one_method_is_recommended() -> None:
    assert [name for name, method in all_methods().items() if method.recommended] == ["swudi_a"]


def test_listing_methods_and_their_costs_needs_no_torch() -> None:
    program = """
import sys
from merging.method import Geometry, all_methods
for method in all_methods().values():
    method.describe()
    method.cost(Geometry((8, 8), 2), method.parameters())
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'linear' is registered twice"):
        register(get_method("linear"))


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(RecipeError, match="Did you mean ties") as raised:
        get_method("tie")
    assert raised.value.code == "unknown_method"
