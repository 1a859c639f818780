"""What every job store promises; the same tests run on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from service.jobs.errors import (
    AlreadyTerminalError,
    IdempotencyReusedError,
    IllegalTransitionError,
    NotFoundError,
    RevisionMismatchError,
    StaleLeaseError,
)
from service.jobs.records import (
    Backlog,
    Claim,
    EventType,
    IdempotencyRequest,
    JobCursor,
    JobFilter,
    Progress,
    ShardCounts,
)
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import TERMINAL, TRANSITIONS, JobState, ShardState, is_allowed
from service.jobs.tables import ACTIVE, jobs
from tests.support.fake_clock import FakeClock
from tests.support.jobs import ERROR, OUTPUT, bring_to, listed, new_job, receipt_for, tiny_plan

FACTS: dict[JobState, dict[str, Any]] = {
    JobState.FAILED: {"error": ERROR},
    JobState.SUCCEEDED: {"output": OUTPUT},
}
"""What a state must come with."""


def types(store: SqlJobStore, job_id: str) -> list[str]:
    return [str(event.type) for event in store.events(job_id)]


def assert_gapless(store: SqlJobStore, job_id: str) -> None:
    seqs = [event.seq for event in store.events(job_id)]
    assert seqs == list(range(1, store.get(job_id).event_seq + 1))


# -- states


@pytest.mark.parametrize("old", JobState)
def test_only_listed_transitions_of_a_claimed_job_are_carried_out(
    store: SqlJobStore, old: JobState
) -> None:
    for new in JobState:
        job, claim = bring_to(store, old)
        claim = claim or Claim(job, "runner-1", job.fencing_token, job.created_at)
        if old in ACTIVE and is_allowed(old, new):
            assert store.transition(claim, new, **FACTS.get(new, {})).state == new
        else:
            with pytest.raises(IllegalTransitionError if old in ACTIVE else StaleLeaseError):
                store.transition(claim, new, **FACTS.get(new, {}))
            assert store.get(job.id) == job
        assert_gapless(store, job.id)


@pytest.mark.parametrize("old", JobState)
def test_the_database_itself_refuses_other_transitions(store: SqlJobStore, old: JobState) -> None:
    for new in set(JobState) - {old}:
        job, _ = bring_to(store, old)
        consistent: dict[str, Any] = {
            "finished_at": job.created_at if new in TERMINAL else None,
            "error": None,
            "output": None,
            "lease_owner": None,
            "lease_expires_at": None,
            **FACTS.get(new, {}),
        }
        update = sa.update(jobs).where(jobs.c.id == job.id)
        step = update.values(previous_state=jobs.c.state, state=str(new), **consistent)
        with store._engine.connect() as connection:
            if is_allowed(old, new):
                assert connection.execute(step).rowcount == 1
            else:
                with pytest.raises(sa.exc.IntegrityError, match="ck_jobs_transition"):
                    connection.execute(step)


@pytest.mark.parametrize(
    ("state", "values", "constraint"),
    [
        (JobState.RUNNING, {"finished_at": sa.func.now()}, "finished"),
        (JobState.RUNNING, {"error": ERROR}, "error"),
        (JobState.RUNNING, {"output": OUTPUT}, "output"),
        (JobState.RUNNING, {"lease_owner": None}, "lease"),
        (JobState.SUCCEEDED, {"output": None}, "output"),
        (JobState.QUEUED, {"state": "running"}, "transition"),
        (JobState.QUEUED, {"state": "resting"}, "state|transition"),
        (JobState.QUEUED, {"cancel_requested": "soon"}, "cancel_requested"),
        (
            JobState.QUEUED,
            {"lease_owner": "x", "lease_expires_at": sa.func.now()},
            "lease_only_active",
        ),
    ],
)
def test_the_database_refuses_a_job_that_contradicts_itself(
    store: SqlJobStore, state: JobState, values: dict[str, Any], constraint: str
) -> None:
    job, _ = bring_to(store, state)
    with (
        store._engine.connect() as connection,
        pytest.raises(sa.exc.IntegrityError, match=f"ck_jobs_({constraint})"),
    ):
        connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**values))


def test_no_state_but_failed_can_be_left_once_it_is_terminal() -> None:
    assert {state for state in TERMINAL if TRANSITIONS[state]} == {JobState.FAILED}


def test_a_job_tells_its_whole_life_in_events(store: SqlJobStore, clock: FakeClock) -> None:
    job, _ = store.submit(new_job())
    claim = store.claim("runner-1", 60)
    assert claim
    plan = tiny_plan(job.output_uri, shards=1, warnings=("large",))
    receipt = receipt_for(plan, 0)
    store.set_phase(claim, "planning")
    store.save_plan(claim, plan)
    store.transition(claim, JobState.RUNNING)
    store.set_phase(claim, "merging", "1 shard")
    store.record_shard(claim, 0, ShardState.RUNNING, attempt=1, worker="w", device="cpu")
    store.record_shard(claim, 0, ShardState.PENDING, attempt=1, error=ERROR)
    store.record_shard(claim, 0, ShardState.RUNNING, attempt=2, worker="w", device="cpu")
    progress = Progress(1, 1, 24, 24, 2, 2)
    store.update_progress(claim, progress, shards=[ShardCounts(0, 2, 2, 1)])
    store.record_shard(
        claim, 0, ShardState.SUCCEEDED, attempt=2, receipt=msgspec.to_builtins(receipt)
    )
    store.transition(claim, JobState.PUBLISHING)
    clock.advance(5)
    done = store.transition(claim, JobState.SUCCEEDED, output=OUTPUT, report={"object": "r"})
    assert types(store, job.id) == [
        "job.created",
        "job.state_changed",
        "job.phase_changed",
        "job.warning",
        "job.state_changed",
        "job.phase_changed",
        "shard.started",
        "shard.retried",
        "shard.started",
        "job.progress",
        "shard.finished",
        "job.state_changed",
        "job.output_committed",
        "job.state_changed",
        "job.finished",
    ]
    assert store.events(job.id)[9].data["shards"] == [[0, 2, 2, 1]]
    assert store.events(job.id)[-1].data == {"state": "succeeded", "error": None}
    assert [phase.name for phase in done.phases] == ["planning", "merging"]
    assert all(phase.finished_at for phase in done.phases)
    assert (done.output, done.lease_owner, done.progress) == (OUTPUT, None, progress)
    assert done.finished_at == clock()
    assert store.load_report(job.id) == {"object": "r"}
    assert_gapless(store, job.id)


# -- claims and leases


def test_jobs_are_claimed_by_priority_and_then_by_age(store: SqlJobStore, clock: FakeClock) -> None:
    made = []
    for priority in (0, 5, 0):
        made.append(store.submit(new_job(priority=priority))[0].id)
        clock.advance(1)
    claimed = [store.claim("runner-1", 60) for _ in range(4)]
    assert [claim and claim.job_id for claim in claimed] == [made[1], made[0], made[2], None]
    assert {claim.job.state for claim in claimed if claim} == {JobState.PLANNING}


def test_a_job_passes_to_another_runner_only_when_its_lease_has_lapsed(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, first = bring_to(store, JobState.RUNNING)
    assert first
    clock.advance(59)
    assert store.claim("runner-2", 60) is None
    store.renew(first, 60)
    clock.advance(59)
    assert store.claim("runner-2", 60) is None
    clock.advance(1)
    second = store.claim("runner-2", 60)
    assert second
    assert (second.job_id, second.job.state) == (job.id, JobState.RUNNING)
    assert second.fencing_token == first.fencing_token + 1
    assert second.job.takeovers == 1
    assert store.events(job.id)[-1].data["code"] == "runner_lost"


def test_a_lapsed_lease_that_nobody_took_can_be_renewed(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, claim = bring_to(store, JobState.RUNNING)
    assert claim
    clock.advance(1000)
    store.renew(claim, 60)
    assert store.claim("runner-2", 60) is None
    assert store.get(job.id).takeovers == 0


def test_a_released_job_can_be_claimed_at_once_and_is_no_takeover(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.RUNNING)
    assert claim
    store.release(claim)
    again = store.claim("runner-2", 60)
    assert again
    assert (again.job_id, again.job.state, again.job.takeovers) == (job.id, JobState.RUNNING, 0)


def test_takeovers_count_only_without_progress_between_them(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim
    plan = tiny_plan(job.output_uri)
    store.save_plan(claim, plan)
    store.transition(claim, JobState.RUNNING)
    for expected in (1, 2):
        clock.advance(61)
        claim = store.claim("runner-2", 60)
        assert claim
        assert claim.job.takeovers == expected
    receipt = msgspec.to_builtins(receipt_for(plan, 0))
    store.record_shard(claim, 0, ShardState.SUCCEEDED, attempt=1, receipt=receipt)
    assert store.get(job.id).takeovers == 0


@pytest.mark.parametrize(
    ("output", "other"),
    [
        ("/outputs/same", "/outputs/same"),
        ("s3://bucket/sweep", "s3://bucket/sweep/variant"),
        ("/outputs/sweep/variant", "/outputs/sweep"),
    ],
)
def test_a_job_waits_while_another_one_writes_to_its_output(
    store: SqlJobStore, clock: FakeClock, output: str, other: str
) -> None:
    store.submit(new_job(output_uri=output))
    clock.advance(1)
    second, _ = store.submit(new_job(output_uri=other))
    claim = store.claim("runner-1", 60)
    assert claim
    assert store.claim("runner-2", 60) is None
    store.transition(claim, JobState.FAILED, error=ERROR)
    after = store.claim("runner-2", 60)
    assert after
    assert after.job_id == second.id


def test_jobs_with_neighbouring_outputs_do_not_wait(store: SqlJobStore) -> None:
    for output in ("/outputs/a", "/outputs/ab", "/outputs/a%", "/outputs/b/a"):
        store.submit(new_job(output_uri=output))
    assert all(store.claim(f"runner-{number}", 60) for number in range(4))


WRITES = {
    "renew": lambda store, claim: store.renew(claim, 60),
    "release": lambda store, claim: store.release(claim),
    "transition": lambda store, claim: store.transition(claim, JobState.PUBLISHING),
    "set_phase": lambda store, claim: store.set_phase(claim, "merging"),
    "save_plan": lambda store, claim: store.save_plan(claim, tiny_plan(shards=9)),
    "record_shard": lambda store, claim: store.record_shard(
        claim, 0, ShardState.RUNNING, attempt=1
    ),
    "update_progress": lambda store, claim: store.update_progress(
        claim, Progress(shards_done=3), shards=[ShardCounts(0, 1, 1, 1)]
    ),
    "append_event": lambda store, claim: store.append_event(claim, EventType.JOB_WARNING, {}),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("loss", ["taken over", "taken over by itself", "released", "ended"])
def test_a_stale_claim_can_write_nothing(
    store: SqlJobStore, clock: FakeClock, write: str, loss: str
) -> None:
    job, stale = bring_to(store, JobState.PLANNING)
    assert stale
    store.save_plan(stale, tiny_plan(job.output_uri))
    store.transition(stale, JobState.RUNNING)
    if loss == "released":
        store.release(stale)
    elif loss == "ended":
        store.transition(stale, JobState.FAILED, error=ERROR)
    else:
        clock.advance(61)
        assert store.claim("runner-1" if "itself" in loss else "runner-2", 60)
    before = (store.get(job.id), store.shards(job.id), store.get(job.id).event_seq)
    with pytest.raises(StaleLeaseError, match=job.id):
        WRITES[write](store, stale)
    assert (store.get(job.id), store.shards(job.id), store.get(job.id).event_seq) == before


# -- plans, shards, progress


def test_a_plan_is_stored_whole_and_makes_the_shard_records(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim
    plan = tiny_plan(job.output_uri, warnings=("one", "two"))
    saved = store.save_plan(claim, plan)
    assert store.load_plan(job.id) == plan
    assert saved.plan_digest == plan.digest
    assert saved.warnings == ("one", "two")
    assert [item["uri"] for item in saved.inputs] == ["/models/a", "/models/b"]
    assert saved.progress == Progress(0, 3, 0, 3 * (16 + 8), 0, 6)
    assert [(s.index, s.state, s.attempt) for s in store.shards(job.id)] == [
        (index, ShardState.PENDING, 0) for index in range(3)
    ]
    assert types(store, job.id).count("job.warning") == 2


def test_repeated_records_change_nothing(store: SqlJobStore) -> None:
    """A write whose answer was lost is sent again."""
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim
    plan = tiny_plan(job.output_uri)
    store.save_plan(claim, plan)
    store.set_phase(claim, "merging")
    store.record_shard(claim, 1, ShardState.RUNNING, attempt=1)
    before = store.get(job.id).event_seq
    store.save_plan(claim, plan)
    store.set_phase(claim, "merging")
    store.record_shard(claim, 1, ShardState.RUNNING, attempt=1)
    assert store.get(job.id).event_seq == before


def test_progress_never_goes_back_within_an_attempt(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim
    store.save_plan(claim, tiny_plan(job.output_uri))
    store.update_progress(claim, Progress(1, 3, 50, 72, 2, 6))
    store.update_progress(claim, Progress(1, 3, 40, 72, 3, 6))
    assert store.get(job.id).progress == Progress(1, 3, 50, 72, 3, 6)
    assert store.events(job.id)[-1].data["progress"]["bytes_done"] == 50


# -- submitting


def test_the_same_key_and_body_give_the_first_job_as_it_is_now(store: SqlJobStore) -> None:
    key = IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")
    first, created = store.submit(new_job(), idempotency=key)
    store.request_cancel(first.id)
    again, created_again = store.submit(new_job(), idempotency=key)
    assert (created, created_again) == (True, False)
    assert (again.id, again.state) == (first.id, JobState.CANCELLED)


def test_a_key_is_bound_to_its_body_and_scope(store: SqlJobStore) -> None:
    key = IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")
    store.submit(new_job(), idempotency=key)
    with pytest.raises(IdempotencyReusedError) as caught:
        store.submit(new_job(), idempotency=msgspec.structs.replace(key, fingerprint="sha256:2"))
    assert caught.value.code == "idempotency_key_reused"
    other = msgspec.structs.replace(key, owner="tok_2", fingerprint="sha256:2")
    assert store.submit(new_job(), idempotency=other)[1]


def test_a_key_is_forgotten_after_a_day(store: SqlJobStore, clock: FakeClock) -> None:
    key = IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")
    first, _ = store.submit(new_job(), idempotency=key)
    clock.advance(timedelta(hours=24).total_seconds())
    assert store.submit(new_job(), idempotency=key)[0].id == first.id
    clock.advance(1)
    assert store.submit(new_job(), idempotency=key)[1]


# -- reading


def test_pages_are_stable_while_jobs_are_added(store: SqlJobStore, clock: FakeClock) -> None:
    made = []
    for number in range(7):
        made.append(store.submit(new_job())[0].id)
        clock.advance(number % 2)  # some at the same instant
    expected = [job.id for job in listed(store, limit=100)]
    assert sorted(expected) == sorted(made)
    seen: list[str] = []
    cursor = None
    while page := listed(store, cursor=cursor, limit=2):
        seen += [job.id for job in page]
        cursor = JobCursor(page[-1].created_at, page[-1].id)
        clock.advance(1)
        store.submit(new_job())
    assert seen == expected


def test_jobs_are_found_by_state_label_method_time_and_initiator(
    store: SqlJobStore, clock: FakeClock
) -> None:
    both = {"method": "ties", "methods": ("linear_x", "ties")}
    store.submit(new_job(**both, labels={"team": "blue", "a.b/c": "1"}))
    clock.advance(1)
    middle = clock()
    clock.advance(1)
    second, _ = store.submit(new_job(labels={"team": "red"}, initiator="tok_1"))
    store.request_cancel(second.id)

    def found(**conditions: Any) -> list[str]:
        return [job.method for job in listed(store, JobFilter(**conditions))]

    assert found() == ["linear", "ties"]
    assert found(states=(JobState.QUEUED,)) == ["ties"]
    assert found(states=(JobState.QUEUED, JobState.CANCELLED)) == ["linear", "ties"]
    assert found(labels={"team": "blue"}) == ["ties"]
    assert found(labels={"team": "blue", "a.b/c": "1"}) == ["ties"]
    assert found(labels={"team": "blue", "a.b/c": "2"}) == []
    assert found(labels={"""x"y'z""": "blue"}) == []
    assert found(method="linear") == ["linear"]
    assert found(method="linear_x") == found(method="ties") == ["ties"]
    assert found(method="linear%x") == found(method="tie") == []
    assert found(created_after=middle) == ["linear"]
    assert found(initiator="tok_1") == ["linear"]
    assert store.counts()[JobState.QUEUED] == 1
    assert set(store.counts()) == set(JobState)


