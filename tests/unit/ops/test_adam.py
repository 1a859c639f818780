import pytest
import torch

from merging.ops.adam import adam_on_quadratic


def _problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    M, B, root = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, columns), (rows, columns), (columns, columns))
    )
    return M, root.t() @ root / columns, B


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
@pytest.mark.parametrize("epsilon", [1e-8, 0.5])
def test_takes_the_steps_of_torchs_adam(steps: int, epsilon: float) -> None:
    M, A, B = _problem(7, 5)
    expected = torch.nn.Parameter(M.clone())
    adam = torch.optim.Adam([expected], lr=0.01, eps=epsilon)
    for _ in range(steps):
        adam.zero_grad()
        ((expected @ A * expected).sum() - 2 * (expected * B).sum()).backward()
        adam.step()
    adam_on_quadratic(M, A, B, steps=steps, learning_rate=0.01, epsilon=epsilon)
    torch.testing.assert_close(M, expected.detach(), rtol=1e-12, atol=1e-12)


def test_solves_rows_in_blocks_of_which_the_last_may_be_short() -> None:
    whole, A, B = _problem(10, 5)
    blocked = whole.clone()
    adam_on_quadratic(whole, A, B, steps=20, learning_rate=0.01, epsilon=1e-8)
    adam_on_quadratic(blocked, A, B, steps=20, learning_rate=0.01, epsilon=1e-8, row_block=4)
    torch.testing.assert_close(blocked, whole, rtol=1e-12, atol=1e-12)
