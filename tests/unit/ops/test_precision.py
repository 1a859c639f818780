import pytest
import torch

from merging.ops.adam import adam_on_problem
from merging.ops.gram_form import GramProblem
from merging.ops.precision import Precision, SplitProduct, float32_products, right_product
from tests.support.tensors import make_models, merge, relative_difference


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


def test_torch_multiplies_bfloat16_into_float32() -> None:
    """The call that ``high`` makes on a GPU, as far as its form can be checked without one."""
    left = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    right = torch.empty(6, 5, dtype=torch.bfloat16, device="meta")
    out = torch.empty(4, 5, device="meta")
    assert torch.mm(left, right, out_dtype=torch.float32, out=out).dtype == torch.float32


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "parameters", "tolerance"),
    [
        ("wudi", {}, 1e-4),
        ("wudi", {"precision": "high"}, 1e-3),
        ("wudi", {"precision": "medium"}, 1e-2),
        ("swudi_soft", {}, 1e-4),
        ("swudi_soft", {"precision": "high"}, 1e-3),
        ("swudi_a", {}, 1e-3),
        ("wudi_cfs", {}, 1e-4),
        ("optmerge", {}, 1e-3),
    ],
)
@pytest.mark.parametrize("shape", [(256, 256), (64, 1024)])
def test_a_gpu_gives_what_float64_gives(
    name: str, parameters: dict[str, str], tolerance: float, shape: tuple[int, int]
) -> None:
    base, experts = make_models(shape, 4, base_rms=0, seed=3)
    expected = merge(name, base.double(), [expert.double() for expert in experts], parameters)
    merged = merge(name, base.cuda(), [expert.cuda() for expert in experts], parameters)
    assert merged.is_cuda
    assert relative_difference(merged.cpu(), expected.numpy()) < tolerance
