"""Everything that can go wrong in a merge, as one small tree.

MergeError
├── RecipeError        what the user wrote cannot be run
├── CheckpointError    an input checkpoint is missing something, damaged, or inconsistent
├── PlanError          the merge is understood but cannot be carried out as asked
├── StorageError       object storage or the file system refused or failed
├── NumericalError     values that are not finite, or a solver that did not converge
└── Cancelled          the user asked to stop

Every error has a stable ``code``, a sentence for people, whether trying again may help
(``retryable``), and ``context``: the file, tensor or field that it concerns. One error can carry
many ``faults``, so that a user sees everything that is wrong at once. Errors cross process
boundaries (Ray, the job store) as the plain dictionary of :meth:`MergeError.to_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        pointer: JSON pointer into the recipe (``/models/0/parameters/density``), or ``""``.
        code: Stable code, from the tables of the error classes below.
        detail: A sentence that says what is wrong and what to do.
    """

    pointer: str
    code: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The fault as a JSON object."""
        return {"pointer": self.pointer, "code": self.code, "detail": self.detail}


class MergeError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        detail: What happened, to which tensor or file, what was expected, what to do.
        code: Overrides the class's default code.
        faults: All that is wrong, when there is more than one thing to say.
        retryable: Overrides the class's default.
        context: JSON-able facts: ``uri``, ``tensor_name``, ``expected`` …
    """

    default_code: ClassVar[str] = "internal"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        faults: Iterable[Fault] = (),
        retryable: bool | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.default_code
        self.faults = tuple(faults)
        self.retryable = self.default_retryable if retryable is None else retryable
        self.context = dict(context or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return (error_from_dict, (self.to_dict(),))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that :func:`error_from_dict` turns back into the same error."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "detail": self.detail,
            "retryable": self.retryable,
            "faults": [fault.to_dict() for fault in self.faults],
            "context": self.context,
        }


class RecipeError(MergeError):
    """The recipe is malformed, names something unknown, or asks for what cannot be combined.

    Codes: ``invalid_recipe``, ``unknown_method``, ``bad_parameter``, ``incompatible_options``.
    """

    default_code = "invalid_recipe"


class CheckpointError(MergeError):
    """An input checkpoint cannot be used.

    Codes: ``missing_tensor``, ``extra_tensor``, ``shape_mismatch``, ``dtype_unsupported``,
    ``header_invalid``, ``header_too_large``, ``index_inconsistent``, ``missing_file``,
    ``config_invalid``, ``unsafe_format``, ``digest_mismatch``, ``adapter_unsupported``.
    """

    default_code = "header_invalid"


class PlanError(MergeError):
    """The merge is understood but cannot be carried out as asked.

    Codes: ``does_not_fit``, ``nothing_to_do``, ``output_exists``.
    """

    default_code = "does_not_fit"


class StorageError(MergeError):
    """Reading or writing failed.

    Codes: ``not_found``, ``denied``, ``uri_not_allowed``, ``source_changed``, ``bad_uri``,
    ``too_large``, ``out_of_range``, ``size_mismatch``, ``already_exists``, ``no_space``,
    ``throttled`` and ``unavailable`` (the last two retryable).
    """

    default_code = "unavailable"


class NumericalError(MergeError):
    """Values that cannot be merged, or a solver that failed.

    Codes: ``non_finite_input``, ``non_finite_output``, ``did_not_converge``.
    """

    default_code = "non_finite_input"


class Cancelled(MergeError):  # noqa: N818 - the user's wish, not a fault
    """The user asked to stop."""

    default_code = "cancelled"


class WorkerError(MergeError):
    """A worker process failed; raised by ``workers``, listed here so that it can be rebuilt.

    Codes: ``worker_lost`` (retryable), ``out_of_memory`` (retryable when the whole machine ran
    out), ``wrong_version``, ``device_unavailable``.
    """

    default_code = "worker_lost"


_CLASSES: dict[str, type[MergeError]] = {
    cls.__name__: cls
    for cls in (
        MergeError,
        RecipeError,
        CheckpointError,
        PlanError,
        StorageError,
        NumericalError,
        Cancelled,
        WorkerError,
    )
}


def at_place(error: MergeError, pointer: str) -> MergeError:
    """The same error, of one place in the recipe."""
    return type(error)(
        error.detail,
        code=error.code,
        faults=[Fault(pointer, error.code, error.detail)],
        retryable=error.retryable,
        context=error.context,
    )


def error_from_dict(data: Mapping[str, Any]) -> MergeError:
    """Rebuild an error from :meth:`MergeError.to_dict`; unknown types become ``MergeError``."""
    cls = _CLASSES.get(str(data.get("type")), MergeError)
    return cls(
        str(data.get("detail", "")),
        code=data.get("code"),
        faults=[Fault(**fault) for fault in data.get("faults", ())],
        retryable=data.get("retryable"),
        context=data.get("context"),
    )
