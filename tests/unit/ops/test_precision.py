import pytest
import torch

from merging.ops.adam import adam_on_problem
from merging.ops.gram_form import GramProblem
from merging.ops.precision import Precision, SplitProduct, float32_products, right_product
from tests.support.tensors import make_models, relative_difference


def test_split_products_are_far_better_than_bfloat16_and_write_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    X, A = torch.randn(40, 64, generator=generator), torch.randn(64, 48, generator=generator)
    exact = (X.double() @ A.double()).numpy()
    out = torch.empty(40, 48)
    product = SplitProduct(A, 40)
    product(X, out)
    assert relative_difference(out, exact) < 1e-5
    assert relative_difference((X.bfloat16() @ A.bfloat16()).float(), exact) > 1e-3
    product(2 * X, out)
    assert relative_difference(out, 2 * exact) < 1e-5


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cpu_multiplies_in_the_dtype_whatever_is_asked(
    precision: Precision, dtype: torch.dtype
) -> None:
    X, A = torch.ones(3, 4, dtype=dtype) / 3, torch.eye(4, dtype=dtype)
    out = torch.empty(3, 4, dtype=dtype)
    with float32_products(X.device, precision):
        assert torch.get_float32_matmul_precision() == "highest"
        right_product(A, 3, precision)(X, out)
    assert torch.equal(out, X)


def test_the_setting_of_the_process_is_put_back_even_after_an_error() -> None:
    def fail_inside() -> None:
        with float32_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(KeyError):
            fail_inside()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


class _SplitProblem(GramProblem):
    """Multiplies as ``high`` does on a GPU."""

    def half_gradient(self, rows, precision):
        multiply = SplitProduct(self.A, self.B[rows].shape[0])

        def half_gradient(M_rows, out):
            multiply(M_rows, out)
            out.sub_(self.B[rows])

        return half_gradient


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24)])
def test_split_products_keep_the_trajectory_of_adam(shape: tuple[int, int]) -> None:
    base, experts = make_models(shape, 4, base_rms=0, seed=3)
    split, exact = _SplitProblem(base), GramProblem(base.double())
    for expert in experts:
        split.accumulate(expert.clone())
        exact.accumulate(expert.double())
    for problem in (split, exact):
        adam_on_problem(problem.total, problem, steps=300, learning_rate=1e-5, epsilon=1e-8)
    assert relative_difference(split.total, exact.total.numpy()) < 1e-3
