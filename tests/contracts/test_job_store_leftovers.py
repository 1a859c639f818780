"""What attempts leave behind: noted when they end, given out for removal when nobody wants it."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest

from merging.plan.plan import Plan
from merging.plan.statistics_work import kept_name
from service.jobs.errors import IllegalTransitionError, NotFoundError, OutputInUseError
from service.jobs.records import Claim, JobRecord
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState
from tests.contracts.test_job_store_concurrency import at_once
from tests.support.fake_clock import FakeClock
from tests.support.jobs import ERROR, OUTPUT, new_job, tiny_plan

KEPT = 1000.0
LEASE = 60.0
URI = "/outputs/shared"


def begin(store: SqlJobStore, output_uri: str = URI) -> tuple[JobRecord, Claim]:
    """A job that has a plan."""
    job, _ = store.submit(new_job(output_uri=output_uri))
    claim = store.claim("runner-1", 3600)
    assert claim is not None
    assert claim.job_id == job.id
    return store.save_plan(claim, tiny_plan(output_uri)), claim


def fail(store: SqlJobStore, output_uri: str = URI) -> JobRecord:
    """A job that failed after it was planned."""
    _, claim = begin(store, output_uri)
    return store.transition(claim, JobState.FAILED, error=ERROR)


def test_what_a_failed_job_left_is_given_out_once_it_has_been_kept_long_enough(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, claim = begin(store)
    clock.advance(50)
    store.transition(claim, JobState.FAILED, error=ERROR)
    ended_at = clock()
    clock.advance(KEPT - 1)
    assert store.take_leftover(KEPT, LEASE) is None
    clock.advance(1)
    found = store.take_leftover(KEPT, LEASE)
    assert found is not None
    assert (found.job_id, found.attempt) == (job.id, 1)
    assert (found.began_at, found.ended_at) == (job.queued_at, ended_at)
    assert found.plan == tiny_plan(URI)
    store.end_collection(found, is_gone=True)
    clock.advance(10 * KEPT)
    assert store.take_leftover(KEPT, LEASE) is None


def test_cancelled_and_forgotten_jobs_are_no_exceptions(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, claim = begin(store)
    store.request_cancel(job.id)
    store.transition(claim, JobState.CANCELLED)
    store.delete(job.id)
    clock.advance(KEPT)
    found = store.take_leftover(KEPT, LEASE)
    assert found is not None
    assert found.job_id == job.id


def test_jobs_that_succeeded_may_have_left_uploads_of_lost_workers(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job, claim = begin(store)
    for state in (JobState.RUNNING, JobState.PUBLISHING):
        store.transition(claim, state)
    store.transition(claim, JobState.SUCCEEDED, output=OUTPUT)
    clock.advance(KEPT)
    found = store.take_leftover(KEPT, LEASE)
    assert found is not None
    assert found.job_id == job.id


def test_jobs_that_were_never_planned_leave_nothing(store: SqlJobStore, clock: FakeClock) -> None:
    store.submit(new_job())
    unplanned = store.claim("runner-1", 60)
    assert unplanned is not None
    store.transition(unplanned, JobState.FAILED, error=ERROR)
    clock.advance(KEPT)
    assert store.take_leftover(KEPT, LEASE) is None


@pytest.mark.parametrize("how", ["queued", "running", "retried", "younger"])
def test_what_another_job_may_go_on_from_is_kept(
    store: SqlJobStore, clock: FakeClock, how: str
) -> None:
    job = fail(store)
    clock.advance(KEPT)
    if how == "queued":
        store.submit(new_job(output_uri=URI))
    elif how == "running":
        begin(store)
    elif how == "retried":
        store.retry(job.id)
    else:
        fail(store)
    assert store.take_leftover(KEPT, LEASE) is None


def test_no_job_is_claimed_while_its_output_is_cleared(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job = fail(store)
    clock.advance(KEPT)
    found = store.take_leftover(KEPT, LEASE)
    assert found is not None
    store.retry(job.id)
    other, _ = store.submit(new_job())
    claim = store.claim("runner-1", 60)
    assert claim is not None
    assert claim.job_id == other.id
    assert store.claim("runner-1", 60) is None
    store.end_collection(found, is_gone=True)
    claim = store.claim("runner-1", 60)
    assert claim is not None
    assert claim.job_id == job.id


def test_what_could_not_be_removed_is_given_out_again(store: SqlJobStore, clock: FakeClock) -> None:
    jobs = sorted((fail(store, f"/outputs/{number}") for number in range(3)), key=lambda j: j.id)
    clock.advance(KEPT)
    last, seen = None, []
    while (last := store.take_leftover(KEPT, LEASE, after=last)) is not None:
        seen.append(last.job_id)
        if len(seen) != 2:  # the second collector dies
            store.end_collection(last, is_gone=len(seen) == 1)
    assert seen == [job.id for job in jobs]
    again = store.take_leftover(KEPT, LEASE)
    assert again is not None
    assert again.job_id == jobs[2].id
    clock.advance(LEASE)
    again = store.take_leftover(KEPT, LEASE)
    assert again is not None
    assert again.job_id == jobs[1].id


def succeed(store: SqlJobStore, output_uri: str = URI) -> JobRecord:
    """A job that published something."""
    _, claim = begin(store, output_uri)
    for state in (JobState.RUNNING, JobState.PUBLISHING):
        store.transition(claim, state)
    return store.transition(claim, JobState.SUCCEEDED, output={**OUTPUT, "uri": output_uri})


@pytest.mark.parametrize("was_collected", [False, True])
def test_no_job_is_claimed_while_an_output_is_removed(
    store: SqlJobStore, clock: FakeClock, was_collected: bool
) -> None:
    job = succeed(store)
    if was_collected:
        clock.advance(KEPT)
        found = store.take_leftover(KEPT, LEASE)
        assert found is not None
        store.end_collection(found, is_gone=True)
    held = store.hold_output(job.id, LEASE)
    assert (held.job_id, held.plan) == (job.id, tiny_plan(URI))
    with pytest.raises(OutputInUseError, match="removes what is there already"):
        store.hold_output(job.id, LEASE)
    waiting, _ = store.submit(new_job(output_uri=f"{URI}/variant"))
    assert store.claim("runner-1", 60) is None
    store.end_collection(held, is_gone=True)
    claim = store.claim("runner-1", 60)
    assert claim is not None
    assert claim.job_id == waiting.id


def test_a_removal_whose_process_died_can_be_done_again(
    store: SqlJobStore, clock: FakeClock
) -> None:
    job = succeed(store)
    store.hold_output(job.id, LEASE)
    clock.advance(LEASE)
    assert store.hold_output(job.id, LEASE).job_id == job.id


@pytest.mark.parametrize("use", ["writes", "writes inside", "reads", "reads inside", "was later"])
def test_an_output_that_another_job_needs_is_not_given_out(
    store: SqlJobStore, clock: FakeClock, use: str
) -> None:
    job = succeed(store)
    place = f"{URI}/inside" if "inside" in use else URI
    if use == "was later":
        clock.advance(1)
        other = succeed(store)
    elif "writes" in use:
        other, _ = store.submit(new_job(output_uri=place))
    else:
        other, _ = store.submit(new_job(inputs=({"uri": place, "role": "base", "digest": "d"},)))
    with pytest.raises(OutputInUseError, match=other.id):
        store.hold_output(job.id, LEASE)
    if use == "was later":
        job = other
    else:
        store.request_cancel(other.id)
    assert store.hold_output(job.id, LEASE).job_id == job.id


def test_neighbours_of_an_output_do_not_need_it(store: SqlJobStore) -> None:
    job = succeed(store)
    inputs = ({"uri": f"{URI}-2", "role": "base", "digest": "d"},)
    store.submit(new_job(output_uri=f"{URI}-3", inputs=inputs))
    assert store.hold_output(job.id, LEASE).job_id == job.id


def test_only_jobs_that_succeeded_have_an_output(store: SqlJobStore) -> None:
    for job in (fail(store), store.submit(new_job())[0]):
        with pytest.raises(IllegalTransitionError, match="only one that succeeded"):
            store.hold_output(job.id, LEASE)
    with pytest.raises(NotFoundError):
        store.hold_output("job_none", LEASE)


def test_many_collectors_never_remove_the_same(store: SqlJobStore, clock: FakeClock) -> None:
    expected = {fail(store, f"/outputs/{number}").id for number in range(6)}
    clock.advance(KEPT)

    def take_all(_: int) -> list[str]:
        found, last = [], None
        while (last := store.take_leftover(KEPT, LEASE, after=last)) is not None:
            found.append(last.job_id)
        return found

    taken = [job_id for found in at_once(4, take_all) for job_id in found]
    while (late := store.take_leftover(KEPT, LEASE)) is not None:  # skipped while others held it
        taken.append(late.job_id)
    assert sorted(taken) == sorted(expected)


def plan_with_statistics(output_uri: str, *names: str) -> Plan:
    plan = tiny_plan(output_uri, shards=len(names) + 1)
    early = [
        msgspec.structs.replace(shard, file_name=name, kind="intermediate", folder="/kept")
        for shard, name in zip(plan.shards, names, strict=False)
    ]
    return msgspec.structs.replace(plan, shards=(*early, plan.shards[-1]))


def test_statistics_are_in_use_while_a_job_wants_them_and_for_a_while_after(
    store: SqlJobStore, clock: FakeClock
) -> None:
    first, second = kept_name("a", 0), kept_name("b", 1)
    claims = []
    for number, names in enumerate(([first], [first, second])):
        store.submit(new_job(output_uri=f"/outputs/{number}"))
        claim = store.claim("runner-1", 10 * KEPT)
        assert claim is not None
        store.save_plan(claim, plan_with_statistics(f"/outputs/{number}", *names))
        claims.append(claim)
    assert store.kept_in_use(0).names == {first, second}
    assert store.kept_in_use(KEPT).before == clock() - timedelta(seconds=KEPT)
    store.transition(claims[1], JobState.FAILED, error=ERROR)
    clock.advance(KEPT - 1)
    assert store.kept_in_use(KEPT).names == {first, second}
    clock.advance(1)
    assert store.kept_in_use(KEPT).names == {first}
    store.transition(claims[0], JobState.FAILED, error=ERROR)
    assert store.kept_in_use(KEPT).names == {first}
    assert store.kept_in_use(0).names == frozenset()
