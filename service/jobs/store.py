"""The seam between the service and its database.

The store is the truth about jobs. Three rules hold for every implementation:

- A change of state, and everything that follows from it, is one transaction with its event and
  with what is announced of it (``service.jobs.outbox``).
- Every write of a claimed job carries the claim's fencing token; if that is no longer the job's,
  :class:`~service.jobs.errors.StaleLeaseError` is raised and nothing is written.
- Events of a job are numbered from 1 without gaps, whoever writes them.

All methods are safe to call from many threads and raise
:class:`~service.jobs.errors.StoreUnavailableError` while the database cannot be reached.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from merging.plan.plan import Plan
from service.jobs.news import NewsStore
from service.jobs.outbox import EndpointStore, Outbox
from service.jobs.records import (
    Backlog,
    CancelMode,
    Claim,
    EventRecord,
    EventType,
    IdempotencyRequest,
    JobCursor,
    JobFilter,
    JobHead,
    JobRecord,
    KeptInUse,
    Leftover,
    NewJob,
    NewPlan,
    PlanRecord,
    Progress,
    SessionRecord,
    ShardCounts,
    ShardRecord,
    TokenRecord,
    WorkerRecord,
)
from service.jobs.states import JobState, ShardState


class KeyStore(Protocol):
    """Idempotency keys. A method that makes something takes one in the same transaction.

    It raises :class:`~service.jobs.errors.RepeatedRequestError` if the key has made something
    already, and ``IdempotencyReusedError`` if that was another request.
    """

    def find_created(self, idempotency: IdempotencyRequest) -> str | None:
        """Id of what a key has made already; None if it has made nothing.

        Raises:
            IdempotencyReusedError: The key was used for another request within its lifetime.
        """


class TokenStore(Protocol):
    """API tokens; only a hash of the secret is kept."""

    def create_token(
        self,
        name: str,
        scopes: Sequence[str],
        *,
        expires_at: datetime | None = None,
        idempotency: IdempotencyRequest | None = None,
    ) -> tuple[TokenRecord, str]:
        """Make a token; returns its secret too, which cannot be had again."""

    def import_token(self, name: str, scopes: Sequence[str], secret: str) -> TokenRecord:
        """Keep a token whose secret the operator chose; a repeat returns the first record."""

    def find_token(self, secret: str) -> TokenRecord | None:
        """The token of a secret; None if it is unknown, expired or revoked."""

    def recall_token(self, secret: str) -> TokenRecord | None:
        """What :meth:`find_token` found a moment ago, or None; does not ask the database."""

    def get_token(self, token_id: str) -> TokenRecord:
        """A token, whatever became of it. Raises ``NotFoundError``."""

    def list_tokens(self) -> list[TokenRecord]:
        """All tokens, newest first."""

    def revoke_token(self, token_id: str) -> TokenRecord:
        """Make a token and its sessions useless; repeatable. Raises ``NotFoundError``."""

    def touch_token(self, token_id: str) -> None:
        """Note that a token was used; written at most once a minute."""


class SessionStore(Protocol):
    """Browsers that are logged in; of secrets and codes only a hash is kept."""

    def create_session(self, token_id: str, lifetime: timedelta) -> tuple[SessionRecord, str]:
        """Log a browser in with a token; returns the secret for its cookie too."""

    def find_session(self, secret: str) -> tuple[SessionRecord, TokenRecord] | None:
        """The session of a secret with its token; None if either has ended or is not known."""

    def end_session(self, session_id: str) -> None:
        """Make a session useless; repeatable."""

    def create_login_code(self, token_id: str, lifetime: timedelta) -> str:
        """A code that can be exchanged once for a session of the token."""

    def redeem_login_code(self, code: str) -> str | None:
        """Use a code up; the id of its token, or None if it is unknown, used or too old."""


class PlanStore(Protocol):
    """Plans that were made for somebody to look at."""

    def keep_plan(
        self, plan: NewPlan, *, idempotency: IdempotencyRequest | None = None
    ) -> PlanRecord:
        """Keep a plan for a day."""

    def find_plan(self, plan_id: str) -> PlanRecord:
        """A plan. Raises ``NotFoundError``, also once it has expired."""


class JobQueue(Protocol):
    """What anybody may do with jobs: the API's side of the store."""

    def submit(
        self, job: NewJob, *, idempotency: IdempotencyRequest | None = None
    ) -> tuple[JobRecord, bool]:
        """Queue a job, with its ``job.created`` event and idempotency key in one transaction.

        Returns:
            The job, and whether this call made it (False: the key's first job, as it is now).

        Raises:
            IdempotencyReusedError: The key was used for another request within its lifetime.
        """

    def find_submitted(self, idempotency: IdempotencyRequest) -> JobRecord | None:
        """The job that a key has made already, as it is now; None if it has made none.

        Raises:
            IdempotencyReusedError: The key was used for another request within its lifetime.
        """

    def get(self, job_id: str) -> JobRecord:
        """A job. Raises ``NotFoundError``."""

    @property
    def is_at_hand(self) -> bool:
        """Whether a few rows are read sooner than another thread could be asked to read them.

        So it is for a file on this machine, which nobody who writes keeps from being read.
        """

    def list_heads(
        self,
        job_filter: JobFilter | None = None,
        *,
        cursor: JobCursor | None = None,
        limit: int = 20,
    ) -> list[JobHead]:
        """Which jobs there are, newest first, after the cursor."""

    def get_many(self, job_ids: Collection[str]) -> dict[str, JobRecord]:
        """Jobs by id, as far as they exist."""

    def counts(self) -> dict[JobState, int]:
        """Number of jobs in each state, zeros included."""

    def backlog(self, initiator: str) -> Backlog:
        """How much there is to do, in all and of one token."""

    def request_cancel(self, job_id: str, mode: CancelMode = "orderly") -> JobRecord:
        """Stop a job: a queued one is cancelled at once, a claimed one goes to ``cancelling``.

        May be repeated, and ``orderly`` raised to ``now``.

        Raises:
            NotFoundError: No such job.
            AlreadyTerminalError: It has succeeded or failed.
        """

    def retry(self, job_id: str) -> JobRecord:
        """Queue a failed job again as its next attempt; published shards are reused.

        The plan is dropped and made anew: from unchanged sources it comes out the same, and then
        the receipts of the last attempt still hold.

        Raises:
            NotFoundError: No such job.
            IllegalTransitionError: It has not failed.
        """

    def patch(
        self,
        job_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        if_revision: int | None = None,
    ) -> JobRecord:
        """Replace labels, or the priority of a queued job.

        Raises:
            NotFoundError: No such job.
            RevisionMismatchError: The job is no longer at ``if_revision``.
            IllegalTransitionError: A priority for a job that is not queued.
        """

    def delete(self, job_id: str) -> None:
        """Forget a terminal job and all that belongs to it.

        Raises:
            NotFoundError: No such job.
            IllegalTransitionError: It has not ended.
        """

    def shards(self, job_id: str) -> list[ShardRecord]:
        """The shards of a job in order; empty before there is a plan."""

    def workers(self, since: datetime) -> list[WorkerRecord]:
        """Workers that have a shard now or were seen since then, by name."""

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[EventRecord]:
        """Events with ``seq > after`` in order."""

    def last_event(self, job_id: str) -> tuple[int, bool]:
        """``seq`` of a job's newest event, and whether it is terminal. Raises ``NotFoundError``."""

    def new_events(
        self, positions: Mapping[str, int], *, limit: int = 1000
    ) -> dict[str, list[EventRecord]]:
        """Events of each job with ``seq`` after its position; jobs that are not there are left out.

        ``limit`` is for each job.
        """

    def load_plan(self, job_id: str) -> Plan | None:
        """The stored plan."""

    def load_report(self, job_id: str) -> dict[str, Any] | None:
        """The merge report of a job that has succeeded."""


