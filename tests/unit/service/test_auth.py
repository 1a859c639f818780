from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.errors import MergeError
from service.auth import Authenticator, Principal, Scope, prepare_first_token
from service.jobs.sql_store import SqlJobStore, open_store
from service.problems import RequestError
from service.settings import Settings, load_settings
from tests.support.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(tmp_path: Path, clock: FakeClock) -> Iterator[SqlJobStore]:
    made = open_store(f"sqlite:///{tmp_path}/jobs.db", clock=clock)
    yield made
    made.close()


def settings(folder: Path, **fields: str) -> Settings:
    return load_settings(data_dir=folder, **fields)


def test_the_first_start_makes_one_token_and_later_ones_none(
    store: SqlJobStore, tmp_path: Path
) -> None:
    made = [prepare_first_token(store, settings(tmp_path)) for _ in range(2)]
    secret = (tmp_path / "admin-token").read_text().strip()
    token = store.find_token(secret)
    assert made == [token, None]
    assert token is not None
    assert token.scopes == (Scope.ADMIN,)
    assert (tmp_path / "admin-token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob("*admin*")] == ["admin-token"]


def test_the_token_of_another_database_is_replaced_and_links_are_not_followed(
    store: SqlJobStore, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "admin-token").symlink_to(elsewhere)
    prepare_first_token(store, settings(tmp_path))
    assert elsewhere.read_text() == "untouched"
    assert store.find_token((tmp_path / "admin-token").read_text().strip())


def test_with_all_tokens_revoked_a_start_makes_a_new_one(
    store: SqlJobStore, tmp_path: Path
) -> None:
    token, _ = store.create_token("old", [Scope.ADMIN])
    store.revoke_token(token.id)
    prepare_first_token(store, settings(tmp_path))
    assert store.find_token((tmp_path / "admin-token").read_text().strip())


def test_a_configured_token_is_imported_and_not_announced(
    store: SqlJobStore, tmp_path: Path
) -> None:
    secret = "chosen-by-the-operator-1234"
    for _ in range(2):
        assert prepare_first_token(store, settings(tmp_path, admin_token=secret)) is None
    assert not (tmp_path / "admin-token").exists()
    assert len(store.list_tokens()) == 1
    assert store.find_token(secret)


def test_a_token_that_cannot_be_written_down_is_of_no_use(
    store: SqlJobStore, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(MergeError) as caught:
        prepare_first_token(store, settings(missing))
    assert caught.value.code == "bad_setting"
    assert str(missing) in caught.value.detail
    assert all(token.revoked_at for token in store.list_tokens())


def test_a_valid_token_names_its_principal(store: SqlJobStore, clock: FakeClock) -> None:
    token, secret = store.create_token("ci", [Scope.JOBS_READ])
    authenticator = Authenticator(store, clock)
    for header in (f"Bearer {secret}", f"bearer  {secret}", f"BEARER {secret}"):
        principal = authenticator.authenticate(header)
        assert principal == Principal(token.id, "ci", frozenset({"jobs:read"}))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic x", "Bearer \x00", "Bearer é", "Bearer wrong"]
)
def test_anything_else_is_nobody(store: SqlJobStore, clock: FakeClock, header: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        Authenticator(store, clock).authenticate(header)
    assert caught.value.code == "unauthenticated"


def test_the_store_is_not_asked_for_what_cannot_be_a_token(clock: FakeClock) -> None:
    class NoStore:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(name)

    with pytest.raises(RequestError):
        Authenticator(NoStore(), clock).authenticate("Bearer " + "x" * 513)  # type: ignore[arg-type]


def test_use_is_noted_once_a_minute(
    store: SqlJobStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = store.create_token("ci", [Scope.JOBS_READ])
    touched: list[str] = []
    touch = store.touch_token
    monkeypatch.setattr(store, "touch_token", lambda i: (touched.append(i), touch(i)))
    authenticator = Authenticator(store, clock)
    for seconds in (0, 30, 31, 59, 2):
        clock.advance(seconds)
        authenticator.authenticate(f"Bearer {secret}")
    assert len(touched) == 3


@pytest.mark.parametrize(
    ("scopes", "is_allowed"),
    [({"jobs:read"}, True), ({"admin"}, True), ({"jobs:write"}, False), (set(), False)],
)
def test_a_scope_is_needed_and_admin_has_all(scopes: set[str], is_allowed: bool) -> None:
    principal = Principal("tok_1", "ci", frozenset(scopes))
    if is_allowed:
        principal.require(Scope.JOBS_READ)
    else:
        with pytest.raises(RequestError) as caught:
            principal.require(Scope.JOBS_READ)
        assert caught.value.code == "forbidden"
        assert "jobs:read" in caught.value.detail
