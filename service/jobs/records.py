"""What the job store gives and takes: frozen values, never table rows.

Times are aware datetimes in UTC; sizes are bytes; JSON-like fields hold plain dictionaries.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

import msgspec

from merging.plan.plan import Kind, Plan
from service.jobs.states import TERMINAL, JobState, ShardState

CancelMode = Literal["orderly", "now"]
"""Orderly lets workers abort their uploads; ``now`` ends their processes."""


class EventType(StrEnum):
    """Everything that can be told of a job; dotted, past tense."""

    JOB_CREATED = "job.created"
    JOB_STATE_CHANGED = "job.state_changed"
    JOB_PHASE_CHANGED = "job.phase_changed"
    JOB_PROGRESS = "job.progress"
    JOB_WARNING = "job.warning"
    JOB_LOGGED = "job.logged"
    JOB_OUTPUT_COMMITTED = "job.output_committed"
    JOB_FINISHED = "job.finished"
    INTEGRATION_FINISHED = "integration.finished"
    SHARD_STARTED = "shard.started"
    SHARD_FINISHED = "shard.finished"
    SHARD_RETRIED = "shard.retried"


class Progress(msgspec.Struct, frozen=True):
    """How far a job is. Bytes count reading and writing; never goes back within an attempt."""

    shards_done: int = 0
    shards_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    tensors_done: int = 0
    tensors_total: int = 0


class Phase(msgspec.Struct, frozen=True):
    """One step of an attempt, finer than the state; ``finished_at`` is None while it lasts."""

    name: str
    started_at: datetime
    finished_at: datetime | None = None
    message: str = ""


class IntegrationState(StrEnum):
    """How far an integration is with a job."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # given up; the merge is not touched by it


class JobIntegration(msgspec.Struct, frozen=True):
    """What is told of a job elsewhere, by one integration (``service/integrations``).

    Attributes:
        name: Of the integration.
        options: As the job asked for it.
        url: What it made, once it has.
        error: Why the last try failed: ``code`` and ``detail``.
    """

    name: str
    options: dict[str, Any] = {}
    state: IntegrationState = IntegrationState.PENDING
    url: str | None = None
    error: dict[str, str] | None = None


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be submitted. The recipe has been validated by the caller.

    Attributes:
        recipe_source: The recipe as it was sent: YAML or JSON text, or a mapping.
        recipe: Its normalised form, as ``recipe_digest`` covers it.
        method: Name of the recipe's method: of several documents, that of the published one.
        methods: Of all documents in the order of their steps, or of all variants; each once.
        output_uri: Where the merged checkpoint goes.
        options: :class:`merging.options.MergeOptions` as a dictionary.
        inputs: ``{"uri", "role", "digest"}`` each; the plan's replace them once it is made.
        warnings: What the user should know.
        labels: For finding jobs.
        metadata: For the user's own notes.
        priority: Higher is claimed first.
        deadline_seconds: From being queued; a job not finished by then fails.
        initiator: Id of the token that submitted it.
        resubmitted_from: Id of the job whose recipe this is.
        plan_id: Id of the stored plan that it is to run.
        pinned_plan_digest: That plan's digest; a run that is planned otherwise fails.
        traceparent: Place of the request in its trace (W3C Trace Context), if there is one.
        integrations: Who is told of it.
        type: Kind of work; only ``merge`` for now.
    """

    recipe_source: str | dict[str, Any]
    recipe: dict[str, Any]
    recipe_digest: str
    method: str
    methods: tuple[str, ...]
    output_uri: str
    options: dict[str, Any] = {}
    inputs: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    metadata: dict[str, str] = {}
    priority: int = 0
    deadline_seconds: float | None = None
    initiator: str | None = None
    resubmitted_from: str | None = None
    plan_id: str | None = None
    pinned_plan_digest: str | None = None
    traceparent: str | None = None
    integrations: tuple[JobIntegration, ...] = ()
    type: str = "merge"


class NewPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A merge that was planned, to be looked at and perhaps run.

    Attributes:
        recipe_source: The recipe as it was sent.
        options: :class:`merging.options.MergeOptions` as a dictionary.
        summary: :func:`merging.plan.summary.plan_summary`, with output, inputs and digest.
    """

    recipe_source: str | dict[str, Any]
    options: dict[str, Any]
    summary: dict[str, Any]


