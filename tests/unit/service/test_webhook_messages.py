"""Secrets, signatures and bodies of webhooks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from merging.errors import MergeError
from service.jobs.outbox import Announcement, DeliveryRecord, DeliveryState, EndpointRecord
from service.webhooks.envelope import render_body, signed_headers
from service.webhooks.secrets import SecretKeys, read_or_make_key

NOW = datetime(2026, 3, 1, 12, 0, 0, 500_000, tzinfo=UTC)
OLD_KEY, NEW_KEY = "an old key of the service, long enough", "a new key of the service, long enough"
NOWHERE = Path("/nowhere/secret-key")


def keys(*texts: str) -> SecretKeys:
    return SecretKeys(texts, NOWHERE)


def endpoint(**changes: Any) -> EndpointRecord:
    values: dict[str, Any] = {
        "id": "whe_1",
        "created_at": NOW,
        "url": "https://example.com",
        "description": "",
        "events": (Announcement.JOB_SUCCEEDED,),
        "format": "standard",
        "initiator": None,
        "is_enabled": True,
        "key_id": keys(OLD_KEY).newest_id,
        "secret_version": 1,
        "previous_key_id": None,
        "previous_expires_at": None,
        "paused_until": None,
        "flagged_at": None,
        "flag": None,
    }
    return EndpointRecord(**{**values, **changes})


def delivery(**changes: Any) -> DeliveryRecord:
    values: dict[str, Any] = {
        "id": "dlv_1",
        "message_id": "evt_1",
        "endpoint_id": "whe_1",
        "integration": None,
        "type": Announcement.JOB_SUCCEEDED,
        "data": {"job_id": "job_1", "state": "succeeded", "attempt": 1, "seq": 9},
        "occurred_at": NOW,
        "created_at": NOW,
        "state": DeliveryState.PENDING,
        "attempts": 1,
        "due_at": NOW,
        "last_attempt_at": NOW,
        "response_status": None,
        "response_body": None,
        "error": None,
    }
    return DeliveryRecord(**{**values, **changes})


# -- secrets


def test_a_secret_is_long_and_its_endpoints_own() -> None:
    of = keys(OLD_KEY).secret
    secret = of(endpoint())
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert secret == keys(OLD_KEY).secret(endpoint())
    others = [
        of(endpoint(id="whe_2")),
        of(endpoint(secret_version=2)),
        keys(NEW_KEY).secret(endpoint(key_id=keys(NEW_KEY).newest_id)),
    ]
    assert len({secret, *others}) == 4


def test_secrets_stay_what_they_are() -> None:
    """A change of how they are derived would silence every receiver."""
    assert keys(OLD_KEY).secret(endpoint()) == SECRET_OF_WHE_1


SECRET_OF_WHE_1 = "whsec_cOe2QRxpytVVos66Lur91YReO5E+45utWS9xvReNdjY="


def test_a_new_key_in_front_leaves_secrets_alone_until_they_are_rotated() -> None:
    both = keys(NEW_KEY, OLD_KEY)
    old = both.secret(endpoint())
    assert old == keys(OLD_KEY).secret(endpoint())
    rotated = endpoint(
        key_id=both.newest_id,
        secret_version=2,
        previous_key_id=endpoint().key_id,
        previous_expires_at=NOW + timedelta(hours=1),
    )
    new = both.secret(rotated)
    assert both.signing_secrets(rotated, NOW) == [new, old]
    assert both.signing_secrets(rotated, NOW + timedelta(hours=1)) == [new]
    assert keys(NEW_KEY).secret(rotated) == new


def test_without_its_key_a_secret_is_refused_rather_than_wrong() -> None:
    with pytest.raises(MergeError, match="MERGEYARD_SECRET_KEYS") as caught:
        keys(NEW_KEY).secret(endpoint())
    assert NEW_KEY not in str(caught.value)


def test_the_first_start_makes_a_key_that_only_this_user_can_read(tmp_path: Path) -> None:
    path = tmp_path / "secret-key"
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(read_or_make_key, [path] * 8))
    assert len(made) == 1
    assert made == {read_or_make_key(path)}
    assert len(made.pop()) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_that_cannot_be_had_is_a_setting_to_be_changed() -> None:
    with pytest.raises(MergeError, match="MERGEYARD_SECRET_KEYS") as caught:
        SecretKeys([], NOWHERE).load()
    assert caught.value.code == "bad_setting"


def test_a_key_file_that_was_emptied_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "secret-key").touch()
    with pytest.raises(MergeError, match="32 characters"):
        SecretKeys([], tmp_path / "secret-key").load()


# -- bodies and signatures


def test_a_standard_message_is_thin() -> None:
    body = json.loads(render_body(delivery(), "standard", "https://merge.example.com"))
    assert body == {
        "type": "job.succeeded",
        "timestamp": "2026-03-01T12:00:00.500000Z",
        "data": {
            "job_id": "job_1",
            "state": "succeeded",
            "attempt": 1,
            "seq": 9,
            "url": "https://merge.example.com/v1/jobs/job_1",
        },
    }


def test_a_cloudevent_has_the_same_data_in_its_own_envelope() -> None:
    standard = json.loads(render_body(delivery(), "standard", "https://merge.example.com"))
    event = json.loads(render_body(delivery(), "cloudevents", "https://merge.example.com"))
    assert event == {
        "specversion": "1.0",
        "id": "evt_1",
        "source": "https://merge.example.com",
        "type": "job.succeeded",
        "subject": "job_1",
        "time": standard["timestamp"],
        "datacontenttype": "application/json",
        "data": standard["data"],
    }


def test_a_cloudevent_of_a_service_without_an_address_still_has_a_source() -> None:
    event = json.loads(render_body(delivery(data={}), "cloudevents", ""))
    assert event["source"] == "urn:mergeyard"
    assert "subject" not in event


def test_the_body_is_the_same_at_every_try() -> None:
    later = msgspec.structs.replace(
        delivery(), attempts=5, last_attempt_at=NOW + timedelta(days=1), error="x"
    )
    assert render_body(later, "standard", "") == render_body(delivery(), "standard", "")


def test_signatures_are_those_of_the_specification() -> None:
    """Computed from its words: HMAC-SHA-256 over ``id.timestamp.body``, key from base64."""
    secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_" + "QUJD" * 8]
    body = '{"äöü": 1}'.encode()
    headers = signed_headers(delivery(), body, "standard", secrets, NOW)
    stamp = str(int(NOW.timestamp()))
    expected = []
    for secret in secrets:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        digest = hmac.new(key, f"evt_1.{stamp}.".encode() + body, hashlib.sha256).digest()
        expected.append(f"v1,{base64.b64encode(digest).decode()}")
    assert headers["webhook-signature"] == " ".join(expected)
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("evt_1", stamp)
    assert headers["content-type"] == "application/json"


def test_the_example_of_the_specification_is_signed_as_there() -> None:
    """The published vector of the Standard Webhooks reference implementations."""
    headers = signed_headers(
        delivery(message_id="msg_p5jXN8AQM9LWM0D4loKWxJek"),
        b'{"test": 2432232314}',
        "standard",
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        datetime.fromtimestamp(1614265330, UTC),
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_cloudevent_says_what_it_is() -> None:
    headers = signed_headers(delivery(), b"{}", "cloudevents", ["whsec_QUJD"], NOW)
    assert headers["content-type"] == "application/cloudevents+json"
