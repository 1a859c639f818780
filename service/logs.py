"""One form for all log lines: JSON for machines, coloured text on a terminal.

Set up once, by whoever runs the process; libraries that log through ``logging`` are included. Our
own lines do not go that way: it takes twice as long, and there is one for every request.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

from workers.redact import redact_event


class _Lines(structlog.WriteLogger):
    """Writes lines to standard error, and knows its name."""

    def __init__(self, name: str = "mergeyard") -> None:
        super().__init__(sys.stderr)
        self.name = name


def configure_logging(*, as_json: bool | None) -> None:
    """Send all log lines to standard error.

    Args:
        as_json: None means JSON unless standard error is a terminal.
    """
    if as_json is None:
        as_json = not sys.stderr.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Processor] = [
        structlog.processors.format_exc_info,
        redact_event,
        structlog.processors.JSONRenderer() if as_json else _console(),
    ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_Lines,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # Uvicorn's own lines repeat ours, apart from warnings.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _console() -> Processor:
    """Traces without the values of variables: there may be secrets among them."""
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