class ClaimedJobs(Protocol):
    """What only the holder of a lease may do: the runner's side of the store."""

    def claim(self, owner: str, lease_seconds: float, *, overdue: bool = False) -> Claim | None:
        """Take a job to work on; None if there is none. ``overdue``: only one past its deadline.

        Jobs that lost their runner (lease lapsed or released) come first, then queued ones, each
        by priority and age. A queued job becomes ``planning``; others keep their state.
        """

    def renew(self, claim: Claim, lease_seconds: float) -> JobRecord:
        """Extend the lease; the job as it is now (somebody may have asked to cancel it)."""

    def release(self, claim: Claim) -> None:
        """Give the job back as it stands, for any runner to claim."""

    def transition(
        self,
        claim: Claim,
        state: JobState,
        *,
        error: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
        report: Mapping[str, Any] | None = None,
        phase: str | None = None,
    ) -> JobRecord:
        """Go to another state. A terminal one ends the lease and appends ``job.finished``.

        Args:
            claim: The right to do so.
            state: The new state.
            error: Problem object; needed for ``failed``.
            output: What was published; needed for ``succeeded``.
            report: Merge report to keep with a job that succeeds.
            phase: To begin with the state, as :meth:`set_phase` does; of one that is not terminal.

        Raises:
            IllegalTransitionError: The state cannot follow the job's current one.
        """

    def set_phase(self, claim: Claim, name: str, message: str = "") -> JobRecord:
        """Begin a phase and end the one before; nothing happens if it has that name already."""

    def save_plan(self, claim: Claim, plan: Plan, *, phase: str | None = None) -> JobRecord:
        """Keep the plan; sets digest, inputs, warnings and totals, and makes the shard records.

        ``phase`` begins with it, as by :meth:`set_phase`. Nothing happens if it is kept already.
        """

    def record_shard(
        self,
        claim: Claim,
        index: int,
        state: ShardState,
        *,
        attempt: int,
        worker: str | None = None,
        device: str | None = None,
        receipt: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """Note what became of a shard, with its event: ``shard.started``, ``shard.finished`` (also
        of one that failed for good), or ``shard.retried`` for one that is pending again.
        """

    def update_progress(
        self,
        claim: Claim,
        progress: Progress,
        *,
        shards: Sequence[ShardCounts] = (),
        estimated_finish_at: datetime | None = None,
        with_event: bool = True,
    ) -> JobRecord:
        """Note progress, by default with a ``job.progress`` event. Figures never go back."""

    def append_event(self, claim: Claim, event: EventType, data: Mapping[str, Any]) -> EventRecord:
        """Append an event that changes nothing else (``job.warning``)."""


class Leftovers(Protocol):
    """What attempts may have left at their outputs; also successful ones, of workers that died.

    Noted in the transaction in which an attempt ends, and kept when the job is forgotten.
    """

    def take_leftover(
        self, kept_seconds: float, lease_seconds: float, *, after: Leftover | None = None
    ) -> Leftover | None:
        """Take the next one (``after`` another) that may be removed, alone, for so long; or None.

        Not before it is ``kept_seconds`` old, nor while a job with the same output has not ended,
        nor while a younger one of that output must be kept. Until it is given back, or the lease
        ends, no job with that output is claimed.
        """

    def hold_output(self, job_id: str, lease_seconds: float) -> Leftover:
        """Take the output of a job that succeeded, alone, for so long: to remove it.

        Until it is given back, or the lease ends, no job with that output is claimed.

        Raises:
            NotFoundError: No such job.
            IllegalTransitionError: It has not succeeded.
            OutputInUseError: Another job that has not ended writes there or reads from there, a
                later one published there, or somebody is removing what is there already.
        """

    def end_collection(self, leftover: Leftover, *, is_gone: bool) -> None:
        """Give one back; if it ``is_gone``, for good."""

    def kept_in_use(self, kept_seconds: float) -> KeptInUse:
        """The files of statistics that jobs may still want, those that ended so long ago not."""


class JobStore(
    KeyStore,
    JobQueue,
    PlanStore,
    ClaimedJobs,
    Leftovers,
    TokenStore,
    SessionStore,
    EndpointStore,
    Outbox,
    NewsStore,
    Protocol,
):
    """Everything that the service keeps."""

    def ping(self) -> None:
        """Raise ``StoreUnavailableError`` unless the database answers and its schema is current."""

    def close(self) -> None:
        """Let go of connections."""
