"""Telling an integration of a job, and what follows from how that went."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from merging.errors import MergeError
from service.integrations.base import Integration, IntegrationError, JobAnnouncement
from service.jobs.errors import StoreUnavailableError
from service.jobs.outbox import AttemptOutcome, DeliveryRecord, DeliveryState
from service.jobs.records import JobRecord
from service.webhooks.delivery import retry_wait


class Teller:
    """Calls the integrations of a deployment. Calls block.

    Args:
        integrations: By name.
        get_job: Reads a job; raises ``NotFoundError`` for one that was forgotten.
    """

    def __init__(
        self, integrations: Mapping[str, Integration], get_job: Callable[[str], JobRecord]
    ) -> None:
        self._integrations = integrations
        self._get_job = get_job

    def tell(self, delivery: DeliveryRecord) -> AttemptOutcome:
        """Make a delivery to an integration. Whatever goes wrong is told in the outcome.

        Raises:
            StoreUnavailableError: Nothing was tried.
        """
        try:
            url = self._tell(delivery)
        except StoreUnavailableError:
            raise
        except MergeError as error:
            return _failure(delivery, error.detail, may_help=error.retryable)
        except Exception as error:  # noqa: BLE001 - a fault of one integration ends like its others
            structlog.get_logger(__name__).exception("integration_crashed", delivery_id=delivery.id)
            name = type(error).__name__
            detail = f"The integration failed in a way that it should not ({name}); see the log."
            return _failure(delivery, detail, may_help=True)
        return AttemptOutcome(state=DeliveryState.DELIVERED, url=url)

    def _tell(self, delivery: DeliveryRecord) -> str | None:
        job = self._get_job(delivery.data["job_id"])
        options = {entry.name: entry.options for entry in job.integrations}
        integration = self._integrations.get(delivery.receiver)
        if integration is None:
            raise IntegrationError(f"This deployment has no {delivery.receiver} any more.")
        return integration.on_event(
            JobAnnouncement(
                message_id=delivery.message_id,
                type=delivery.type,
                occurred_at=delivery.occurred_at,
                job=job,
                options=options[delivery.receiver],
            )
        )


def _failure(delivery: DeliveryRecord, detail: str, *, may_help: bool) -> AttemptOutcome:
    wait = retry_wait(delivery.attempts) if may_help else None
    state = DeliveryState.FAILED if wait is None else DeliveryState.PENDING
    return AttemptOutcome(state=state, retry_in=wait, error=detail)
