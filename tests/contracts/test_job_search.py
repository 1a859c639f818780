"""Text search over all jobs."""

from __future__ import annotations

import pytest

from service.jobs.records import JobCursor, JobFilter
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState
from tests.support.fake_clock import FakeClock
from tests.support.jobs import ERROR, bring_to, listed, new_job


def found(store: SqlJobStore, text: str) -> list[str]:
    return [job.output_uri for job in listed(store, JobFilter(text=text))]


@pytest.fixture
def filled(store: SqlJobStore, clock: FakeClock) -> SqlJobStore:
    models = ({"uri": "s3://models/Llama-3", "role": "base"},)
    store.submit(new_job(output_uri="s3://out/chat_v1", method="ties", inputs=models))
    clock.advance(1)
    store.submit(new_job(output_uri="s3://out/100%", labels={"team": "Zürich", "x": "a b"}))
    clock.advance(1)
    bring_to(store, JobState.FAILED, output_uri="s3://out/broken")
    return store


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("CHAT", ["chat_v1"]),
        ("llama-3 ties", ["chat_v1"]),
        ("ties linear", []),
        ("out", ["broken", "100%", "chat_v1"]),
        ("team=zÜrich", ["100%"]),
        ("x=a", ["100%"]),
        (ERROR["code"], ["broken"]),
        ("it is not there.", ["broken"]),
        ("0%", ["100%"]),
        ("t_v", ["chat_v1"]),
        ("tXv", []),
        ("\\", []),
        ("job_", ["broken", "100%", "chat_v1"]),
    ],
)
def test_every_word_is_found_wherever_it_is(
    filled: SqlJobStore, text: str, outputs: list[str]
) -> None:
    assert found(filled, text) == [f"s3://out/{name}" for name in outputs]


def test_a_job_is_found_by_the_beginning_of_its_id(filled: SqlJobStore) -> None:
    job = listed(filled)[0]
    assert found(filled, job.id[:24].upper()) == [job.output_uri]


def test_search_follows_what_changes(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.FAILED, labels={"stage": "draft"})
    store.patch(job.id, labels={"stage": "final"})
    assert found(store, "stage=draft") == []
    assert found(store, "stage=final missing_tensor") == [job.output_uri]
    store.retry(job.id)
    assert found(store, "missing_tensor") == []
    store.request_cancel(job.id)
    store.delete(job.id)
    assert found(store, "final") == []


def test_search_goes_with_other_filters_and_pages(store: SqlJobStore, clock: FakeClock) -> None:
    for number in range(6):
        store.submit(new_job(output_uri=f"/out/{'even' if number % 2 == 0 else 'odd'}{number}"))
        clock.advance(1)
    search = JobFilter(text="even", states=(JobState.QUEUED,))
    first = listed(store, search, limit=2)
    rest = listed(store, search, cursor=JobCursor(first[-1].created_at, first[-1].id))
    assert [job.output_uri for job in (*first, *rest)] == ["/out/even4", "/out/even2", "/out/even0"]
    assert listed(store, JobFilter(text="even", states=(JobState.FAILED,))) == []
