"""Text search over jobs: what is looked through, and how words are matched.

Each job has its text in a narrow table of its own, folded to lower case where all scripts are
known (databases only know ASCII); a search is one pass over that table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from service.jobs.records import JobRecord
from service.jobs.tables import job_texts, jobs

SEARCHED = frozenset({"labels", "error", "inputs"})
"""Columns that change and are part of the text."""


def text_of(
    *,
    id: str,
    methods: Iterable[str],
    output_uri: str,
    inputs: Any,
    labels: Any,
    error: Any,
) -> str:
    """What a job is found by: id, methods, addresses, ``label=value``, code and text of its error.

    One of them on each line; words that are searched for have no spaces, so that none is found
    across two.
    """
    problem = error or {}
    lines = [
        id,
        *methods,
        output_uri,
        *(str(item.get("uri", "")) for item in inputs),
        *(f"{name}={value}" for name, value in labels.items()),
        str(problem.get("code", "")),
        str(problem.get("detail", "")),
    ]
    return "\n".join(filter(None, lines)).casefold()


def keep_text(connection: sa.Connection, job: JobRecord) -> None:
    """Note what a job is found by from now on."""
    text = text_of(
        id=job.id,
        methods=job.methods,
        output_uri=job.output_uri,
        inputs=job.inputs,
        labels=job.labels,
        error=job.error,
    )
    mine = job_texts.c.job_id == job.id
    if not connection.execute(sa.update(job_texts).where(mine).values(text=text)).rowcount:
        connection.execute(sa.insert(job_texts).values(job_id=job.id, text=text))


def has_words(text: str) -> sa.ColumnElement[bool]:
    """Whether the job that a query selects has every word of a text, anywhere."""
    words = text.casefold().split()
    return (
        sa.select(sa.literal(1))
        .where(
            job_texts.c.job_id == jobs.c.id,
            *(job_texts.c.text.contains(word, autoescape=True) for word in words),
        )
        .exists()
    )
