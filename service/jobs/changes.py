"""How a job changes, as pure functions: phases, progress, and the events of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from service.jobs.records import EventType, JobRecord, Phase, Progress
from service.jobs.states import JobState

Change = tuple[EventType, Mapping[str, Any]]
"""An event to append: type and data."""


def state_changed(job: JobRecord, state: JobState, **data: object) -> Change:
    """The event of a job that goes from its present state to another."""
    return (EventType.JOB_STATE_CHANGED, {"from": str(job.state), "to": str(state), **data})


def end_phase(phases: tuple[Phase, ...], now: datetime) -> tuple[Phase, ...]:
    """The history with its last phase ended."""
    if not phases or phases[-1].finished_at is not None:
        return phases
    return (*phases[:-1], msgspec.structs.replace(phases[-1], finished_at=now))


def begin_phase(
    phases: tuple[Phase, ...], name: str, message: str, now: datetime
) -> tuple[Phase, ...]:
    """The history with a new phase after the last one."""
    return (*end_phase(phases, now), Phase(name, now, message=message))


def furthest(one: Progress, other: Progress) -> Progress:
    """The higher of each figure: retries lose work, but progress never goes back."""
    return Progress(**{name: max(getattr(one, name), getattr(other, name)) for name in _FIGURES})


_FIGURES = tuple(field.name for field in msgspec.structs.fields(Progress))
