"""Bodies of requests and answers about webhook endpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, StringConstraints

from service.api.schemas import NO_CONTROLS, Request, examples
from service.jobs.outbox import Announcement, DeliveryState, EnvelopeFormat

Subscription = Literal[
    Announcement.JOB_STARTED,
    Announcement.JOB_OUTPUT_COMMITTED,
    Announcement.JOB_SUCCEEDED,
    Announcement.JOB_FAILED,
    Announcement.JOB_CANCELLED,
]
_ALL: list[Subscription] = list(get_args(Subscription))
Subscriptions = Annotated[
    list[Subscription],
    Field(min_length=1, max_length=len(_ALL), description="What is told to it."),
]
TargetUrl = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048, pattern=NO_CONTROLS),
    Field(description="An https:// address without user name and password."),
]
Description = Annotated[str, StringConstraints(max_length=500, pattern=NO_CONTROLS)]
Envelope = Annotated[
    EnvelopeFormat, Field(description="Of bodies: Standard Webhooks or CloudEvents 1.0.")
]


class EndpointRequest(Request):
    """A webhook endpoint to be made."""

    model_config = examples({"url": "https://hooks.example.org/merges", "description": "chat"})

    url: TargetUrl
    description: Description = ""
    events: Subscriptions = Field(default=_ALL, validate_default=True)
    format: Envelope = "standard"


class EndpointPatch(Request):
    """What can be changed in an endpoint; what is absent stays."""

    model_config = examples({"is_enabled": False})

    url: TargetUrl | None = None
    description: Description | None = None
    events: Subscriptions | None = None
    format: Envelope | None = None
    is_enabled: bool | None = None


class RotationRequest(Request):
    """How a secret is replaced."""

    model_config = examples({"overlap_seconds": 3600})

    overlap_seconds: int = Field(
        default=86_400,
        ge=0,
        le=604_800,
        description="How long messages are signed with the old secret as well.",
    )


class EndpointObject(BaseModel):
    """A webhook endpoint without its secret."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: str
    created_at: datetime
    url: str
    description: str
    events: list[Announcement]
    format: EnvelopeFormat
    initiator: str | None
    is_enabled: bool
    secret_version: int
    previous_expires_at: datetime | None = Field(
        description="Until when messages are signed with the secret before this one as well."
    )
    paused_until: datetime | None = Field(description="It asked for patience.")
    flagged_at: datetime | None
    flag: str | None = Field(description="What its owner should look at.")


class EndpointWithSecret(EndpointObject):
    """An endpoint whose secret was just made."""

    secret: str = Field(description="For verifying signatures. Shown this once.")


class DeliveryObject(BaseModel):
    """A message on its way to an endpoint, and what the endpoint said."""

    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str
    message_id: str = Field(description="The webhook-id header: the same for every try and replay.")
    endpoint_id: str
    type: Announcement
    data: dict[str, Any]
    occurred_at: datetime
    created_at: datetime
    state: DeliveryState
    attempts: int
    due_at: datetime | None = Field(description="When it is tried next.")
    last_attempt_at: datetime | None
    response_status: int | None
    response_body: str | None = Field(description="The first kilobyte of the last reply.")
    error: str | None
