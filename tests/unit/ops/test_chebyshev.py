import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval

from merging.ops.chebyshev import (
    expand_function,
    exponential,
    interval_end,
    largest_eigenvalue,
    momentum_descent,
)
from merging.ops.forms import exponential_degree


def _with_eigenvalues(values: np.ndarray) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    return basis @ torch.diag(torch.from_numpy(values)) @ basis.t()


SPECTRA = {
    "one far above": np.r_[1.0, np.full(199, 1e-3)],
    "all equal": np.full(200, 0.02),
    "evenly spread": np.linspace(0, 1, 200),
    "falling slowly": 1 / np.sqrt(np.arange(1, 201)),
    "rank one": np.r_[2.0, np.zeros(199)],
    "two columns": np.array([0.5, 0.5]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_interval_holds_all_eigenvalues_and_little_more(name: str) -> None:
    values = SPECTRA[name]
    A = _with_eigenvalues(values)
    assert 0.93 * values.max() <= largest_eigenvalue(A) <= values.max() * (1 + 1e-9)
    assert values.max() <= interval_end(A) <= 1.11 * values.max()


@pytest.mark.parametrize("t", [1e-3, 1.0, 40.0, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_the_polynomial_is_the_function(t: float, dtype: torch.dtype, tolerance: float) -> None:
    g = exponential(t)
    values = np.linspace(0, 0.7, 1001)
    found = chebval(2 * values / 0.7 - 1, expand_function(g, 0.7, dtype))
    assert np.abs(found - g(values)).max() < tolerance * t


@pytest.mark.parametrize("scaled_time", [5, 40, 300, 3000])
def test_the_degree_is_as_planned(scaled_time: float) -> None:
    degree = len(expand_function(exponential(scaled_time), 1.0, torch.float32)) - 1
    assert 0.7 * exponential_degree(scaled_time) - 3 <= degree <= exponential_degree(scaled_time)


def test_the_exponential_is_the_flow_of_a_scalar() -> None:
    values = np.array([0.0, 1e-9, 0.3, 2.0])
    expected = [5.0, (1 - np.exp(-5e-9)) / 1e-9, (1 - np.exp(-1.5)) / 0.3, (1 - np.exp(-10)) / 2]
    np.testing.assert_allclose(exponential(5.0)(values), expected, rtol=1e-7)


def test_descent_is_torchs_sgd_on_a_scalar() -> None:
    for curvature in (0.0, 0.2, 1.5):
        x = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.05, momentum=0.9)
        for _ in range(25):
            optimizer.zero_grad()
            (curvature * x * x - 2 * x).backward()
            optimizer.step()
        found = momentum_descent(25, 0.05, 0.9)(np.array([curvature]))
        np.testing.assert_allclose(found, float(x.detach()), rtol=1e-12)
