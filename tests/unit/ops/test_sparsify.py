import pytest
import torch

from merging.ops.sparsify import KeepRandom
from tests.support import oracle


def test_the_oracles_generator_gives_the_published_splitmix64_numbers() -> None:
    """First outputs for seed 0, as other implementations print them."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [oracle.splitmix64(i * gamma & oracle.MASK64) for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("offset", [0, 1, 12_345, 2**40 + 1])
def test_masks_depend_on_the_flat_index_alone(offset: int) -> None:
    def kept(first: int, count: int) -> list[float]:
        ones = torch.ones(count)
        keep = KeepRandom(
            [0.5], rescale=False, seed=3, tensor_name="w", offset=first, device=ones.device
        )
        keep(0, ones, 0)
        return ones.tolist()

    whole = kept(offset, 100)
    assert 20 < sum(whole) < 80
    for cut in (1, 2, 33):
        assert kept(offset, cut) + kept(offset + cut, 100 - cut) == whole