class PlanRecord(NewPlan, frozen=True, kw_only=True):
    """A stored plan; after ``expires_at`` there is none."""

    id: str
    created_at: datetime
    expires_at: datetime


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it stands; the fields of :class:`NewJob` and everything that has happened since.

    Attributes:
        id: ``job_…``, ordered by time of creation.
        attempt: From 1; a retry adds one.
        revision: Rises with every visible change; the basis of the API's ETag.
        event_seq: Number of the job's last event.
        queued_at: When this attempt was queued.
        started_at: When a runner first claimed this attempt.
        phases: Of this attempt, oldest first; the last one is the current phase.
        plan_digest: Digest of the stored plan, once there is one.
        output: ``{"uri", "digest", "files", …}`` once the output is published and verified.
        error: A problem object (RFC 9457) if the job failed.
        lease_owner: The runner that works on it.
        fencing_token: Rises with every claim; writes with an older one are refused.
        takeovers: Claims of a lapsed lease in a row without progress between them.
        cancel_requested: How somebody asked to stop it.
    """

    id: str
    type: str
    state: JobState
    attempt: int
    revision: int
    event_seq: int
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    estimated_finish_at: datetime | None
    progress: Progress
    phases: tuple[Phase, ...]
    recipe_source: str | dict[str, Any]
    recipe: dict[str, Any]
    recipe_digest: str
    plan_digest: str | None
    method: str
    methods: tuple[str, ...]
    output_uri: str
    options: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    output: dict[str, Any] | None
    error: dict[str, Any] | None
    warnings: tuple[str, ...]
    labels: dict[str, str]
    metadata: dict[str, str]
    priority: int
    deadline_seconds: float | None
    initiator: str | None
    resubmitted_from: str | None
    plan_id: str | None
    pinned_plan_digest: str | None
    traceparent: str | None
    integrations: tuple[JobIntegration, ...]
    lease_owner: str | None
    lease_expires_at: datetime | None
    fencing_token: int
    takeovers: int
    cancel_requested: CancelMode | None

    @property
    def is_terminal(self) -> bool:
        """Nothing more will happen to it by itself."""
        return self.state in TERMINAL

    @property
    def phase(self) -> str | None:
        """Name of the phase it is in, or ended in."""
        return self.phases[-1].name if self.phases else None


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A shard of a job.

    Attributes:
        index: In the order of the plan.
        kind: ``weights`` of the output, or an ``intermediate`` file that goes when it is published.
        attempt: Tries at this shard so far.
        tensors_total: Problems in it.
        tensors_fetched: Of the current or last try; likewise solved and written.
        bytes_read_total: Bytes to be read for it.
        bytes_total: Size of the file.
        receipt: :class:`merging.receipts.Receipt` without the figures per tensor, which are in the
            merge report, except for ``interference_removed``: one share or null per tensor.
        error: Why the last try failed (``MergeError.to_dict``).
    """

    index: int
    file_name: str
    kind: Kind
    state: ShardState
    attempt: int
    tensors_total: int
    tensors_fetched: int
    tensors_solved: int
    tensors_written: int
    bytes_read_total: int
    bytes_total: int
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    device: str | None
    receipt: dict[str, Any] | None
    error: dict[str, Any] | None


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What shards say of a worker process; one that has long been idle may be gone.

    Attributes:
        worker: ``host:pid``.
        device: Where it solves (``cpu``, ``cuda:0 NVIDIA …``).
        job_id: Of the shard that it works on now; likewise the next three. None: idle.
        shards_done: Published by it in the time that was asked for.
        bytes_done: Read and written for these.
        last_seen_at: When it last took a shard up or published one.
    """

    worker: str
    device: str
    job_id: str | None = None
    shard_index: int | None = None
    file_name: str | None = None
    started_at: datetime | None = None
    shards_done: int = 0
    bytes_done: int = 0
    last_seen_at: datetime


class ShardCounts(msgspec.Struct, frozen=True, array_like=True):
    """How far one shard is; encoded as ``[shard_index, fetched, solved, written]`` in events."""

    shard_index: int
    tensors_fetched: int
    tensors_solved: int
    tensors_written: int


class EventRecord(msgspec.Struct, frozen=True):
    """Something that happened to a job; ``seq`` counts from 1 per job without gaps.

    Its JSON is what the API shows (``service.api.objects.EventObject``).
    """

    seq: int
    type: EventType
    time: datetime
    job_id: str
    attempt: int
    data: dict[str, Any]


class Claim(msgspec.Struct, frozen=True):
    """The right to work on a job until the lease lapses or is taken over.

    ``job`` is as it was at the claim, ``claimed_at`` the time of the store's clock. Every write
    takes the claim and is refused (:class:`service.jobs.errors.StaleLeaseError`) once the fencing
    token is no longer the job's.
    """

    job: JobRecord
    owner: str
    fencing_token: int
    claimed_at: datetime

    @property
    def job_id(self) -> str:
        """Whose claim it is."""
        return self.job.id


class Leftover(msgspec.Struct, frozen=True):
    """An attempt that ended, and may have left files at its output that nobody needs.

    ``began_at`` and ``ended_at`` are when it was queued and when it ended.
    """

    job_id: str
    attempt: int
    plan: Plan
    began_at: datetime
    ended_at: datetime


class KeptInUse(msgspec.Struct, frozen=True):
    """Names of kept files that jobs may want; those that ended ``before`` then want none."""

    names: frozenset[str]
    before: datetime


class IdempotencyRequest(msgspec.Struct, frozen=True):
    """An ``Idempotency-Key`` with its scope; ``fingerprint`` is a hash of the canonical body."""

    owner: str
    method: str
    path: str
    key: str
    fingerprint: str


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs to list; empty fields do not filter. Labels must all match.

    ``method`` is one of a job's :attr:`JobRecord.methods`.
    ``text`` is words, each of which must be somewhere in what the job is found by
    (``service.jobs.search``).
    """

    states: tuple[JobState, ...] = ()
    labels: dict[str, str] = {}
    method: str | None = None
    created_after: datetime | None = None
    text: str | None = None
    initiator: str | None = None


class JobHead(msgspec.Struct, frozen=True):
    """Where a job stands in lists, and at which revision it is."""

    id: str
    revision: int
    created_at: datetime


class Backlog(msgspec.Struct, frozen=True):
    """Work that is not done: jobs in the queue, and unfinished jobs of one token."""

    queued: int
    unfinished: int


class JobCursor(msgspec.Struct, frozen=True):
    """A position in the list of jobs, newest first: the last job already seen."""

    created_at: datetime
    id: str


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An API token without its secret; ``prefix`` is what people recognise it by."""

    id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A browser that is logged in with a token; the secret is in its cookie only."""

    id: str
    token_id: str
    created_at: datetime
    expires_at: datetime