def test_events_are_read_from_any_place_on(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.FAILED)
    assert [event.seq for event in store.events(job.id, after=2)] == [3, 4]
    assert [event.seq for event in store.events(job.id, after=1, limit=2)] == [2, 3]
    assert store.events(job.id, after=99) == []


def test_what_is_new_of_many_jobs_is_asked_for_at_once(store: SqlJobStore) -> None:
    one, other = (bring_to(store, JobState.FAILED)[0] for _ in "ab")
    quiet, _ = bring_to(store, JobState.QUEUED)
    positions = {one.id: 0, other.id: 2, quiet.id: 1, "job_of_nobody": 0}
    assert store.new_events(positions) == {
        one.id: store.events(one.id),
        other.id: store.events(other.id, after=2),
        quiet.id: [],
    }
    assert store.new_events(positions, limit=1)[one.id] == store.events(one.id, limit=1)


def test_a_job_that_is_not_there_is_named(store: SqlJobStore) -> None:
    for call in (store.get, store.request_cancel, store.retry, store.delete):
        with pytest.raises(NotFoundError, match="job_none"):
            call("job_none")


# -- cancelling, retrying, changing, forgetting


def test_a_queued_job_is_cancelled_at_once_and_a_repeat_is_harmless(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.QUEUED)
    first = store.request_cancel(job.id)
    assert first.state == JobState.CANCELLED
    assert store.request_cancel(job.id, "now") == first
    assert types(store, job.id) == ["job.created", "job.state_changed", "job.finished"]
    assert store.claim("runner-1", 60) is None


