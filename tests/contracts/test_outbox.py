"""Webhook endpoints and the outbox in the job store, on both databases."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from service.jobs import announce as announcing
from service.jobs.errors import EndpointDisabledError, EndpointLimitError, NotFoundError
from service.jobs.outbox import (
    Announcement,
    AttemptOutcome,
    DeliveryFilter,
    DeliveryRecord,
    DeliveryState,
    EndpointRecord,
    NewEndpoint,
    TakenDelivery,
)
from service.jobs.records import (
    EventType,
    IntegrationState,
    JobCursor,
    JobIntegration,
    JobRecord,
)
from service.jobs.sql_endpoints import MOST_ENDPOINTS
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState
from tests.support.fake_clock import FakeClock
from tests.support.jobs import ERROR, bring_to, new_job

JOB_EVENTS = tuple(kind for kind in Announcement if kind != Announcement.ENDPOINT_TEST)
DELIVERED = AttemptOutcome(state=DeliveryState.DELIVERED, response_status=200)


def make_endpoint(store: SqlJobStore, **changes: Any) -> EndpointRecord:
    values = {"url": "https://example.com/hook", "events": JOB_EVENTS, "key_id": "key-1"}
    return store.create_endpoint(NewEndpoint(**{**values, **changes}))


def deliveries(store: SqlJobStore, endpoint: EndpointRecord) -> list[DeliveryRecord]:
    """Oldest announcement first."""
    found = store.list_deliveries(DeliveryFilter(endpoint_id=endpoint.id), limit=100)
    return sorted(found, key=lambda delivery: delivery.data.get("seq", 0))


def take(store: SqlJobStore, **arguments: Any) -> TakenDelivery:
    taken = store.take_delivery(60, **arguments)
    assert taken is not None
    return taken


# -- endpoints


def test_an_endpoint_is_kept_as_it_was_made(store: SqlJobStore, clock: FakeClock) -> None:
    made = make_endpoint(store, description="ops", format="cloudevents", initiator="tok_1")
    assert store.get_endpoint(made.id) == made
    assert made.id.startswith("whe_")
    assert (made.description, made.format, made.initiator) == ("ops", "cloudevents", "tok_1")
    assert (made.is_enabled, made.secret_version, made.flag) == (True, 1, None)
    assert made.created_at == clock()
    clock.advance(1)
    other = make_endpoint(store)
    assert store.list_endpoints() == [other, made]


def test_what_changes_in_an_endpoint_is_what_was_asked(store: SqlJobStore) -> None:
    made = make_endpoint(store)
    changes = {"url": "https://example.org", "events": [Announcement.JOB_FAILED]}
    changed = store.update_endpoint(made.id, changes)
    assert (changed.url, changed.events) == ("https://example.org", (Announcement.JOB_FAILED,))
    assert changed.description == made.description
    assert store.update_endpoint(made.id, {}) == changed


def test_a_rotation_keeps_the_secret_before_for_a_while(
    store: SqlJobStore, clock: FakeClock
) -> None:
    made = make_endpoint(store)
    rotated = store.rotate_endpoint(made.id, "key-2", timedelta(hours=1))
    assert (rotated.key_id, rotated.secret_version) == ("key-2", 2)
    assert (rotated.previous_key_id, rotated.previous_expires_at) == (
        "key-1",
        clock() + timedelta(hours=1),
    )


def test_a_deleted_endpoint_takes_its_deliveries_along(store: SqlJobStore) -> None:
    made, kept = make_endpoint(store), make_endpoint(store)
    bring_to(store, JobState.PLANNING)
    store.delete_endpoint(made.id)
    assert len(deliveries(store, kept)) == 1
    for call in (store.get_endpoint, store.delete_endpoint, store.test_endpoint):
        with pytest.raises(NotFoundError, match=made.id):
            call(made.id)
    with pytest.raises(NotFoundError):
        store.list_deliveries(DeliveryFilter(endpoint_id=made.id))
    with pytest.raises(NotFoundError):
        store.update_endpoint(made.id, {"description": "x"})


def test_there_cannot_be_very_many_endpoints(store: SqlJobStore) -> None:
    for _ in range(MOST_ENDPOINTS):
        make_endpoint(store)
    with pytest.raises(EndpointLimitError, match="delete one"):
        make_endpoint(store)


# -- what is announced


@pytest.mark.parametrize(
    ("state", "announced"),
    [
        (JobState.QUEUED, []),
        (JobState.RUNNING, ["job.started"]),
        (JobState.SUCCEEDED, ["job.started", "job.output_committed", "job.succeeded"]),
        (JobState.FAILED, ["job.started", "job.failed"]),
        (JobState.CANCELLED, ["job.started", "job.cancelled"]),
    ],
)
def test_each_change_of_a_job_is_announced_once(
    store: SqlJobStore, state: JobState, announced: list[str]
) -> None:
    endpoint = make_endpoint(store)
    job, _ = bring_to(store, state)
    found = deliveries(store, endpoint)
    assert [delivery.type for delivery in found] == announced
    events = {event.seq: event for event in store.events(job.id)}
    for delivery in found:
        event = events[delivery.data["seq"]]
        assert (delivery.data["job_id"], delivery.data["attempt"]) == (job.id, 1)
        assert delivery.occurred_at == event.time
        assert delivery.state == DeliveryState.PENDING
    if job.is_terminal:
        assert found[-1].data["state"] == state


def test_a_retried_job_starts_again(store: SqlJobStore) -> None:
    endpoint = make_endpoint(store)
    job, _ = bring_to(store, JobState.FAILED)
    store.retry(job.id)
    store.claim("runner-2", 60)
    last = deliveries(store, endpoint)[-1]
    assert (last.type, last.data["attempt"]) == (Announcement.JOB_STARTED, 2)


def test_a_queued_job_that_is_cancelled_is_announced(store: SqlJobStore) -> None:
    endpoint = make_endpoint(store)
    job, _ = store.submit(new_job())
    store.request_cancel(job.id)
    assert [delivery.type for delivery in deliveries(store, endpoint)] == ["job.cancelled"]


def test_only_subscribers_that_are_enabled_are_told(store: SqlJobStore) -> None:
    failures = make_endpoint(store, events=(Announcement.JOB_FAILED,))
    disabled = make_endpoint(store)
    store.update_endpoint(disabled.id, {"is_enabled": False})
    bring_to(store, JobState.FAILED)
    assert [delivery.type for delivery in deliveries(store, failures)] == ["job.failed"]
    assert deliveries(store, disabled) == []


def test_all_receivers_get_the_same_message(store: SqlJobStore) -> None:
    endpoints = make_endpoint(store), make_endpoint(store)
    bring_to(store, JobState.PLANNING)
    (one,), (other,) = (deliveries(store, endpoint) for endpoint in endpoints)
    assert one.message_id == other.message_id
    assert one.message_id.startswith("evt_")
    assert one.id != other.id


def test_an_announcement_that_cannot_be_written_undoes_the_change(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_endpoint(store)
    job, claim = bring_to(store, JobState.RUNNING)
    assert claim is not None

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the power went")

    monkeypatch.setattr(announcing, "pending_delivery", broken)
    with pytest.raises(RuntimeError, match="power"):
        store.transition(claim, JobState.FAILED, error=ERROR)
    assert store.get(job.id).state == JobState.RUNNING
    assert store.get(job.id).event_seq == job.event_seq


# -- taking and finishing


def test_a_taken_delivery_is_nobody_elses_until_its_lease_ends(
    store: SqlJobStore, clock: FakeClock
) -> None:
    endpoint = make_endpoint(store)
    store.test_endpoint(endpoint.id)
    taken = take(store)
    assert taken.endpoint == endpoint
    assert (taken.delivery.attempts, taken.delivery.last_attempt_at) == (1, clock())
    assert store.take_delivery(60) is None
    clock.advance(60)
    again = take(store)
    assert (again.delivery.id, again.delivery.attempts) == (taken.delivery.id, 2)
    assert not store.finish_attempt(taken.delivery, DELIVERED)  # too late: it is another's
    assert store.finish_attempt(again.delivery, DELIVERED)
    assert not store.finish_attempt(again.delivery, DELIVERED)


def test_each_delivery_is_taken_by_one_of_many_senders(store: SqlJobStore) -> None:
    endpoint = make_endpoint(store)
    made = {store.test_endpoint(endpoint.id).id for _ in range(20)}

    def work(_: int) -> list[str]:
        found = []
        while (taken := store.take_delivery(60)) is not None:
            found.append(taken.delivery.id)
        return found

    with ThreadPoolExecutor(4) as threads:
        found = Counter(item for part in threads.map(work, range(4)) for item in part)
    assert found == Counter(made)


def test_the_longest_due_comes_first_and_busy_receivers_are_left_alone(
    store: SqlJobStore, clock: FakeClock
) -> None:
    first, second = make_endpoint(store), make_endpoint(store)
    one = store.test_endpoint(first.id)
    clock.advance(1)
    other = store.test_endpoint(second.id)
    assert take(store, busy={first.id}).delivery.id == other.id
    assert take(store).delivery.id == one.id


def test_a_failed_try_waits_for_its_time(store: SqlJobStore, clock: FakeClock) -> None:
    endpoint = make_endpoint(store)
    store.test_endpoint(endpoint.id)
    retry = AttemptOutcome(
        state=DeliveryState.PENDING,
        retry_in=timedelta(seconds=5),
        response_status=500,
        response_body="no",
        error="The receiver answered 500.",
    )
    assert store.finish_attempt(take(store).delivery, retry)
    (shown,) = deliveries(store, endpoint)
    assert (shown.response_status, shown.response_body) == (500, "no")
    assert shown.due_at == clock() + timedelta(seconds=5)
    assert store.take_delivery(60) is None
    clock.advance(5)
    assert take(store).delivery.attempts == 2


def test_an_endpoint_that_asks_for_patience_gets_it_for_all_its_deliveries(
    store: SqlJobStore, clock: FakeClock
) -> None:
    endpoint, other = make_endpoint(store), make_endpoint(store)
    for _ in range(2):
        store.test_endpoint(endpoint.id)
    later = timedelta(seconds=90)
    pause = AttemptOutcome(state=DeliveryState.PENDING, retry_in=later, pause_for=later)
    store.finish_attempt(take(store).delivery, pause)
    assert store.take_delivery(60) is None
    assert store.longest_overdue() == timedelta(0)
    store.test_endpoint(other.id)
    assert take(store).endpoint == other
    clock.advance(90)
    taken = take(store)
    assert taken.endpoint is not None
    assert taken.endpoint.id == endpoint.id
    store.finish_attempt(taken.delivery, DELIVERED)
    assert store.get_endpoint(endpoint.id).paused_until is None


def test_a_flag_stays_until_a_delivery_succeeds(store: SqlJobStore, clock: FakeClock) -> None:
    endpoint = make_endpoint(store)
    for _ in range(2):
        store.test_endpoint(endpoint.id)
    given_up = AttemptOutcome(state=DeliveryState.FAILED, error="no", flag="Given up.")
    store.finish_attempt(take(store).delivery, given_up)
    flagged = store.get_endpoint(endpoint.id)
    assert (flagged.flag, flagged.flagged_at) == ("Given up.", clock())
    store.finish_attempt(take(store).delivery, DELIVERED)
    assert store.get_endpoint(endpoint.id).flag is None


def test_what_waits_for_a_disabled_endpoint_goes_out_once_it_is_enabled(
    store: SqlJobStore,
) -> None:
    endpoint = make_endpoint(store)
    for _ in range(2):
        store.test_endpoint(endpoint.id)
    gone = AttemptOutcome(state=DeliveryState.FAILED, flag="It is gone.", disable=True)
    store.finish_attempt(take(store).delivery, gone)
    assert store.take_delivery(60) is None
    with pytest.raises(EndpointDisabledError):
        store.test_endpoint(endpoint.id)
    enabled = store.update_endpoint(endpoint.id, {"is_enabled": True})
    assert (enabled.flag, enabled.flagged_at) == (None, None)
    assert take(store).endpoint == enabled


def test_a_replay_is_a_new_delivery_of_the_same_message(
    store: SqlJobStore, clock: FakeClock
) -> None:
    endpoint, other = make_endpoint(store), make_endpoint(store)
    first = store.test_endpoint(endpoint.id)
    store.finish_attempt(take(store).delivery, AttemptOutcome(state=DeliveryState.FAILED))
    clock.advance(10)
    again = store.replay_delivery(endpoint.id, first.id)
    assert (again.message_id, again.occurred_at) == (first.message_id, first.occurred_at)
    assert again.id != first.id
    assert again.created_at == clock()
    assert take(store).delivery.id == again.id
    with pytest.raises(NotFoundError):
        store.replay_delivery(other.id, first.id)


def test_deliveries_are_listed_in_pages_newest_first(store: SqlJobStore, clock: FakeClock) -> None:
    endpoint = make_endpoint(store)
    made = []
    for _ in range(5):
        made.insert(0, store.test_endpoint(endpoint.id))
        clock.advance(1)
    chosen = DeliveryFilter(endpoint_id=endpoint.id)
    first = store.list_deliveries(chosen, limit=2)
    cursor = JobCursor(first[-1].created_at, first[-1].id)
    assert first + store.list_deliveries(chosen, cursor=cursor) == made
    delivered = DeliveryFilter(endpoint_id=endpoint.id, state=DeliveryState.DELIVERED)
    assert store.list_deliveries(delivered) == []
    store.finish_attempt(take(store).delivery, DELIVERED)
    assert [delivery.id for delivery in store.list_deliveries(delivered)] == [made[-1].id]


def test_how_late_the_senders_are_can_be_seen(store: SqlJobStore, clock: FakeClock) -> None:
    endpoint = make_endpoint(store)
    assert store.longest_overdue() == timedelta(0)
    store.test_endpoint(endpoint.id)
    clock.advance(7)
    store.test_endpoint(endpoint.id)
    assert store.longest_overdue() == timedelta(seconds=7)
    take(store)
    assert store.longest_overdue() == timedelta(0)


def test_old_deliveries_are_forgotten(store: SqlJobStore, clock: FakeClock) -> None:
    endpoint = make_endpoint(store)
    store.test_endpoint(endpoint.id)
    clock.advance(100)
    kept = store.test_endpoint(endpoint.id)
    assert store.prune_outbox(timedelta(seconds=60)) == 1
    assert deliveries(store, endpoint) == [kept]


@pytest.mark.parametrize(
    "broken",
    [
        {"state": "unheard-of"},
        {"due_at": None},
        {"integration": "both"},
        {"endpoint_id": None},
    ],
)
def test_the_database_holds_what_a_delivery_may_be(
    store: SqlJobStore, broken: dict[str, Any]
) -> None:
    from service.jobs.tables import outbox

    store.test_endpoint(make_endpoint(store).id)
    with pytest.raises(sa.exc.IntegrityError), store._engine.begin() as connection:
        connection.execute(sa.update(outbox).values(broken))


def test_deleting_an_endpoint_never_stops_a_job(store: SqlJobStore) -> None:
    """Job changes write rows for endpoints that somebody deletes at that moment."""

    def make_and_delete(_: int) -> None:
        store.delete_endpoint(make_endpoint(store).id)

    def run_job(_: int) -> JobState:
        job, _created = store.submit(new_job())
        return store.request_cancel(job.id).state

    with ThreadPoolExecutor(4) as threads:
        deleting = [threads.submit(make_and_delete, number) for number in range(30)]
        states = list(threads.map(run_job, range(30)))
        for future in deleting:
            future.result()
    assert set(states) == {JobState.CANCELLED}


# -- integrations


def with_integration(store: SqlJobStore, state: JobState) -> JobRecord:
    asked = (JobIntegration("registry", {"model_name": "x"}), JobIntegration("other"))
    job, _ = bring_to(store, state, integrations=asked)
    return job


def finish(store: SqlJobStore, taken: TakenDelivery, **outcome: Any) -> bool:
    values = {"state": DeliveryState.DELIVERED, **outcome}
    return store.finish_attempt(taken.delivery, AttemptOutcome(**values))


def test_integrations_are_told_of_the_jobs_that_ask_for_them(store: SqlJobStore) -> None:
    job = with_integration(store, JobState.SUCCEEDED)
    bring_to(store, JobState.SUCCEEDED)
    found: Counter[tuple[str, str]] = Counter()
    while (taken := store.take_delivery(60)) is not None:
        assert taken.endpoint is None
        assert taken.delivery.data["job_id"] == job.id
        found[taken.delivery.receiver, str(taken.delivery.type)] += 1
    kinds = ("job.started", "job.output_committed", "job.succeeded")
    assert found == Counter((name, kind) for name in ("registry", "other") for kind in kinds)


def test_what_an_integration_made_stands_in_the_job_with_an_event(store: SqlJobStore) -> None:
    before = with_integration(store, JobState.SUCCEEDED)
    taken = take(store, busy={"other"})
    assert finish(store, taken)  # nothing to it: nothing is noted
    assert store.get(before.id) == before
    taken = take(store, busy={"other"})
    assert finish(store, taken, url="https://registry/x/1")
    job = store.get(before.id)
    made, other = job.integrations
    assert (made.state, made.url) == (IntegrationState.SUCCEEDED, "https://registry/x/1")
    assert made.options == {"model_name": "x"}
    assert other == before.integrations[1]
    assert job.revision == before.revision + 1
    (event,) = store.events(job.id, after=before.event_seq)
    assert event.type == EventType.INTEGRATION_FINISHED
    assert event.data == {
        "name": "registry",
        "state": "succeeded",
        "url": "https://registry/x/1",
        "error": None,
    }
    assert not finish(store, taken, url="https://registry/x/2")  # of a sender that was too late
    assert store.get(before.id) == job


def test_an_integrations_failures_are_shown_and_its_last_one_is_an_event(
    store: SqlJobStore, clock: FakeClock
) -> None:
    before = with_integration(store, JobState.PLANNING)
    retry = {"state": DeliveryState.PENDING, "retry_in": timedelta(seconds=5), "error": "away"}
    finish(store, take(store, busy={"other"}), **retry)
    shown = store.get(before.id)
    error = {"code": "integration_failed", "detail": "away"}
    assert shown.integrations[0].error == error
    assert shown.integrations[0].state == IntegrationState.PENDING
    assert shown.event_seq == before.event_seq
    clock.advance(5)
    finish(store, take(store, busy={"other"}), state=DeliveryState.FAILED, error="away")
    shown = store.get(before.id)
    assert shown.state == before.state
    assert shown.integrations[0].state == IntegrationState.FAILED
    (event,) = store.events(before.id, after=before.event_seq)
    assert (event.type, event.data["error"]) == (EventType.INTEGRATION_FINISHED, error)


def test_a_retried_job_tells_its_integrations_afresh(store: SqlJobStore) -> None:
    job = with_integration(store, JobState.FAILED)
    finish(store, take(store, busy={"other"}), state=DeliveryState.FAILED, error="no")
    assert store.retry(job.id).integrations == job.integrations


def test_an_integration_may_finish_after_its_job_was_forgotten(store: SqlJobStore) -> None:
    job = with_integration(store, JobState.CANCELLED)
    taken = take(store)
    store.delete(job.id)
    assert finish(store, taken, url="https://registry/x/1")
