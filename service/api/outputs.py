"""Removing what a job published."""

from __future__ import annotations

import structlog

from merging.unpublish import unpublish
from service.api.deps import Services
from service.jobs.states import JobState

_LEASE_SECONDS = 600.0
"""How long a removal may take; jobs with the same output wait until it is done."""


def delete_output(services: Services, job_id: str) -> None:
    """Remove the checkpoint that a job published; may be repeated.

    A job that failed or was cancelled has published nothing: what it left goes by itself.

    Raises:
        StoreError: There is no such job, it has not ended, or its output is needed.
        StorageError: ``output_changed``, or storage failed.
    """
    store = services.store
    if store.get(job_id).state in (JobState.FAILED, JobState.CANCELLED):
        return
    held = store.hold_output(job_id, _LEASE_SECONDS)
    is_gone = False
    try:
        report = store.load_report(job_id)
        assert report is not None, "a job that succeeded has a report"
        count = unpublish(held.plan, report, services.storage)
        is_gone = True
    finally:
        store.end_collection(held, is_gone=is_gone)
    log = structlog.get_logger(__name__)
    log.info("output_deleted", job_id=job_id, uri=held.plan.output_uri, objects=count)
