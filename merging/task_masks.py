"""Masks that a merge publishes beside its checkpoint, and what its report says of them.

Files ``task-masks-00001-of-0000N.safetensors`` hold, for each merged tensor ``name`` of N entries,
``name.task_masks``: U8, tasks×⌈N/8⌉. Row t is task t's mask: a bit for each entry in flat order,
the first one the highest bit of its byte (``numpy.packbits``), the last byte filled up with zeros.
The merge report has under ``task_masks`` the tasks in order, each with its model and its rescaler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

FILE_PREFIX = "task-masks"
TENSOR_SUFFIX = ".task_masks"
REPORT_KEY = "task_masks"


class MaskedTask(msgspec.Struct, frozen=True):
    """A task as the merge report tells of it.

    Attributes:
        model: Address of its expert.
        rescaler: γ: its model is base + γ · mask · (shared - base).
    """

    model: str
    rescaler: Annotated[float, msgspec.Meta(gt=0)]


def describe_tasks(
    models: Sequence[str], figures: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The tasks as the merge report has them.

    A rescaler is a ratio of sums over the whole model, each added up exactly; 1 where the mask
    keeps nothing.

    Args:
        models: Addresses of the experts.
        figures: Of the masks of every tensor: ``task_sums`` and ``masked_sums``, one per expert.
    """
    tasks = []
    for number, model in enumerate(models):
        total = math.fsum(found["task_sums"][number] for found in figures)
        kept = math.fsum(found["masked_sums"][number] for found in figures)
        tasks.append(msgspec.to_builtins(MaskedTask(model, total / kept if kept else 1.0)))
    return tasks
