"""Choices of one merge that are not part of the recipe: the same for CLI, API and workers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(value: object) -> object:
    """Turn ``"5GB"``, ``"512MiB"`` or ``1000`` into bytes; anything else is left for validation."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    digits = text.rstrip("bkmgti ")
    unit = text[len(digits) :].strip()
    try:
        return int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(
            f"{value!r} is not a size; write bytes or a unit, as in 5GB or 512MiB"
        ) from None


ByteSize = Annotated[int, BeforeValidator(parse_size)]


class MergeOptions(BaseModel):
    """How to run a merge.

    The budgets bound the tensor buffers of one worker. A tensor that does not fit them is solved in
    blocks of rows where its method allows that; what does not fit even then is refused by the plan
    with the figure that it needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_shard_size: ByteSize = Field(
        default=5 * 10**9, ge=1 << 10, description="Largest output file, in bytes ('5GB')."
    )
    memory_budget: ByteSize = Field(
        default=4 << 30, ge=1 << 20, description="Host bytes of tensor buffers per worker ('4GiB')."
    )
    device_memory_budget: ByteSize | None = Field(
        default=None,
        ge=1 << 20,
        description=(
            "GPU bytes per worker ('70GiB'). With it the plan is for workers with such a GPU: what"
            " solving takes must fit there, and host memory holds inputs and results only."
        ),
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of random methods.")
    threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Torch threads per shard; part of what bytes depend on.",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description=(
            "How many workers the merge may count on: a layer that takes longer than its share is"
            " divided over several where that shortens the merge. Part of what bytes depend on."
        ),
    )
    statistics_uri: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Folder in which statistics of samples are kept, for other merges of the same experts"
            " and samples. By default they go with the merge."
        ),
    )
    adapter_rank: int | None = Field(
        default=None,
        ge=0,
        le=1 << 16,
        description=(
            "Write the result of merging adapters as an adapter of this rank; 0 is that of all"
            " experts' factors of a layer together. By default it is a whole checkpoint."
        ),
    )
    overwrite: bool = Field(
        default=False, description="Replace a checkpoint that is already at the output."
    )
    check_finite: bool = Field(
        default=True, description="Fail on NaN or infinity in an input tensor."
    )
