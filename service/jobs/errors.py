"""What the job store refuses, and why.

StoreError
├── NotFoundError              no such job or token
├── IllegalTransitionError     the job's state does not allow it
│   └── AlreadyTerminalError   the job has ended
├── OutputInUseError           another job needs what is at the output
├── RevisionMismatchError      somebody changed the job since it was read
├── StaleLeaseError            another runner holds the job, or the claim was released
├── IdempotencyReusedError     the key was used for another request
├── RepeatedRequestError       the key of a request has made something already
├── EndpointDisabledError      nothing is sent to a webhook endpoint that is disabled
├── EndpointLimitError         there are too many webhook endpoints
└── StoreUnavailableError      the database cannot be reached or is locked; retryable
"""

from __future__ import annotations

from merging.errors import MergeError


class StoreError(MergeError):
    """Base of what the job store refuses."""

    default_code = "conflict"


class NotFoundError(StoreError):
    """There is no such job, token or webhook endpoint."""

    default_code = "not_found"


class IllegalTransitionError(StoreError):
    """The state of the job does not allow what was asked."""


class AlreadyTerminalError(IllegalTransitionError):
    """The job has ended."""

    default_code = "already_terminal"


class OutputInUseError(StoreError):
    """Another job writes to the output, reads from it, or published the same there."""

    default_code = "output_in_use"


class RevisionMismatchError(StoreError):
    """The job was changed since it was read."""

    default_code = "etag_mismatch"


class StaleLeaseError(StoreError):
    """The claim no longer holds: stop at once, write nothing."""

    default_code = "stale_lease"


class IdempotencyReusedError(StoreError):
    """The idempotency key was used before, for another request."""

    default_code = "idempotency_key_reused"


class RepeatedRequestError(StoreError):
    """The same request was made before; its key stands for ``object_id``."""

    def __init__(self, object_id: str) -> None:
        super().__init__(f"The request has made {object_id} already.")
        self.object_id = object_id


class EndpointDisabledError(StoreError):
    """Nothing is sent to a webhook endpoint that is disabled."""

    default_code = "endpoint_disabled"


class EndpointLimitError(StoreError):
    """Every endpoint is written to in the transaction of a job's change: there cannot be many."""

    default_code = "too_many_endpoints"


class StoreUnavailableError(StoreError):
    """The database cannot be reached, or was busy for too long."""

    default_code = "not_ready"
    default_retryable = True
