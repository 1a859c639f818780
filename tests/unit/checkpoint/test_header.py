"""Safetensors headers: what is refused and in which words, and agreement with the reference."""

from __future__ import annotations

import contextlib
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from merging.checkpoint import header as header_module
from merging.checkpoint.header import (
    MAX_HEADER_BYTES,
    HeaderEntry,
    encode_header,
    parse_header,
    read_header,
)
from merging.dtypes import ITEM_SIZE, torch_dtype
from merging.errors import CheckpointError, StorageError
from merging.storage.base import ObjectStat
from tests.support.checkpoints import raw_bytes
from tests.support.memory_storage import MemoryStorage

URI = "mem://model/model.safetensors"


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(content: bytes, *, size: int | None = None) -> header_module.Header:
    storage = MemoryStorage()
    stat = storage.write_bytes(URI, content)
    return read_header(storage, ObjectStat(URI, size or stat.size, stat.version))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file has 0 bytes, at least 8 are needed"),
    "seven bytes": (b"\x00" * 7, "the file has 7 bytes, at least 8 are needed"),
    "length zero": (raw_bytes(b""), "is empty (length 0)"),
    "length beyond file": (raw_bytes(b"{}", length=3), "claims 3 bytes but the file has 10"),
    "length of all ones": (raw_bytes(b"{}", length=2**64 - 1), "claims 18446744073709551615"),
    "zip archive": (b"PK\x03\x04" + b"\x00" * 60 + b"\x7f" * 8, "claims"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "leading space": (raw_bytes(b" {}"), "starts with b' ' where '{' is expected"),
    "byte order mark": (raw_bytes(b"\xef\xbb\xbf{}"), "where '{' is expected"),
    "not utf-8": (raw_bytes(b'{"\xff": 1}'), "is not UTF-8 at byte 2"),
    "not json": (raw_bytes(b'{"a": }'), "is not valid JSON"),
    "cut short": (raw_bytes(b'{"a": {"dtype"'), "is not valid JSON"),
    "trailing text": (raw_bytes(b"{}{}"), "is not valid JSON"),
    "nested deeply": (raw_bytes(b'{"a":' + b"[" * 100_000), "is nested too deeply"),
    "nested almost too deeply": (
        raw_bytes(b'{"a":' + b"[" * 800 + b"]" * 800 + b"}"),
        "(Expected `object`, got `array`)",
    ),
    "not a number": (raw_bytes(b'{"a": NaN}'), "is not valid JSON"),
    "infinity": (raw_bytes(b'{"a": -Infinity}'), "is not valid JSON"),
    "endless integer": (raw_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "does not describe it by"),
    "key twice": (
        raw_bytes(
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            b' "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}',
            b"\x00",
        ),
        "has the key 'a' twice",
    ),
    "field twice": (
        raw_bytes(
            b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', b"\x00"
        ),
        "gives it other fields than dtype, shape and data_offsets, each once",
    ),
    "metadata a list": (
        raw_bytes({"__metadata__": []}),
        "The __metadata__ in the header of mem://model/model.safetensors has a value",
    ),
    "metadata null": (raw_bytes({"__metadata__": None}), "(Expected `object`, got `null`)"),
    "metadata of numbers": (
        raw_bytes({"__metadata__": {"format": 1}}),
        "(Expected `str`, got `int` - at `$[...]`)",
    ),
    "entry a list": (raw_bytes({"a": [1]}), "'a': the header of mem://model/model.safetensors"),
    "entry without fields": (raw_bytes({"a": {}}), "(Object missing required field `dtype`)"),
    "entry without offsets": (
        raw_bytes({"a": {"dtype": "U8", "shape": []}}),
        "(Object missing required field `data_offsets`)",
    ),
    "dtype null": (
        raw_bytes({"a": entry(None)}, b"\x00" * 8),
        "(Expected `str`, got `null` - at `$.dtype`)",
    ),
    "field that nobody knows": (
        raw_bytes({"a": entry() | {"scale": 2}}, b"\x00" * 8),
        "gives it other fields than dtype, shape and data_offsets, each once",
    ),
    "field twice in disguise": (
        raw_bytes(
            b'{"a": {"dtype": "U8", "dtyp\\u0065": "I8", "shape": [1], "data_offsets": [0, 1]}}',
            b"\x00",
        ),
        "gives it other fields than dtype, shape and data_offsets, each once",
    ),
    "key twice in disguise": (
        raw_bytes(
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            b' "\\u0061": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}',
            b"\x00",
        ),
        "has the key 'a' twice",
    ),
    "metadata key twice": (
        raw_bytes(b'{"__metadata__": {"format": "pt", "format": "tf"}}' + b" " * 60),
        "has the key 'format' twice",
    ),
    "metadata twice": (
        raw_bytes(b'{"__metadata__": {}, "__metadata__": {}}' + b" " * 60),
        "has the key '__metadata__' twice",
    ),
    "more keys than there is room for": (
        raw_bytes(b"{" + b",".join(b'"%d":{}' % n for n in range(30)) + b"}"),
        "has more than the 5 keys that it may have",
    ),
    "text that is not utf-8": (raw_bytes(b'{"a": {"x": "\xff"}}'), "is not UTF-8 at byte 13"),
    "empty name": (raw_bytes({"": entry()}, b"\x00" * 8), "names a tensor '', which is empty"),
    "endless name": (
        raw_bytes({"a" * 1001: entry()}, b"\x00" * 8),
        "which has 1001 characters; at most 1000 are allowed",
    ),
    "newline in name": (
        raw_bytes({"a\nb": entry()}, b"\x00" * 8),
        "names a tensor 'a\\nb', which has control or invisible characters",
    ),
    "direction mark in name": (raw_bytes({"a\u202eb": entry()}, b"\x00" * 8), "'a\\u202eb'"),
    "half a character in name": (raw_bytes({"a\ud800": entry()}, b"\x00" * 8), "is not valid JSON"),
    "shape a number": (
        raw_bytes({"a": entry(shape=2)}, b"\x00" * 8),
        "(Expected `array`, got `int` - at `$.shape`)",
    ),
    "negative shape": (
        raw_bytes({"a": entry(shape=[-2])}, b"\x00" * 8),
        "(Expected `int` >= 0 - at `$.shape[0]`)",
    ),
    "both shapes negative": (
        raw_bytes({"a": entry(shape=[-1, -2])}, b"\x00" * 8),
        "(Expected `int` >= 0 - at `$.shape[0]`)",
    ),
    "fractional shape": (
        raw_bytes({"a": entry(shape=[2.0])}, b"\x00" * 8),
        "(Expected `int`, got `float` - at `$.shape[0]`)",
    ),
    "boolean shape": (
        raw_bytes({"a": entry(shape=[True, 2])}, b"\x00" * 8),
        "(Expected `int`, got `bool` - at `$.shape[0]`)",
    ),
    "shape overflows": (
        raw_bytes({"a": entry(shape=[2**32, 2**32], offsets=[0, 8])}, b"\x00" * 8),
        "gives it shape [4294967296, 4294967296]: over 2**63 bytes",
    ),
    "shape overflows before a zero": (
        raw_bytes({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
        "gives it shape [1099511627776, 1099511627776, 0]: over 2**63 bytes",
    ),
    "shape overflows after a zero": (
        raw_bytes({"a": entry(shape=[0, 2**70], offsets=[0, 0])}),
        "(Expected `int` <= 9223372036854775807 - at `$.shape[1]`)",
    ),
    "shape wraps to the right size": (
        raw_bytes({"a": entry("U8", [2**62 + 2, 4], [0, 8])}, b"\x00" * 8),
        "gives it shape [4611686018427387906, 4]: over 2**63 bytes",
    ),
    "many dimensions": (
        raw_bytes({"a": entry(shape=[1] * 65, offsets=[0, 4])}, b"\x00" * 4),
        "(Expected `array` of length <= 64 - at `$.shape`)",
    ),
    "one offset": (
        raw_bytes({"a": entry(offsets=[0])}, b"\x00" * 8),
        "(Expected `array` of length 2 - at `$.data_offsets`)",
    ),
    "offsets as text": (
        raw_bytes({"a": entry(offsets="08")}, b"\x00" * 8),
        "(Expected `array`, got `str` - at `$.data_offsets`)",
    ),
    "fractional offset": (
        raw_bytes({"a": entry(offsets=[0, 8.0])}, b"\x00" * 8),
        "(Expected `int`, got `float` - at `$.data_offsets[1]`)",
    ),
    "negative offset": (
        raw_bytes({"a": entry(offsets=[-8, 0])}, b"\x00" * 8),
        "`int` >= 0 - at `$.data_offsets[0]`",
    ),
    "offsets reversed": (
        raw_bytes({"a": entry(offsets=[8, 0])}, b"\x00" * 8),
        "gives it data_offsets [8, 0], of which the end comes first",
    ),
    "offset beyond file": (
        raw_bytes({"a": entry()}, b"\x00" * 7),
        "puts its end at byte 8 of the data, but the file holds only 7 bytes of data",
    ),
    "offset beyond 64 bits": (
        raw_bytes({"a": entry(offsets=[0, 2**70])}, b"\x00" * 8),
        "(Expected `int` <= 9223372036854775807 - at `$.data_offsets[1]`)",
    ),
    "size too small": (
        raw_bytes({"a": entry(shape=[3])}, b"\x00" * 8),
        "gives it 8 bytes (offsets 0 to 8), but F32 of shape [3] takes 12",
    ),
    "size too large": (raw_bytes({"a": entry(shape=[1])}, b"\x00" * 8), "of shape [1] takes 4"),
    "overlap": (
        raw_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, b"\x00" * 12),
        "'b': the header of mem://model/model.safetensors lets it overlap tensor 'a' by 4 bytes",
    ),
    "same bytes twice": (
        raw_bytes({"a": entry(), "b": entry()}, b"\x00" * 8),
        "lets it overlap tensor 'a' by 8 bytes",
    ),
    "empty tensor inside another": (
        raw_bytes({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, b"\x00" * 8),
        "lets it overlap tensor 'a' by 4 bytes",
    ),
    "hole in the middle": (
        raw_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, b"\x00" * 20),
        "leaves a hole of 4 bytes after tensor 'a'",
    ),
    "hole at the start": (
        raw_bytes({"a": entry(offsets=[4, 12])}, b"\x00" * 12),
        "leaves a hole of 4 bytes after the header",
    ),
    "bytes left over": (raw_bytes({"a": entry()}, b"\x00" * 9), "1 are left over"),
    "bytes without tensors": (raw_bytes({}, b"\x00"), "1 are left over"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_in_clear_words(name: str) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(CheckpointError) as caught:
        read(content)
    assert message in caught.value.detail
    assert URI in caught.value.detail
    assert caught.value.code == "header_invalid"
    assert caught.value.context["uri"] == URI
    assert caught.value.retryable is False
    assert len(caught.value.detail) < 500


STRICTER = {
    "leading space",
    "key twice",
    "key twice in disguise",
    "field that nobody knows",
    "metadata key twice",
    "metadata null",
    "empty name",
    "endless name",
    "newline in name",
    "direction mark in name",
    "many dimensions",
}
"""What the reference library lets pass: it keeps one of two, or does not mind."""


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - STRICTER))
def test_what_is_refused_is_refused_by_the_reference_library_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name][0])
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_names_tensor_in_context() -> None:
    with pytest.raises(CheckpointError) as caught:
        read(raw_bytes({"a.weight": entry(shape=[3])}, b"\x00" * 8))
    assert caught.value.context == {"uri": URI, "tensor_name": "a.weight"}


