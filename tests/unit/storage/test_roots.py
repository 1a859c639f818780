"""Addresses that try to leave the storage roots, and addresses that mean two things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merging.errors import StorageError
from merging.storage.base import Storage
from merging.storage.router import open_storage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a model, beside one that must not be reached."""
    for name in ("models", "models-of-others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    return tmp_path / "models"


@pytest.fixture
def storage(root: Path) -> Storage:
    return open_storage([str(root), "s3://bucket/models"])


def _code(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value.code


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/models",
        "s3://bucket/models/",
        "s3://bucket/models/a/b.safetensors",
        "S3://bucket/models/a",
        "s3://bucket/models/a b+ü%41",
        "s3://bucket/models/...",
        "s3://bucket/models/a..b",
    ],
)
def test_s3_addresses_below_a_root_are_allowed(storage: Storage, uri: str) -> None:
    assert storage.normalise(uri) == "s3" + uri[2:].rstrip("/")


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("s3://bucket", "uri_not_allowed"),
        ("s3://bucket/", "uri_not_allowed"),
        ("s3://bucket/other", "uri_not_allowed"),
        ("s3://bucket/models-of-others/a", "uri_not_allowed"),
        ("s3://bucket/model", "uri_not_allowed"),
        ("s3://bucket/Models/a", "uri_not_allowed"),
        ("s3://bucket-2/models/a", "uri_not_allowed"),
        ("s3://bucket.evil/models/a", "uri_not_allowed"),
        ("s3://Bucket/models/a", "bad_uri"),
        ("s3://b/models/a", "bad_uri"),
        ("s3://bu..cket/models/a", "bad_uri"),
        ("s3:///bucket/models", "bad_uri"),
        ("s3:bucket/models", "bad_uri"),
        ("s3:/bucket/models", "bad_uri"),
        ("s3://bucket//models/a", "bad_uri"),
        ("s3://bucket/models//a", "bad_uri"),
        ("s3://bucket/models/../other", "bad_uri"),
        ("s3://bucket/models/./a", "bad_uri"),
        ("s3://bucket/models/%2e%2e/other", "bad_uri"),
        ("s3://bucket/models/.%2E/other", "bad_uri"),
        ("s3://bucket/models/%252e%252e/other", "bad_uri"),
        ("s3://bucket/models/..%2fother", "bad_uri"),
        ("s3://bucket/models/..%5cother", "bad_uri"),
        ("s3://bucket/models\\..\\other", "bad_uri"),
        ("s3://bucket/models/a?versionId=1", "bad_uri"),
        ("s3://bucket/models/a#fragment", "bad_uri"),
        ("s3://key:secret@bucket/models/a", "bad_uri"),
        ("s3://bucket:9000/models/a", "bad_uri"),
        ("s3://bucket@evil/models/a", "bad_uri"),
        ("s3://bucket/models/a\0b", "bad_uri"),
        ("s3://bucket/models/a\nb", "bad_uri"),
        ("s3://bucket/models/a\x85b", "bad_uri"),
        ("s3://bucket/models/\ud800", "bad_uri"),
        ("s3://bucket/models/" + "k" * 1024, "bad_uri"),
        ("", "bad_uri"),
        ("http://bucket/models/a", "bad_uri"),
        ("hf://org/model", "bad_uri"),
        (" s3://bucket/models/a", "bad_uri"),
    ],
)
def test_s3_addresses_outside_or_ambiguous_are_refused(
    storage: Storage, uri: str, code: str
) -> None:
    assert _code(lambda: storage.normalise(uri)) == code


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{root}-of-others/config.json", "uri_not_allowed"),
        ("{parent}", "uri_not_allowed"),
        ("/", "uri_not_allowed"),
        ("/etc/passwd", "uri_not_allowed"),
        ("//etc/passwd", "uri_not_allowed"),
        ("config.json", "uri_not_allowed"),
        ("{root}/../models-of-others/config.json", "bad_uri"),
        ("{root}/..", "bad_uri"),
        ("../models/config.json", "bad_uri"),
        ("file://{root}/../models-of-others/config.json", "bad_uri"),
        ("file://{root}/%2e%2e/models-of-others/config.json", "bad_uri"),
        ("file://{root}/..%2fmodels-of-others/config.json", "bad_uri"),
        ("file://{root}/a%00b", "bad_uri"),
        ("file://host{root}/config.json", "bad_uri"),
        ("file://localhost{root}/config.json", "bad_uri"),
        ("file:{root}/config.json", "bad_uri"),
        ("file://{root}/config.json?x", "bad_uri"),
        ("file://{root}/config.json#x", "bad_uri"),
        ("{root}/a\0b", "bad_uri"),
    ],
)
def test_local_addresses_outside_or_ambiguous_are_refused(
    storage: Storage, root: Path, template: str, code: str
) -> None:
    uri = template.format(root=root, parent=root.parent)

    assert _code(lambda: storage.normalise(uri)) == code


