"""What is told to the outside: announcements, who gets them, and how their delivery goes.

An announcement is written in the transaction of the change that it tells of, one row for each
receiver: what the job store says has happened will be told, whoever dies in between, and nothing
else will. Senders take rows that are due. Taking one moves the time at which it is due by a lease
and counts an attempt; that number is the fencing token of what the sender then says of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, Protocol

import msgspec

from service.jobs.records import EventType, IdempotencyRequest, JobCursor
from service.jobs.states import JobState


class Announcement(StrEnum):
    """What receivers are told; dotted, past tense."""

    JOB_STARTED = "job.started"
    JOB_OUTPUT_COMMITTED = "job.output_committed"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    ENDPOINT_TEST = "endpoint.test"  # sent on request only, to one endpoint, subscribed or not


EnvelopeFormat = Literal["standard", "cloudevents"]
"""Of a message's body: Standard Webhooks' own, or CloudEvents 1.0 in structured mode."""


def announcement_of(event: EventType, data: Mapping[str, Any]) -> Announcement | None:
    """What an event of a job is to the outside; None for what stays inside."""
    if event == EventType.JOB_STATE_CHANGED and data["to"] == JobState.PLANNING:
        return Announcement.JOB_STARTED
    if event == EventType.JOB_OUTPUT_COMMITTED:
        return Announcement.JOB_OUTPUT_COMMITTED
    if event == EventType.JOB_FINISHED:
        return Announcement(f"job.{data['state']}")
    return None


class NewEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook endpoint to be made; its address has been checked by the caller."""

    url: str
    events: tuple[Announcement, ...]
    key_id: str
    description: str = ""
    format: EnvelopeFormat = "standard"
    initiator: str | None = None


class EndpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook endpoint. Its secret is derived (``service.webhooks.secrets``), never kept.

    Attributes:
        id: ``whe_…``.
        events: What it has subscribed to.
        initiator: Id of the token that made it.
        is_enabled: Deliveries of a disabled endpoint wait.
        key_id: Names the service's key that its secret is derived from.
        secret_version: Rises with each rotation.
        previous_key_id: The key of the secret before this one.
        previous_expires_at: Until when messages are signed with the secret before as well.
        paused_until: It asked for patience.
        flagged_at: Since when its owner should look at it; a delivery that succeeds clears it.
        flag: What is wrong.
    """

    id: str
    created_at: datetime
    url: str
    description: str
    events: tuple[Announcement, ...]
    format: EnvelopeFormat
    initiator: str | None
    is_enabled: bool
    key_id: str
    secret_version: int
    previous_key_id: str | None
    previous_expires_at: datetime | None
    paused_until: datetime | None
    flagged_at: datetime | None
    flag: str | None


class DeliveryState(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"  # due at some time
    DELIVERED = "delivered"
    FAILED = "failed"  # given up; a replay makes another delivery of the same message


class DeliveryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One message to one receiver: a row of the outbox.

    Attributes:
        id: ``dlv_…``.
        message_id: ``evt_…``, the same for all receivers of an announcement and for replays.
        endpoint_id: The receiver, if it is a webhook endpoint.
        integration: The receiver, if it is an integration.
        data: ``job_id``, ``state``, ``attempt`` and ``seq`` of the announced event.
        occurred_at: When it happened.
        created_at: When this delivery was asked for: later, if it is a replay.
        attempts: Tries so far, one that is going on included.
        due_at: When it is to be tried next, or the lease of who tries it now ends.
        response_status: Of the last try, likewise the others.
        response_body: Beginning of the reply.
        error: Why it was no success.
    """

    id: str
    message_id: str
    endpoint_id: str | None
    integration: str | None
    type: Announcement
    data: dict[str, Any]
    occurred_at: datetime
    created_at: datetime
    state: DeliveryState
    attempts: int
    due_at: datetime | None
    last_attempt_at: datetime | None
    response_status: int | None
    response_body: str | None
    error: str | None

    @property
    def receiver(self) -> str:
        """Id of the endpoint, or name of the integration."""
        return self.endpoint_id or self.integration or ""


class DeliveryFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which deliveries to list."""

    endpoint_id: str
    state: DeliveryState | None = None


class TakenDelivery(msgspec.Struct, frozen=True):
    """A delivery that a sender is to try now, with its webhook endpoint if it is for one."""

    delivery: DeliveryRecord
    endpoint: EndpointRecord | None


class AttemptOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a try.

    Attributes:
        state: Pending if it is to be tried again, after ``retry_in``.
        pause_for: Leave the endpoint alone for so long.
        flag: What the endpoint's owner should know.
        disable: Nothing more is to be sent there.
        url: What an integration made of it; None if it was nothing to it.
    """

    state: DeliveryState
    retry_in: timedelta | None = None
    response_status: int | None = None
    response_body: str | None = None
    error: str | None = None
    pause_for: timedelta | None = None
    flag: str | None = None
    disable: bool = False
    url: str | None = None


class EndpointStore(Protocol):
    """Webhook endpoints and their deliveries: the API's side."""

    def create_endpoint(
        self, endpoint: NewEndpoint, *, idempotency: IdempotencyRequest | None = None
    ) -> EndpointRecord:
        """Make an endpoint. Raises ``EndpointLimitError`` when there are too many."""

    def list_endpoints(self) -> list[EndpointRecord]:
        """All endpoints, newest first."""

    def get_endpoint(self, endpoint_id: str) -> EndpointRecord:
        """An endpoint. Raises ``NotFoundError``, as all that follow do."""

    def update_endpoint(self, endpoint_id: str, changes: Mapping[str, Any]) -> EndpointRecord:
        """Change ``url``, ``description``, ``events``, ``format`` or ``is_enabled``.

        Enabling also clears the flag and the pause.
        """

    def rotate_endpoint(self, endpoint_id: str, key_id: str, overlap: timedelta) -> EndpointRecord:
        """Give it the next secret, of that key; the one before signs for so long as well."""

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Forget an endpoint and its deliveries."""

    def test_endpoint(self, endpoint_id: str) -> DeliveryRecord:
        """Have a sample message sent. Raises ``EndpointDisabledError``."""

    def list_deliveries(
        self, delivery_filter: DeliveryFilter, *, cursor: JobCursor | None = None, limit: int = 20
    ) -> list[DeliveryRecord]:
        """Deliveries, newest first, after the cursor."""

    def get_delivery(self, endpoint_id: str, delivery_id: str) -> DeliveryRecord:
        """A delivery of an endpoint."""

    def replay_delivery(self, endpoint_id: str, delivery_id: str) -> DeliveryRecord:
        """Have a message sent again, as a new delivery. Raises ``EndpointDisabledError``."""


class Outbox(Protocol):
    """Deliveries that wait: the senders' side. Any number of them may share it."""

    def take_delivery(
        self, lease_seconds: float, *, busy: Collection[str] = ()
    ) -> TakenDelivery | None:
        """The delivery that has been due for longest, not to one of the ``busy`` receivers."""

    def finish_attempt(self, delivery: DeliveryRecord, outcome: AttemptOutcome) -> bool:
        """Note what came of a try, also in the job if it was an integration's.

        An integration that made something of it, or has given up, appends ``integration.finished``.

        Returns:
            False if the lease lapsed and somebody else took it up: then nothing is noted.
        """

    def longest_overdue(self) -> timedelta:
        """For how long the delivery has been due that waits longest for a sender; 0 for none."""

    def prune_outbox(self, kept: timedelta) -> int:
        """Forget deliveries that are older; how many."""
