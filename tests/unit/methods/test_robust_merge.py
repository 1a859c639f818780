import numpy as np
import pytest
import torch

from merging.ops.low_rank import Adapter
from tests.support import oracle
from tests.support.tensors import make_models, merge, relative_difference


def _adapters(
    *ranks: int, scaling: float = 0.5, dtype: torch.dtype = torch.float64
) -> list[Adapter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Adapter(
            torch.randn((48, rank), generator=generator, dtype=dtype),
            torch.randn((rank, 64), generator=generator, dtype=dtype),
            scaling,
        )
        for rank in ranks
    ]


def _merge(base: torch.Tensor, adapters: list[Adapter], **parameters: float) -> torch.Tensor:
    return merge("robust_merge", base, adapters, parameters)  # type: ignore[arg-type] # it takes both


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "parameters", [{}, {"density": 0.5, "quantile": 0.3, "gain": 1.0, "scale": 0.7}]
)
def test_equals_the_formula(
    parameters: dict[str, float], dtype: torch.dtype, tolerance: float
) -> None:
    adapters = _adapters(8, 8, 8, dtype=dtype)
    merged = _merge(torch.zeros(48, 64, dtype=dtype), adapters, **parameters)
    settings = {"density": 0.2, "quantile": 0.8, "gain": 2.0} | parameters
    scale = settings.pop("scale", 1.0)
    expected = scale * oracle.robust_merge(
        [(0.5 * a.up.double().numpy(), a.down.double().numpy()) for a in adapters], **settings
    )
    assert relative_difference(merged, expected) < tolerance


def test_an_adapter_has_no_say_in_rows_that_it_lacks() -> None:
    short, long = _adapters(3, 8)
    base = torch.zeros(48, 64, dtype=torch.float64)
    untrimmed = {"density": 1.0, "gain": 1.0}
    merged = _merge(base, [short, long], **untrimmed)
    mean = (short.up + long.up[:, :3]) / 2
    expected = 0.5 * (mean @ (short.down + long.down[:3]) + long.up[:, 3:] @ long.down[3:])
    torch.testing.assert_close(merged, expected)


def test_an_adapter_that_leaves_the_layer_alone_changes_nothing() -> None:
    adapters = _adapters(4, 4)
    base = torch.zeros(48, 64, dtype=torch.float64)
    nothing = Adapter(torch.zeros(48, 0), torch.zeros(0, 64))
    torch.testing.assert_close(_merge(base, [*adapters, nothing]), _merge(base, adapters))


def test_transposed_tensors_are_merged_as_their_transpose() -> None:
    adapters = _adapters(4, 4)
    base = torch.zeros(48, 64, dtype=torch.float64)
    turned = [adapter.transpose() for adapter in adapters]
    stored = merge("robust_merge", base.t().contiguous(), turned, transposed=True)  # type: ignore[arg-type] # it takes both
    torch.testing.assert_close(stored.t(), _merge(base, adapters))


def test_a_whole_checkpoint_is_factored_by_its_largest_singular_values() -> None:
    base, [expert] = make_models((24, 40), 1, dtype=torch.float64, base_rms=0)
    merged = merge("robust_merge", base, [expert], {"rank": 5, "density": 1.0, "gain": 1.0})
    U, S, Vt = np.linalg.svd(expert.numpy(), full_matrices=False)
    assert relative_difference(merged, U[:, :5] @ np.diag(S[:5]) @ Vt[:5]) < 1e-9
