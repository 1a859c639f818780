"""What an integration is: something elsewhere that is told of jobs, and cannot make one fail.

An integration is fed from the outbox, like a webhook: at least once for each announcement, again
after a failure, on the same schedule. It recognises what it has done already. One file each, made
in ``catalogue.py``; its state stands in the job's ``integrations``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from merging.errors import MergeError
from service.jobs.outbox import Announcement
from service.jobs.records import JobRecord


class IntegrationOptions(BaseModel):
    """Base of what a job can say to an integration. Never secrets: jobs are shown."""

    model_config = ConfigDict(extra="forbid")


class IntegrationError(MergeError):
    """An integration could not do its part; it is tried again if that may help."""

    default_code = "integration_failed"


@dataclass(frozen=True, slots=True)
class JobAnnouncement:
    """What an integration is told.

    Attributes:
        message_id: The same whenever this announcement is told.
        type: What happened.
        occurred_at: When.
        job: The job as it is now.
        options: What the job says to the integration: its ``options`` model, dumped.
    """

    message_id: str
    type: Announcement
    occurred_at: datetime
    job: JobRecord
    options: dict[str, Any]


class Integration(Protocol):
    """One integration of this deployment. Calls come from any thread.

    Attributes:
        options: What a job can say to it.
    """

    options: type[IntegrationOptions]

    def on_event(self, event: JobAnnouncement) -> str | None:
        """Do what the announcement calls for, unless it was done already.

        Returns:
            The address of what was made of it, which ends the integration's part in the job; None
            if the announcement is nothing to it.

        Raises:
            MergeError: It could not be done; ``retryable`` says whether trying again may help.
        """
