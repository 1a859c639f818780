"""Bodies of answers; never table rows. Every field is always there; null means not known yet."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from merging.plan.plan import Kind
from service.jobs.news import NewsType
from service.jobs.records import CancelMode, EventType
from service.jobs.states import JobState, ShardState

Item = TypeVar("Item")

METHODS = "Of all documents in the order of their steps, or of all variants; each once."


class Page(BaseModel, Generic[Item]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Item]
    next_cursor: str | None = None
    next_url: str | None = None


class ProgressObject(BaseModel):
    """How far a job is."""

    shards_done: int
    shards_total: int
    bytes_done: int
    bytes_total: int
    tensors_done: int
    tensors_total: int


class PhaseObject(BaseModel):
    """One step of an attempt."""

    name: str
    started_at: datetime
    finished_at: datetime | None
    message: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    errors: list[dict[str, str]] = []
    instance: str | None = None
    request_id: str | None = None
    retry_after_seconds: int | None = None


class IntegrationObject(BaseModel):
    """What became of telling somebody elsewhere of a job; never the job's failure."""

    name: str
    options: dict[str, Any]
    state: Literal["pending", "succeeded", "failed", "skipped"]
    url: str | None
    error: dict[str, Any] | None = Field(description="A problem object: why the last try failed.")


class JobObject(BaseModel):
    """A job as lists show it."""

    object: Literal["job"] = "job"
    id: str
    type: str
    state: JobState
    is_terminal: bool
    phase: str | None
    attempt: int
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    estimated_finish_at: datetime | None
    progress: ProgressObject
    phases: list[PhaseObject]
    recipe_digest: str
    plan_digest: str | None
    method: str = Field(description="Of several documents, that of the published one.")
    methods: list[str] = Field(description=METHODS)
    inputs: list[dict[str, Any]]
    output_uri: str
    output: dict[str, Any] | None
    error: dict[str, Any] | None = Field(description="A problem object, if it failed.")
    warnings: list[str]
    labels: dict[str, str]
    metadata: dict[str, str]
    priority: int
    deadline_seconds: float | None
    seed: int
    initiator: str | None
    resubmitted_from: str | None
    plan_id: str | None
    cancel_requested: CancelMode | None
    integrations: list[IntegrationObject]
    url: str
    etag: str


class JobDetail(JobObject):
    """A job with what it was asked to do."""

    recipe_source: str | dict[str, Any] = Field(description="The recipe as it was sent.")
    recipe: dict[str, Any] = Field(description="The recipe in its normal form.")
    options: dict[str, Any]


class JobCounts(BaseModel):
    """Number of jobs by state."""

    object: Literal["job_counts"] = "job_counts"
    counts: dict[JobState, int]


class ShardObject(BaseModel):
    """One file of a job, and how far it is: ``weights`` of the output, or ``intermediate``."""

    object: Literal["shard"] = "shard"
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


class WorkerTask(BaseModel):
    """The shard that a worker has."""

    job_id: str
    shard_index: int
    file_name: str
    started_at: datetime


class WorkerObject(BaseModel):
    """A worker process, as shards know it. One that has long been idle may be gone."""

    object: Literal["worker"] = "worker"
    id: str = Field(description="Host and process.")
    node: str
    device: str
    is_busy: bool
    task: WorkerTask | None
    shards_done: int = Field(description="In the time that was asked for.")
    bytes_done: int = Field(description="Read and written for these shards.")
    last_seen_at: datetime


class EventObject(BaseModel):
    """Something that happened to a job; ``seq`` counts from 1 without gaps."""

    seq: int
    type: EventType
    time: datetime
    job_id: str
    attempt: int
    data: dict[str, Any]


class NewsObject(BaseModel):
    """Something that happened; ``position`` rises over all of them, with gaps.

    Of what is not the event of a job, members are null or empty; ``subject`` says what it is about.
    """

    position: int
    type: EventType | NewsType
    time: datetime
    subject: str = Field(description="Id of the job, token or webhook endpoint.")
    job_id: str | None
    seq: int | None = Field(description="Of the job's event among its own.")
    attempt: int | None
    state: JobState | None = Field(description="Of the job after the event.")
    data: dict[str, Any] = Field(description="Of the job's event.")
    labels: dict[str, str] = Field(description="Of the job as they are now.")
    method: str | None
    methods: list[str] = Field(description="Of the job.")
    initiator: str | None


class JobResult(BaseModel):
    """What came of a job, for clients that look at status codes."""

    object: Literal["job_result"] = "job_result"
    job_id: str
    state: JobState
    output: dict[str, Any] | None


class PlanObject(BaseModel):
    """What a job would do. Members beyond these are those of the plan's summary."""

    model_config = ConfigDict(extra="allow")

    object: Literal["plan"] = "plan"
    id: str
    created_at: datetime
    expires_at: datetime
    url: str
    plan_digest: str
    recipe_digest: str


class PlannedTensor(BaseModel):
    """A tensor of a job's output: in which shard, what for, and what making it takes.

    ``kind`` is that of the shard's file: ``weights``, or ``intermediate`` for what is made of the
    tensor on the way, whose shape and type these then are.
    """

    name: str
    shard: int
    kind: Kind
    role: str
    layer: int = Field(description="-1 outside the layers.")
    shape: tuple[int, ...]
    dtype: str
    method: str
    bytes_read: int
    flops: float


class JobPlan(BaseModel):
    """The plan that a job runs. Members beyond these are those of the plan's summary."""

    model_config = ConfigDict(extra="allow")

    object: Literal["job_plan"] = "job_plan"
    created_at: datetime = Field(description="Of the job.")
    job_id: str
    plan_digest: str
    recipe_digest: str
    layout: list[PlannedTensor] = Field(description="In the order of the output files.")


class FaultObject(BaseModel):
    """One thing that is wrong with a recipe."""

    pointer: str
    code: str
    detail: str


class RecipeValidation(BaseModel):
    """Whether a recipe is well formed; storage is not looked at."""

    object: Literal["recipe_validation"] = "recipe_validation"
    is_valid: bool
    errors: list[FaultObject]
    warnings: list[str]
    method: str | None
    methods: list[str] = Field(description=METHODS)
    recipe: dict[str, Any] | None
    recipe_digest: str | None


class MethodObject(BaseModel):
    """A merge method and its parameters."""

    model_config = ConfigDict(extra="allow")

    object: Literal["method"] = "method"
    name: str
    title: str
    summary: str
    source: str
    parameters: dict[str, Any]
    expert_parameters: dict[str, Any]


class TokenObject(BaseModel):
    """An API token without its secret."""

    object: Literal["token"] = "token"
    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewToken(TokenObject):
    """A token that was just made."""

    secret: str = Field(description="Shown this once.")


class SessionObject(BaseModel):
    """Who asks. Without a session (a token was sent) its own fields are null."""

    object: Literal["session"] = "session"
    id: str | None
    created_at: datetime | None
    expires_at: datetime | None
    token_id: str
    token_name: str
    scopes: list[str]


class CheckObject(BaseModel):
    """One check of ``/readyz``."""

    name: str
    status: Literal["ok", "failed"]
    is_required: bool


class Readiness(BaseModel):
    """Whether the service can work."""

    status: Literal["ready", "not_ready"]
    checks: list[CheckObject]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """What runs here."""

    object: Literal["version"] = "version"
    version: str
    api: str
    plan_format: int
    packages: dict[str, str]