@pytest.mark.parametrize("state", [JobState.PLANNING, JobState.RUNNING, JobState.PUBLISHING])
def test_a_claimed_job_is_cancelled_by_its_runner(store: SqlJobStore, state: JobState) -> None:
    job, claim = bring_to(store, state)
    assert claim
    assert store.request_cancel(job.id).state == JobState.CANCELLING
    assert store.renew(claim, 60).cancel_requested == "orderly"
    assert store.request_cancel(job.id, "now").cancel_requested == "now"
    assert store.request_cancel(job.id, "orderly").cancel_requested == "now"
    assert store.transition(claim, JobState.CANCELLED).state == JobState.CANCELLED
    assert types(store, job.id).count("job.finished") == 1


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_what_has_ended_cannot_be_cancelled(store: SqlJobStore, state: JobState) -> None:
    job, _ = bring_to(store, state)
    with pytest.raises(AlreadyTerminalError, match=str(state)):
        store.request_cancel(job.id)


def test_a_retry_is_the_next_attempt_of_the_same_job(store: SqlJobStore, clock: FakeClock) -> None:
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim
    store.save_plan(claim, tiny_plan(job.output_uri))
    store.update_progress(claim, Progress(shards_done=1))
    store.transition(claim, JobState.FAILED, error=ERROR)
    clock.advance(10)
    again = store.retry(job.id)
    assert (again.state, again.attempt, again.error) == (JobState.QUEUED, 2, None)
    assert (again.progress, again.plan_digest, again.phases) == (Progress(), None, ())
    assert (again.queued_at, again.created_at) == (clock(), job.created_at)
    assert store.load_plan(job.id) is None
    assert store.shards(job.id) == []
    assert [event.attempt for event in store.events(job.id)][-2:] == [1, 2]
    with pytest.raises(StaleLeaseError):
        store.renew(claim, 60)
    assert store.claim("runner-1", 60) is not None


