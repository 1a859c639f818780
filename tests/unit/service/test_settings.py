from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merging.errors import MergeError
from service.settings import default_data_dir, is_loopback, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MERGEYARD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


def refused(**overrides: Any) -> str:
    with pytest.raises(MergeError) as caught:
        load_settings(**overrides)
    assert caught.value.code == "bad_setting"
    assert caught.value.faults
    return caught.value.detail


def test_without_any_setting_the_service_is_for_this_machine_and_folder(tmp_path: Path) -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.data_dir == default_data_dir() == tmp_path / "xdg" / "mergeyard"
    assert settings.storage_roots == (str(tmp_path),)
    assert settings.effective_database_url == f"sqlite:///{settings.data_dir}/mergeyard.db"
    assert settings.admin_token_file == settings.data_dir / "admin-token"
    assert settings.ray_address is None


def test_without_xdg_the_data_are_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_data_dir() == Path("/home/somebody/.local/share/mergeyard")


def test_arguments_have_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_PORT", "9000")
    monkeypatch.setenv("MERGEYARD_POOL", "local")
    settings = load_settings(port=9001)
    assert (settings.port, settings.pool) == (9001, "local")


@pytest.mark.parametrize(
    ("text", "roots"),
    [
        ("/models", ("/models",)),
        ("/models, s3://bucket/prefix ,", ("/models", "s3://bucket/prefix")),
        ('["/a,b", "s3://c"]', ("/a,b", "s3://c")),
    ],
)
def test_roots_are_a_list_with_commas_or_json(
    monkeypatch: pytest.MonkeyPatch, text: str, roots: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_ROOTS", text)
    assert load_settings(host="0.0.0.0").storage_roots == roots


def test_relative_roots_are_made_absolute_for_workers(tmp_path: Path) -> None:
    roots = load_settings(storage_roots=["models", "~/x"]).storage_roots
    assert roots == (str(tmp_path / "models"), str(Path.home() / "x"))


def test_an_empty_variable_is_no_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_ROOTS", "")
    monkeypatch.setenv("MERGEYARD_ADMIN_TOKEN", "")
    settings = load_settings()
    assert settings.storage_roots == (str(tmp_path),)
    assert settings.admin_token is None


def test_a_service_for_others_must_be_told_its_roots() -> None:
    assert "MERGEYARD_STORAGE_ROOTS" in refused(host="0.0.0.0")


@pytest.mark.parametrize("roots", [[""], ["/a", " "]])
def test_an_empty_root_would_open_everything(roots: list[str]) -> None:
    assert "MERGEYARD_STORAGE_ROOTS" in refused(storage_roots=roots)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    detail = refused(port="many", pool="threads", lease_seconds=0, root_path="no-slash")
    for name in ("PORT", "POOL", "LEASE_SECONDS", "ROOT_PATH"):
        assert f"MERGEYARD_{name}:" in detail


def test_the_port_that_kubernetes_sets_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_PORT", "tcp://10.0.0.1:8000")
    assert "enableServiceLinks" in refused()


def test_secrets_are_not_shown() -> None:
    settings = load_settings(
        database_url="postgresql://user:hidden-password@host/db",
        admin_token="hidden-token-of-the-operator",
    )
    assert "hidden" not in f"{settings!r} {settings} {settings.model_dump()}"
    assert settings.effective_database_url.startswith("postgresql://user:hidden-password@")


def test_a_refused_secret_is_not_shown() -> None:
    assert "hidden" not in refused(admin_token="hidden")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback_is_told_from_other_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
