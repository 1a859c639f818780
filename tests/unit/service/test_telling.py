"""How an integration's part in a job goes on after a failure."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from service.integrations.base import IntegrationError, IntegrationOptions, JobAnnouncement
from service.integrations.telling import Teller
from service.jobs.errors import NotFoundError, StoreUnavailableError
from service.jobs.outbox import AttemptOutcome, DeliveryState
from service.jobs.records import JobIntegration
from service.webhooks.delivery import RETRY_SECONDS
from tests.unit.service.test_webhook_messages import delivery


class Registry:
    """A stand-in integration that does what it is told."""

    options = IntegrationOptions

    def __init__(self, result: str | Exception | None) -> None:
        self.result = result
        self.events: list[JobAnnouncement] = []

    def on_event(self, event: JobAnnouncement) -> str | None:
        self.events.append(event)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Job:
    """As much of a job as telling needs."""

    integrations = (JobIntegration("registry", {"model_name": "x"}),)


def tell(registry: Registry, attempts: int = 1, **changes: Any) -> AttemptOutcome:
    teller = Teller({"registry": registry}, lambda _: Job)
    values = {"endpoint_id": None, "integration": "registry", "attempts": attempts, **changes}
    return teller.tell(delivery(**values))


@pytest.mark.parametrize("url", ["https://registry/x/1", None])
def test_an_integration_hears_the_announcement_with_its_options(url: str | None) -> None:
    registry = Registry(url)
    assert tell(registry) == AttemptOutcome(state=DeliveryState.DELIVERED, url=url)
    (event,) = registry.events
    assert (event.message_id, event.type) == ("evt_1", "job.succeeded")
    assert event.options == {"model_name": "x"}


def test_what_may_help_is_tried_on_the_schedule_and_then_given_up() -> None:
    away = Registry(IntegrationError("It is away.", retryable=True))
    for attempts, seconds in enumerate(RETRY_SECONDS, 1):
        outcome = tell(away, attempts)
        assert (outcome.state, outcome.error) == (DeliveryState.PENDING, "It is away.")
        assert outcome.retry_in is not None
        assert outcome.retry_in.total_seconds() >= seconds
    assert tell(away, 10).state == DeliveryState.FAILED


def test_what_cannot_help_is_given_up_at_once() -> None:
    assert tell(Registry(IntegrationError("No."))).state == DeliveryState.FAILED


def test_a_fault_of_the_integration_itself_is_one_more_failure() -> None:
    with structlog.testing.capture_logs() as lines:
        outcome = tell(Registry(ZeroDivisionError("secret")))
    assert outcome.state == DeliveryState.PENDING
    assert outcome.error is not None
    assert "ZeroDivisionError" in outcome.error
    assert "secret" not in outcome.error
    assert [line["event"] for line in lines] == ["integration_crashed"]


def test_an_integration_that_was_taken_away_is_said_to_be() -> None:
    outcome = Teller({}, lambda _: Job).tell(delivery(endpoint_id=None, integration="registry"))
    assert (outcome.state, outcome.error) == (
        DeliveryState.FAILED,
        "This deployment has no registry any more.",
    )


def test_a_job_that_was_forgotten_ends_it_and_a_store_that_is_away_does_not() -> None:
    def raising(error: Exception) -> Teller:
        def get_job(_: str) -> Any:
            raise error

        return Teller({"registry": Registry(None)}, get_job)

    asked = delivery(endpoint_id=None, integration="registry")
    gone = raising(NotFoundError("There is no job.")).tell(asked)
    assert gone.state == DeliveryState.FAILED
    with pytest.raises(StoreUnavailableError):
        raising(StoreUnavailableError("It is away.")).tell(asked)