@pytest.mark.parametrize("state", sorted(set(JobState) - {JobState.FAILED}))
def test_only_a_failed_job_can_be_retried(store: SqlJobStore, state: JobState) -> None:
    job, _ = bring_to(store, state)
    with pytest.raises(IllegalTransitionError, match="only a failed job"):
        store.retry(job.id)


def test_labels_change_only_at_the_revision_that_was_read(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.QUEUED)
    changed = store.patch(job.id, labels={"a": "b"}, priority=7, if_revision=job.revision)
    assert (changed.labels, changed.priority) == ({"a": "b"}, 7)
    with pytest.raises(RevisionMismatchError):
        store.patch(job.id, labels={}, if_revision=job.revision)
    assert store.get(job.id).labels == {"a": "b"}


def test_the_priority_of_a_claimed_job_is_settled(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.RUNNING)
    with pytest.raises(IllegalTransitionError, match="queued"):
        store.patch(job.id, priority=7)


def test_a_heartbeat_is_no_new_revision(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.RUNNING)
    assert claim
    store.renew(claim, 60)
    assert store.get(job.id).revision == job.revision


def test_forgetting_a_job_takes_everything_with_it(store: SqlJobStore) -> None:
    key = IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")
    job, _ = store.submit(new_job(), idempotency=key)
    with pytest.raises(IllegalTransitionError, match="cancel it"):
        store.delete(job.id)
    store.request_cancel(job.id)
    store.delete(job.id)
    assert store.events(job.id) == []
    assert store.submit(new_job(), idempotency=key)[1]


def test_the_backlog_counts_what_waits_and_what_one_token_has_unfinished(
    store: SqlJobStore,
) -> None:
    assert store.backlog("tok_1") == Backlog(queued=0, unfinished=0)
    for state in (JobState.SUCCEEDED, JobState.RUNNING, JobState.CANCELLING, JobState.QUEUED):
        bring_to(store, state, initiator="tok_1")
    bring_to(store, JobState.QUEUED, initiator="tok_2")
    assert store.backlog("tok_1") == Backlog(queued=2, unfinished=3)
    assert store.backlog("tok_3") == Backlog(queued=2, unfinished=0)
