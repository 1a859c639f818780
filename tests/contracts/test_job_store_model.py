"""The job store against a model of it, under random sequences of what users and runners do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from service.jobs.errors import IllegalTransitionError, StaleLeaseError
from service.jobs.records import Claim, EventType
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import TERMINAL, JobState, is_allowed
from service.jobs.tables import ACTIVE
from tests.support.fake_clock import FakeClock
from tests.support.jobs import ERROR, OUTPUT, new_job
from tests.support.postgres import PostgresServer

LEASE_SECONDS = 60
PROFILE = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # a database is slower than Hypothesis expects
)


@dataclass
class Expected:
    """What the model knows of a job."""

    state: JobState = JobState.QUEUED
    attempt: int = 1
    fencing_token: int = 0
    held_until: float | None = None
    endings: int = 0


class StoreMachine(RuleBasedStateMachine):
    """Users submit, cancel and retry; runners claim, renew, move on, die and come back."""

    open_store: Callable[[FakeClock], SqlJobStore]
    job_ids = Bundle("job_ids")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.store = type(self).open_store(self.clock)
        self.model: dict[str, Expected] = {}

    def teardown(self) -> None:
        self.store.close()

    def holds(self, claim: Claim) -> bool:
        job = self.model[claim.job_id]
        return job.held_until is not None and job.fencing_token == claim.fencing_token

    def end(self, job: Expected, state: JobState) -> None:
        job.state = state
        if state in TERMINAL:
            job.held_until = None
            job.endings += 1

    @rule(target=job_ids)
    def submit(self) -> str:
        job, _ = self.store.submit(new_job())
        self.model[job.id] = Expected()
        self.clock.advance(1)
        return job.id

    @rule(target=claims, owner=st.sampled_from(["runner-1", "runner-2"]))
    def claim(self, owner: str) -> object:
        free = {
            job_id
            for job_id, job in self.model.items()
            if job.state not in TERMINAL
            and (job.held_until is None or job.held_until <= self.clock.monotonic())
        }
        claim = self.store.claim(owner, LEASE_SECONDS)
        if claim is None:
            assert not free
            return multiple()
        assert claim.job_id in free
        job = self.model[claim.job_id]
        job.fencing_token += 1
        job.held_until = self.clock.monotonic() + LEASE_SECONDS
        job.state = JobState.PLANNING if job.state == JobState.QUEUED else job.state
        return claim

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        if self.holds(claim):
            assert self.store.renew(claim, LEASE_SECONDS).state == self.model[claim.job_id].state
            self.model[claim.job_id].held_until = self.clock.monotonic() + LEASE_SECONDS
        else:
            with pytest.raises(StaleLeaseError):
                self.store.renew(claim, LEASE_SECONDS)

    @rule(claim=consumes(claims))
    def release(self, claim: Claim) -> None:
        if self.holds(claim):
            self.store.release(claim)
            self.model[claim.job_id].held_until = None
        else:
            with pytest.raises(StaleLeaseError):
                self.store.release(claim)

    @rule(claim=claims, state=st.sampled_from([*JobState]))
    def transition(self, claim: Claim, state: JobState) -> None:
        job = self.model[claim.job_id]
        facts = {JobState.FAILED: {"error": ERROR}, JobState.SUCCEEDED: {"output": OUTPUT}}

        def go() -> None:
            self.store.transition(claim, state, **facts.get(state, {}))

        if not self.holds(claim):
            with pytest.raises(StaleLeaseError):
                go()
        elif not is_allowed(job.state, state):
            with pytest.raises(IllegalTransitionError):
                go()
        else:
            go()
            self.end(job, state)

    @rule(job_id=job_ids)
    def cancel(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.state in (JobState.SUCCEEDED, JobState.FAILED):
            with pytest.raises(IllegalTransitionError):
                self.store.request_cancel(job_id)
            return
        self.store.request_cancel(job_id)
        if job.state == JobState.QUEUED:
            self.end(job, JobState.CANCELLED)
        elif job.state in ACTIVE:
            job.state = JobState.CANCELLING

    @rule(job_id=job_ids)
    def retry(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.state != JobState.FAILED:
            with pytest.raises(IllegalTransitionError):
                self.store.retry(job_id)
            return
        self.store.retry(job_id)
        job.state = JobState.QUEUED
        job.attempt += 1

    @rule(seconds=st.sampled_from([1, 30, LEASE_SECONDS]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @invariant()
    def store_agrees_with_model(self) -> None:
        for job_id, expected in self.model.items():
            job = self.store.get(job_id)
            assert (job.state, job.attempt, job.fencing_token) == (
                expected.state,
                expected.attempt,
                expected.fencing_token,
            )
            assert (job.lease_owner is None) == (expected.held_until is None)
            events = self.store.events(job_id)
            assert [event.seq for event in events] == list(range(1, job.event_seq + 1))
            kinds = [event.type for event in events]
            assert kinds.count(EventType.JOB_FINISHED) == expected.endings


def test_the_store_behaves_like_its_model_on_sqlite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        databases = iter(range(10**6))

        class SqliteMachine(StoreMachine):
            @staticmethod
            def open_store(clock: FakeClock) -> SqlJobStore:
                return open_store(f"sqlite:///{Path(folder)}/{next(databases)}.db", clock=clock)

        run_state_machine_as_test(SqliteMachine, settings=PROFILE)


@pytest.mark.postgres
def test_the_store_behaves_like_its_model_on_postgres(postgres_server: PostgresServer) -> None:
    class PostgresMachine(StoreMachine):
        @staticmethod
        def open_store(clock: FakeClock) -> SqlJobStore:
            return open_store(postgres_server.empty_database(), clock=clock)

    run_state_machine_as_test(PostgresMachine, settings=PROFILE)