@pytest.mark.parametrize(
    "dtype",
    ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"],
)
def test_real_dtype_that_is_not_read_is_named(dtype: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(raw_bytes({"a": entry(dtype, [8], [0, 8])}, b"\x00" * 8))
    assert caught.value.code == "dtype_unsupported"
    assert f"dtype '{dtype}', which is quantised or complex and not merged" in caught.value.detail


@pytest.mark.parametrize("dtype", ["F128", "f32", "F32 ", ""])
def test_invented_dtype_is_named(dtype: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(raw_bytes({"a": entry(dtype, [8], [0, 8])}, b"\x00" * 8))
    assert caught.value.code == "dtype_unsupported"
    assert f"dtype {dtype!r}, which is not one of safetensors" in caught.value.detail


def test_header_beyond_the_limit_is_refused_before_it_is_read() -> None:
    storage = MemoryStorage()
    content = (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * 70_000
    stat = storage.write_bytes(URI, content)
    with pytest.raises(CheckpointError, match="has 100000001 bytes; at most 100000000") as caught:
        read_header(storage, ObjectStat(URI, 10**12, stat.version))
    assert caught.value.code == "header_too_large"
    assert storage.bytes_read == 64 << 10


def test_short_header_is_one_request_and_long_header_two() -> None:
    for count, requests in ((10, 1), (2000, 2)):
        entries = [(f"layers.{number}.weight", "BF16", (3, 5)) for number in range(count)]
        storage = MemoryStorage()
        stat = storage.write_bytes(URI, encode_header(entries, {}) + bytes(30 * count))
        found = read_header(storage, stat)
        assert [(e.name, e.dtype, e.shape) for e in found.entries] == entries
        assert storage.requests["read_into"] == requests


def test_file_that_changed_since_it_was_listed_is_refused() -> None:
    storage = MemoryStorage()
    stat = storage.write_bytes(URI, encode_header([], {}))
    storage.write_bytes(URI, encode_header([], {}))
    with pytest.raises(StorageError) as caught:
        read_header(storage, stat)
    assert caught.value.code == "source_changed"


def test_entries_come_in_the_order_of_their_bytes_with_absolute_offsets() -> None:
    text = {
        "late": entry("F16", [2], [4, 8]),
        "empty": entry("F32", [0, 3], [4, 4]),
        "scalar": entry("I32", [], [0, 4]),
        "__metadata__": {"format": "pt"},
    }
    content = raw_bytes(text, bytes(8))
    start = len(content) - 8
    found = read(content)
    assert found.entries == (
        HeaderEntry("scalar", "I32", (), start, start + 4),
        HeaderEntry("empty", "F32", (0, 3), start + 4, start + 4),
        HeaderEntry("late", "F16", (2,), start + 4, start + 8),
    )
    assert found.metadata == {"format": "pt"}


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZE))
def test_every_dtype_that_is_read_agrees_with_the_reference_library(
    dtype: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    text = encode_header([("a", dtype, (3, 2))], {"format": "pt"})
    path.write_bytes(text + bytes(6 * ITEM_SIZE[dtype]))
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").dtype == torch_dtype(dtype)
    assert parse_header(text[8:], len(text), path.stat().st_size, "x").entries[0].dtype == dtype


def test_encoding_is_aligned_and_keeps_order() -> None:
    entries = [("b", "BF16", (1,)), ("a", "U8", (3,)), ("ü", "F32", ())]
    text = encode_header(entries, {"z": "1", "a": "2"})
    assert len(text) % 8 == 0
    assert text == encode_header(entries, {"a": "2", "z": "1"})
    document = json.loads(text[8:])
    assert list(document) == ["__metadata__", "b", "a", "ü"]
    assert document["ü"] == {"dtype": "F32", "shape": [], "data_offsets": [5, 9]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "'a' cannot be written: it is there twice"),
        ([("", "F32", (1,))], "'' cannot be written: it is empty"),
        ([("__metadata__", "F32", (1,))], "it is reserved"),
        ([("a\x00", "F32", (1,))], "it has control or invisible characters"),
        ([("a", "F4", (1,))], "has dtype 'F4'"),
    ],
)
def test_encoding_refuses_what_no_reader_accepts(entries: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encode_header(entries, {})


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
ENTRIES = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from(sorted(ITEM_SIZE)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    unique_by=lambda item: item[0],
    max_size=12,
)
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=10),
    st.text(st.characters(codec="utf-8"), max_size=10),
    max_size=4,
)


