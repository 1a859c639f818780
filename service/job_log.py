"""A job's log: its events as lines for people, with what workers had to say.

Events are kept in the transaction of what they tell, bounded and without secrets; hence so is the
log. The same events always give the same text, so that a part of it can be asked for by its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.jobs.records import EventRecord, EventType

_Data = Mapping[str, Any]


def log_text(event: EventRecord) -> str:
    """The lines of one event, each ended; empty for progress, which is for programs."""
    tell = _TELLERS.get(event.type)
    if tell is None:
        return ""
    time = event.time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    first, *rest = tell(event.data).splitlines() or [""]
    return "".join([f"{time}  {first}\n", *(f"    {line}\n" for line in rest)])


def _created(data: _Data) -> str:
    methods = ", ".join(data.get("methods") or [str(data.get("method"))])
    return f"submitted: {methods}, output {data.get('output_uri')}"


def _state_changed(data: _Data) -> str:
    wish = data.get("cancel_requested")
    return f"{data['from']} → {data['to']}" + (f" (cancel: {wish})" if wish else "")


def _phase_changed(data: _Data) -> str:
    return f"phase {data['name']}" + (f": {data['message']}" if data.get("message") else "")


def _warning(data: _Data) -> str:
    return f"warning: {data.get('detail', '')}"


def _logged(data: _Data) -> str:
    return f"{_shard(data)} says on {data.get('worker')}:\n{data.get('text')}"


def _shard_started(data: _Data) -> str:
    return f"{_shard(data)} began on {data.get('worker')}, {data.get('device')}"


def _shard_finished(data: _Data) -> str:
    receipt = data.get("receipt")
    if receipt is None:
        return f"{_shard(data)} failed for good: {_error(data)}"
    stages = receipt.get("seconds", {})
    times = ", ".join(f"{name} {stages[name]:.1f} s" for name in sorted(stages))
    return (
        f"{_shard(data)} is published: {receipt['file_name']}, {receipt['bytes_read']} bytes read,"
        f" {receipt['size']} written ({times})"
    )


def _shard_retried(data: _Data) -> str:
    return f"{_shard(data)} failed and is tried again: {_error(data)}"


def _output_committed(data: _Data) -> str:
    return f"the checkpoint is complete: {data['output']['uri']}"


def _finished(data: _Data) -> str:
    return str(data["state"]) + (f": {_error(data)}" if data.get("error") else "")


def _integration_finished(data: _Data) -> str:
    return f"{data['name']} {data['state']}: {data['url'] or _error(data)}"


def _shard(data: _Data) -> str:
    return f"shard {data.get('shard_index')}, try {data.get('attempt')}"


def _error(data: _Data) -> str:
    error = data.get("error") or {}
    return f"{error.get('detail', 'no reason was recorded')} [{error.get('code', 'unknown')}]"


_TELLERS: dict[EventType, Callable[[_Data], str]] = {
    EventType.JOB_CREATED: _created,
    EventType.JOB_STATE_CHANGED: _state_changed,
    EventType.JOB_PHASE_CHANGED: _phase_changed,
    EventType.JOB_WARNING: _warning,
    EventType.JOB_LOGGED: _logged,
    EventType.JOB_OUTPUT_COMMITTED: _output_committed,
    EventType.JOB_FINISHED: _finished,
    EventType.INTEGRATION_FINISHED: _integration_finished,
    EventType.SHARD_STARTED: _shard_started,
    EventType.SHARD_FINISHED: _shard_finished,
    EventType.SHARD_RETRIED: _shard_retried,
}
