"""The job store under many threads at once: nothing is lost, doubled or shared."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.jobs.errors import AlreadyTerminalError
from service.jobs.records import Claim, EventType, IdempotencyRequest, Progress
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from tests.support.fake_clock import FakeClock
from tests.support.jobs import bring_to, listed, new_job

Result = TypeVar("Result")


def at_once(count: int, work: Callable[[int], Result]) -> list[Result]:
    """Run ``work(0..count-1)`` in threads that start together."""
    gate = threading.Barrier(count)

    def run(number: int) -> Result:
        gate.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def test_events_of_many_writers_are_numbered_without_gaps(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.RUNNING)
    assert claim
    first = store.get(job.id).event_seq

    def write(number: int) -> None:
        for turn in range(10):
            if number % 2:
                store.update_progress(claim, Progress(bytes_done=turn))
            else:
                store.append_event(claim, EventType.JOB_WARNING, {"writer": number, "turn": turn})
            store.patch(job.id, labels={"writer": str(number)})

    at_once(8, write)
    written = store.events(job.id, after=first)
    assert [event.seq for event in written] == list(range(first + 1, first + 81))
    turns = [(e.data["writer"], e.data["turn"]) for e in written if "writer" in e.data]
    for number in range(0, 8, 2):  # each writer's own order is kept
        assert [turn for writer, turn in turns if writer == number] == list(range(10))


def test_no_job_is_claimed_twice(store: SqlJobStore) -> None:
    expected = {store.submit(new_job())[0].id for _ in range(20)}

    def claim_all(number: int) -> list[Claim]:
        claims = []
        while len(claims) < len(expected) and (claim := store.claim(f"runner-{number}", 60)):
            claims.append(claim)
        return claims

    claims = [claim for found in at_once(8, claim_all) for claim in found]
    while (late := store.claim("runner-late", 60)) is not None:  # skipped while others held it
        claims.append(late)
    assert Counter(claim.job_id for claim in claims) == Counter(expected)
    assert {claim.fencing_token for claim in claims} == {1}


def test_a_lapsed_job_passes_to_exactly_one_runner(store: SqlJobStore, clock: FakeClock) -> None:
    bring_to(store, JobState.RUNNING)
    clock.advance(61)
    claims = at_once(8, lambda number: store.claim(f"runner-{number}", 60))
    assert [claim.fencing_token for claim in claims if claim] == [2]


def test_jobs_with_one_output_are_never_claimed_together(store: SqlJobStore) -> None:
    for _ in range(8):
        store.submit(new_job(output_uri="/outputs/contended"))
    claims = at_once(8, lambda number: store.claim(f"runner-{number}", 60))
    assert len([claim for claim in claims if claim]) == 1


def test_jobs_with_outputs_inside_one_another_are_never_claimed_together(
    store: SqlJobStore,
) -> None:
    for number in range(8):
        store.submit(new_job(output_uri="/outputs/sweep" + "/variant" * (number % 2)))
    claims = at_once(8, lambda number: store.claim(f"runner-{number}", 60))
    assert len([claim for claim in claims if claim]) == 1


def test_fifty_equal_submits_make_one_job(store: SqlJobStore) -> None:
    key = IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")
    job = new_job()
    results = at_once(50, lambda _: store.submit(job, idempotency=key))
    assert len({record.id for record, _ in results}) == 1
    assert [created for _, created in results].count(True) == 1
    assert len(listed(store)) == 1


def test_a_cancel_and_a_success_at_once_end_the_job_once(store: SqlJobStore) -> None:
    for _ in range(5):
        job, claim = bring_to(store, JobState.PUBLISHING)
        assert claim

        def finish(claim: Claim = claim) -> None:
            store.transition(claim, JobState.SUCCEEDED, output={"uri": "/o"})

        def cancel(job_id: str = job.id) -> None:
            with contextlib.suppress(AlreadyTerminalError):
                store.request_cancel(job_id)

        steps = (finish, cancel)
        at_once(2, lambda number, steps=steps: steps[number]())
        assert store.get(job.id).state == JobState.SUCCEEDED
        kinds = [event.type for event in store.events(job.id)]
        assert kinds.count(EventType.JOB_FINISHED) == 1


def test_replicas_that_start_together_migrate_once(empty_url: str) -> None:
    stores = at_once(4, lambda _: open_store(empty_url))
    for made in stores:
        made.ping()
        made.close()