@settings(deadline=None)  # other work on the machine is no fault of ours
@given(entries=ENTRIES, metadata=METADATA)
def test_what_is_encoded_reads_back_here_and_in_the_reference_library(
    entries: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    text = encode_header(entries, metadata)
    data = bytes(header_data_size(entries))
    found = read(text + data)
    assert [(e.name, e.dtype, e.shape) for e in found.entries] == entries
    assert found.metadata == metadata
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(text + data)
        with safe_open(path, "pt") as file:
            assert sorted(file.keys()) == sorted(name for name, _, _ in entries)
            assert (file.metadata() or {}) == metadata
            for name, dtype, shape in entries:
                tensor = file.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(dtype), shape)


def header_data_size(entries: list[tuple[str, str, tuple[int, ...]]]) -> int:
    total = 0
    for _, dtype, shape in entries:
        count = 1
        for size in shape:
            count *= size
        total += count * ITEM_SIZE[dtype]
    return total


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "dtype", "shape"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["dtype", "shape", "data_offsets", "__metadata__", "a", string.printable]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)  # other work on the machine is no fault of ours
@given(document=st.dictionaries(st.text(max_size=6), JSON, max_size=4), data=st.binary(max_size=20))
def test_arbitrary_json_is_read_or_refused_but_never_crashes(document: Any, data: bytes) -> None:
    try:
        found = read(raw_bytes(document, data))
    except CheckpointError:
        return
    assert sum(e.end - e.start for e in found.entries) == len(data)


@settings(deadline=None)  # other work on the machine is no fault of ours
@given(content=st.binary(max_size=200), length=st.none() | st.integers(0, 300))
def test_arbitrary_bytes_are_read_or_refused_but_never_crash(
    content: bytes, length: int | None
) -> None:
    for forged in (content, raw_bytes(content, length=length), raw_bytes(b"{" + content)):
        with contextlib.suppress(CheckpointError):
            assert read(forged).entries == ()


@settings(deadline=None)  # other work on the machine is no fault of ours
@given(data=st.data())
def test_one_wrong_byte_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    content = bytearray(encode_header([("a.weight", "F32", (2, 3)), ("b", "U8", (4,))], {"k": "v"}))
    content += bytes(28)
    place = data.draw(st.integers(0, len(content) - 29))
    content[place] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(content))
    except CheckpointError:
        return
    assert found.entries[-1].end == len(content)
