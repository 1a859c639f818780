"""A message as it goes out: body and signed headers (Standard Webhooks)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from standardwebhooks import Webhook

from service.jobs.outbox import DeliveryRecord, EnvelopeFormat

_CONTENT_TYPES: dict[EnvelopeFormat, str] = {
    "standard": "application/json",
    "cloudevents": "application/cloudevents+json",
}


def render_body(delivery: DeliveryRecord, envelope: EnvelopeFormat, public_url: str) -> bytes:
    """The body of a message: thin, since its receiver can read the job.

    Args:
        delivery: What is sent.
        envelope: Standard Webhooks' own form, or CloudEvents 1.0 in structured mode.
        public_url: Address of the service as clients see it; ``source`` of CloudEvents.
    """
    data = dict(delivery.data)
    if "job_id" in data:
        data["url"] = f"{public_url}/v1/jobs/{data['job_id']}"
    time = delivery.occurred_at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if envelope == "standard":
        return _encode({"type": delivery.type, "timestamp": time, "data": data})
    event = {
        "specversion": "1.0",
        "id": delivery.message_id,
        "source": public_url or "urn:mergeyard",
        "type": delivery.type,
        "time": time,
        "datacontenttype": "application/json",
        "data": data,
    }
    if "job_id" in data:
        event["subject"] = data["job_id"]
    return _encode(event)


def signed_headers(
    delivery: DeliveryRecord,
    body: bytes,
    envelope: EnvelopeFormat,
    secrets: Sequence[str],
    now: datetime,
) -> dict[str, str]:
    """The headers of a try: the message's id, the time of the try, a signature for each secret."""
    signatures = [
        Webhook(secret).sign(delivery.message_id, now, body.decode()) for secret in secrets
    ]
    return {
        "content-type": _CONTENT_TYPES[envelope],
        "user-agent": f"Mergeyard/{metadata.version('mergeyard')}",
        "webhook-id": delivery.message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
