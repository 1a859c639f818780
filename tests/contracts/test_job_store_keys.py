"""Idempotency keys of what is made besides jobs: plans, tokens, webhook endpoints."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from service.jobs.errors import IdempotencyReusedError, NotFoundError, RepeatedRequestError
from service.jobs.outbox import NewEndpoint
from service.jobs.records import IdempotencyRequest, NewPlan
from service.jobs.sql_store import SqlJobStore
from tests.contracts.test_job_store_concurrency import at_once
from tests.support.fake_clock import FakeClock

KEY = IdempotencyRequest("tok_1", "POST", "/v1/things", "k", "sha256:1")
DAY_SECONDS = 24 * 3600
Make = Callable[[SqlJobStore, IdempotencyRequest], str]


def make_token(store: SqlJobStore, key: IdempotencyRequest) -> str:
    token, _ = store.create_token("ci", ["admin"], idempotency=key)
    assert store.get_token(token.id) == token
    return token.id


def make_plan(store: SqlJobStore, key: IdempotencyRequest) -> str:
    return store.keep_plan(NewPlan(recipe_source="", options={}, summary={}), idempotency=key).id


def make_endpoint(store: SqlJobStore, key: IdempotencyRequest) -> str:
    new = NewEndpoint(url="https://example.com", events=("job.failed",), key_id="k")
    return store.create_endpoint(new, idempotency=key).id


@pytest.mark.parametrize("make", [make_token, make_plan, make_endpoint])
def test_a_key_makes_one_thing_within_a_day(
    store: SqlJobStore, clock: FakeClock, make: Make
) -> None:
    assert store.find_created(KEY) is None
    first = make(store, KEY)
    assert store.find_created(KEY) == first
    with pytest.raises(RepeatedRequestError) as caught:
        make(store, KEY)
    assert caught.value.object_id == first
    with pytest.raises(IdempotencyReusedError):
        make(store, msgspec.structs.replace(KEY, fingerprint="sha256:2"))
    assert make(store, msgspec.structs.replace(KEY, owner="tok_2")) != first
    clock.advance(DAY_SECONDS + 1)
    assert make(store, KEY) != first


@pytest.mark.parametrize("make", [make_token, make_plan, make_endpoint])
def test_equal_requests_at_once_make_one_thing(store: SqlJobStore, make: Make) -> None:
    def try_it(_: int) -> tuple[str, bool]:
        try:
            return make(store, KEY), True
        except RepeatedRequestError as repeated:
            return repeated.object_id, False

    results = at_once(8, try_it)
    assert len({object_id for object_id, _ in results}) == 1
    assert [is_new for _, is_new in results].count(True) == 1


def test_the_key_of_an_endpoint_that_was_deleted_can_be_used_again(store: SqlJobStore) -> None:
    first = make_endpoint(store, KEY)
    store.delete_endpoint(first)
    assert make_endpoint(store, KEY) != first


def test_there_is_no_token_of_an_unknown_id(store: SqlJobStore) -> None:
    with pytest.raises(NotFoundError):
        store.get_token("tok_none")
