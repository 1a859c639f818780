from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from merging.dtypes import ITEM_SIZE
from merging.plan.packing import data_bytes, pack, shard_header
from merging.plan.plan import Problem, Shard

dtypes = st.sampled_from(["BF16", "F32", "I64", "U8", "F64"])
tensors = st.lists(
    st.tuples(dtypes, st.lists(st.integers(0, 40), max_size=3), st.floats(0, 1e13)),
    min_size=1,
    max_size=60,
)


def problem(name: str, dtype: str, shape: tuple[int, ...], flops: float = 0.0) -> Problem:
    return Problem(name, shape, dtype, 0, None, (), flops=flops)


def uniform(count: int, num_bytes: int, flops: float = 0.0) -> list[Problem]:
    return [problem(f"layers.{i:05d}.weight", "U8", (num_bytes,), flops) for i in range(count)]


def sizes(shards: tuple[Shard, ...]) -> list[int]:
    return [shard.size for shard in shards]


def test_one_file_where_everything_fits() -> None:
    [shard] = pack(uniform(3, 1000), 10**6)
    assert shard.file_name == "model-00001-of-00001.safetensors"
    assert [p.tensor_name for p in shard.problems] == [f"layers.{i:05d}.weight" for i in range(3)]


def test_no_problems_make_no_files() -> None:
    assert pack([], 10**6) == ()


def test_files_are_named_in_order_with_their_number() -> None:
    shards = pack(uniform(10, 1000), 4000)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert shards[0].file_name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert shards[-1].file_name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"


def test_files_are_even_rather_than_full() -> None:
    found = sizes(pack(uniform(110, 100_000), 5_100_000))
    assert len(found) == 3
    assert max(found) - min(found) <= 200_000


def test_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    problems = [*uniform(2, 100), problem("embed", "U8", (9000,)), problem("z", "U8", (100,))]
    names = [[p.tensor_name for p in shard.problems] for shard in pack(problems, 4000)]
    assert names == [["layers.00000.weight", "layers.00001.weight"], ["embed"], ["z"]]


def test_costly_work_is_spread_over_more_files() -> None:
    shards = pack(uniform(64, 100, flops=1e13), 10**9)
    assert len(shards) == 32
    assert {shard.flops for shard in shards} == {2e13}


def test_cheap_work_is_not_spread() -> None:
    assert len(pack(uniform(64, 100, flops=1e9), 10**9)) == 1


def test_one_costly_tensor_stands_alone() -> None:
    problems = [*uniform(4, 10, flops=1e12), problem("x", "U8", (10,), flops=1e15)]
    assert [p.tensor_name for p in pack(problems, 10**9)[-1].problems] == ["x"]


@given(tensors, st.integers(1024, 100_000))
def test_files_hold_every_tensor_once_in_order_and_within_the_limit(
    drawn: list[tuple[str, list[int], float]], limit: int
) -> None:
    problems = [problem(f"t{i}.weight", d, tuple(s), f) for i, (d, s, f) in enumerate(drawn)]
    shards = pack(problems, limit)
    flops_limit = max(sum(p.flops for p in problems) / 32, 1e12)
    packed = [sorted(shard.problems, key=problems.index) for shard in shards]
    assert [p for shard in packed for p in shard] == problems
    for shard in shards:
        assert shard.size == len(shard_header(shard.problems)) + sum(
            map(data_bytes, shard.problems)
        )
        if len(shard.problems) > 1:
            assert shard.size <= limit
            assert shard.flops <= flops_limit * (1 + 1e-9)


@given(tensors)
def test_every_tensor_is_aligned_to_its_entry_size(
    drawn: list[tuple[str, list[int], float]],
) -> None:
    problems = [problem(f"t{i}.weight", d, tuple(s), f) for i, (d, s, f) in enumerate(drawn)]
    for shard in pack(problems, 10_000):
        raw = shard_header(shard.problems)
        header = json.loads(raw[8:])
        for p in shard.problems:
            begin, end = header[p.tensor_name]["data_offsets"]
            assert (len(raw) + begin) % ITEM_SIZE[p.dtype] == 0
            assert end - begin == data_bytes(p)