@pytest.mark.parametrize(
    "template",
    [
        "{root}/config.json",
        "{root}//./config.json",
        "file://{root}/config%2Ejson",
        "FILE://{root}/config.json",
    ],
)
def test_local_addresses_below_a_root_are_allowed(
    storage: Storage, root: Path, template: str
) -> None:
    assert storage.normalise(template.format(root=root)) == f"{root}/config.json"
    assert storage.read_bytes(template.format(root=root), limit=100) == b"models"


def test_every_operation_is_checked(storage: Storage, root: Path) -> None:
    inside, outside = f"{root}/config.json", f"{root}-of-others/config.json"
    version = storage.stat(inside).version

    calls: list[Callable[[], object]] = [
        lambda: storage.normalise(outside),
        lambda: storage.stat(outside),
        lambda: storage.list(f"{root}-of-others"),
        lambda: storage.read_into(outside, 0, memoryview(bytearray(1)), version="v"),
        lambda: storage.read_bytes(outside, limit=10),
        lambda: storage.write_bytes(outside, b"x"),
        lambda: storage.open_writer(outside, 1),
        lambda: storage.copy(inside, outside, version=version),
        lambda: storage.copy(outside, inside, version="v"),
        lambda: storage.delete(outside),
        lambda: storage.remove_folder(outside),
    ]

    assert [_code(call) for call in calls] == ["uri_not_allowed"] * len(calls)
    assert Path(outside).read_text() == "models-of-others"
    assert Path(inside).read_text() == "models"


def test_a_link_out_of_a_root_is_refused_even_when_it_is_made_later(
    storage: Storage, root: Path
) -> None:
    storage.read_bytes(f"{root}/config.json", limit=100)
    (root / "config.json").unlink()
    (root / "config.json").symlink_to(root.parent / "models-of-others" / "config.json")
    (root / "folder").symlink_to(root.parent / "models-of-others")

    assert _code(lambda: storage.read_bytes(f"{root}/config.json", limit=100)) == "uri_not_allowed"
    assert _code(lambda: storage.write_bytes(f"{root}/folder/new", b"x")) == "uri_not_allowed"
    assert storage.list(str(root)) == []


def test_a_link_within_the_roots_is_followed(storage: Storage, root: Path) -> None:
    (root / "snapshot").mkdir()
    (root / "snapshot" / "config.json").symlink_to("../config.json")

    assert [entry.uri for entry in storage.list(f"{root}/snapshot")] == [
        f"{root}/snapshot/config.json"
    ]
    assert storage.read_bytes(f"{root}/snapshot/config.json", limit=100) == b"models"


def test_a_root_that_is_itself_a_link_allows_what_is_behind_it(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)

    assert open_storage([str(link)]).read_bytes(f"{link}/config.json", limit=100) == b"models"


def test_the_refusal_names_the_address_and_the_setting_but_no_root(storage: Storage) -> None:
    with pytest.raises(StorageError) as caught:
        storage.stat("s3://bucket/secret-place/a")

    assert "'s3://bucket/secret-place/a'" in caught.value.detail
    assert "--storage-root" in caught.value.detail
    assert "models" not in caught.value.detail


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:pass/word@bucket/a", "https://host/a?X-Amz-Signature=password"]
)
def test_refusals_do_not_repeat_secrets(storage: Storage, uri: str) -> None:
    with pytest.raises(StorageError) as caught:
        storage.stat(uri)

    assert "word" not in str(caught.value.to_dict())


def test_without_roots_everything_is_allowed_and_relative_paths_start_here(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    storage = open_storage()

    assert storage.normalise("config.json") == f"{root}/config.json"
    assert storage.normalise("../models-of-others/") == f"{root}-of-others"
    assert storage.normalise("s3://any-bucket/key") == "s3://any-bucket/key"


def test_a_relative_path_is_made_absolute_before_it_is_checked(
    storage: Storage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)

    assert storage.normalise("config.json") == f"{root}/config.json"


def test_a_malformed_root_is_refused() -> None:
    assert _code(lambda: open_storage(["s3://UPPER/case"])) == "bad_uri"
