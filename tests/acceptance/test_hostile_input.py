"""Weight files and requests made to do harm: refused in a sentence, with little memory and time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.acceptance.bad_input_cases import QUERY, WEIGHTS, Home
from tests.support.checkpoints import Family, raw_bytes
from tests.support.live_service import LiveService

MOST_BYTES = 64 << 20
"""What one refused request may allocate: a body, a header and their parsed forms, many times."""

QUICK = settings(
    max_examples=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Home:
    return Home(tmp_path_factory.mktemp("hostile") / "home", family.base.parent)


@pytest.fixture(scope="module")
def http(service: LiveService) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {service.token}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


@contextmanager
def little_memory() -> Iterator[None]:
    """The service runs in this process, so its allocations are seen."""
    tracemalloc.start(1)
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_BYTES, peak


def plan(http: httpx.Client, home: Home, weights: bytes) -> httpx.Response:
    (home.expert / WEIGHTS).write_bytes(weights)
    body = {"recipe": home.recipe, "output_uri": str(home.output)}
    with little_memory():
        return http.post("/v1/plans", json=body)


def is_refused(answer: httpx.Response) -> bool:
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert len(answer.content) < 1 << 20
    if answer.is_error:
        assert answer.json()["detail"]
    return answer.is_error


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HUGE = 1 << 62
FILES = {
    "empty": b"",
    "eight bytes": b"\xff" * 8,
    "claims exabytes of header": raw_bytes({}, length=HUGE),
    "claims a gigabyte of header": raw_bytes({}, length=1 << 30),
    "deep": raw_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep lists": raw_bytes(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "digits": raw_bytes(b'{"a":' + b"9" * 200_000 + b"}"),
    "huge shape": raw_bytes({QUERY: entry([HUGE, HUGE], [0, 4])}),
    "many dimensions": raw_bytes({QUERY: entry([1] * 100_000, [0, 4])}, bytes(4)),
    "huge offsets": raw_bytes({QUERY: entry([1], [HUGE, HUGE + 4])}),
    "negative": raw_bytes({QUERY: entry([-1], [-4, 0])}),
    "overlap": raw_bytes({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, bytes(4)),
    "floats": raw_bytes({QUERY: entry([1e308], [0.0, 1e400])}),
    "many tensors": raw_bytes({f"t{n}": entry([0], [0, 0]) for n in range(50_000)}),
    "control characters": raw_bytes({"a\x00\x1b[31m": entry([1], [0, 4])}, bytes(4)),
    "half of a pair": raw_bytes(b'{"\\ud800": 1}'),
    "pickle": b"\x80\x04\x95" + bytes(64),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_weight_file_is_refused(http: httpx.Client, home: Home, name: str) -> None:
    assert is_refused(plan(http, home, FILES[name]))


@QUICK
@given(data=st.data())
def test_damaged_headers_never_crash_the_service(
    http: httpx.Client, home: Home, family: Family, data: st.DataObject
) -> None:
    content = bytearray((family.experts[1] / WEIGHTS).read_bytes()[:8192])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    assert is_refused(plan(http, home, bytes(content)))


YAML = {
    "billion laughs": "a: &a [x, x]\n"
    + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}, *{chr(97 + n)}]\n"
        for n in range(20)
    ),
    "alias to itself": "a: &a [*a]",
    "tag": "!!python/object/apply:os.system ['true']",
    "tag in a value": "models: !!binary aGVsbG8=",
    "deep": "a: " + "[" * 10_000,
    "deep maps": "".join(f"{' ' * n}a:\n" for n in range(1000)),
    "digits": "a: " + "9" * 900_000,
    "documents": "---\na: 1\n" * 1000,
    "keys": "? [a, b]\n: 1",
    "many values": "a: [" + "1," * 400_000 + "1]",
    "long text": "merge_method: " + "x" * 900_000,
    "merge keys": "a: &a {b: 1}\nc: {<<: *a}",
    "control characters": 'merge_method: "\\0\\x1b[31m"',
}


@pytest.mark.parametrize("way", ["text", "body"])
@pytest.mark.parametrize("name", YAML)
def test_a_hostile_recipe_is_refused(http: httpx.Client, name: str, way: str) -> None:
    with little_memory():
        if way == "text":
            answer = http.post("/v1/recipes/validate", json={"recipe": YAML[name]})
        else:
            headers = {"Content-Type": "application/yaml"}
            answer = http.post("/v1/recipes/validate", content=YAML[name], headers=headers)
    if not is_refused(answer):
        assert answer.json()["is_valid"] is False
        assert answer.json()["errors"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"recipe": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"recipe": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"recipe": ' + b"9" * 900_000 + b"}",
        b'{"recipe": {"a": 1e999}}',
        b'{"recipe": {"models": [' + b"{}," * 300_000 + b"{}]}}",
        json.dumps({"recipe": {"k" * 500_000: 1}}).encode(),
        json.dumps({"recipe": {f"k{n}": n for n in range(50_000)}}).encode(),
    ],
    ids=["lists", "maps", "digits", "infinity", "many models", "long key", "many keys"],
)
def test_a_hostile_body_is_refused(http: httpx.Client, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    with little_memory():
        answer = http.post("/v1/recipes/validate", content=body, headers=headers)
    if not is_refused(answer):
        assert answer.json()["is_valid"] is False


NAMES = st.sampled_from(
    [
        "merge_method",
        "models",
        "model",
        "base_model",
        "parameters",
        "weight",
        "density",
        "filter",
        "value",
        "slices",
        "sources",
        "layer_range",
        "dtype",
        "out_dtype",
        "tokenizer",
        "x",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["ties", "wudi", "linear", "bfloat16", "/", "s3://", "file://%00", "hf://a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=25,
)


@QUICK
@given(recipe=st.dictionaries(NAMES, VALUES, max_size=6))
def test_random_recipes_never_crash_the_service(
    http: httpx.Client, tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]
) -> None:
    output = Path(tmp_path_factory.getbasetemp()) / "never"
    for path, more in (("/v1/recipes/validate", {}), ("/v1/plans", {"output_uri": str(output)})):
        content = json.dumps({"recipe": recipe, **more})
        headers = {"Content-Type": "application/json"}
        is_refused(http.post(path, content=content, headers=headers))
