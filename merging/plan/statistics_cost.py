"""What a shard of statistics takes: bytes of host memory, and floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merging.plan.plan import Source
from merging.plan.statistics_work import Measure, StatisticsWork

_FLOATS = 4
_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads")


def measured_entries(measure: Measure, num_tokens: int) -> int:
    """Entries of what is measured, but for the counts of a mixture's experts."""
    num_experts = measure.num_experts or 1
    if measure.kind == "gram":
        return num_experts * measure.width**2
    if measure.kind == "rows":
        return num_experts * num_tokens * measure.width
    return measure.width


def forward_bytes(
    work: StatisticsWork, width: int, weights: Sequence[Source], files: Sequence[Source]
) -> int:
    """Host bytes: the block in float32 and one tensor as stored, activations, statistics; the
    samples as stored, and images in float32.

    Args:
        work: Of the shard.
        width: Entries of a hidden state.
        weights: Where the block's are stored.
        files: Of the samples.
    """
    statistics = sum(
        (3 if m.kind == "gram" else 1) * measured_entries(m, _num_tokens(work))
        for m in work.measures
    )
    states = 2 * _num_tokens(work) * width
    images = work.num_samples if work.block < 0 else work.batch
    pixels = images * math.prod(work.image_shape or (0,))
    floats = _num_entries(work) + states + statistics + pixels
    stored = _largest(weights) + sum(file.num_bytes for file in files)
    return _FLOATS * floats + stored + _running_bytes(work, width, work.batch)


def forward_flops(work: StatisticsWork) -> float:
    """Products with the weights of a block, and Gram matrices."""
    through = 2.0 * _num_tokens(work) * _num_entries(work) if work.block >= 0 else 0.0
    return through + sum(
        2.0 * _num_tokens(work) * m.width**2 for m in work.measures if m.kind == "gram"
    )


def backward_bytes(work: StatisticsWork, width: int, weights: Sequence[Source]) -> int:
    """Bytes: weights, gradients and sums, hidden states and their gradients, one sample's run.

    For its way back a run keeps three times what it holds at once on its way forward. Logits
    are there four times; a tied embedding has a gradient from either end.

    Args:
        work: Of the shard.
        width: Entries of a hidden state.
        weights: Where they are stored.
    """
    measured = sum(measure.width for measure in work.measures)
    is_both = _is_tied(work) and work.block < 0
    states = 3 * _num_tokens(work) * width
    floats = _num_entries(work) + (3 if is_both else 2) * measured + states
    if work.is_last or is_both:
        vocab = max(weight.shape[0] for weight in work.weights)
        running = 4 * _FLOATS * work.length * vocab
    else:
        running = 3 * _running_bytes(work, width, 1)
    return _FLOATS * floats + _largest(weights) + running


def backward_flops(work: StatisticsWork) -> float:
    """Forward, and twice that back; an embedding is looked up."""
    is_run = work.block >= 0 or _is_tied(work)
    return 6.0 * _num_tokens(work) * _num_entries(work) if is_run else 0.0


def _is_tied(work: StatisticsWork) -> bool:
    return work.backward is not None and work.backward.is_tied


def _running_bytes(work: StatisticsWork, width: int, batch: int) -> int:
    """Bytes that so many samples take on their way through a block."""
    matrices = [w.shape for w in work.weights if len(w.shape) == 2 and work.block >= 0]
    widest = max(map(max, matrices), default=width)
    found = (work.config.get(key) for key in _HEAD_KEYS)
    heads = next((value for value in found if isinstance(value, int)), 16)
    return _FLOATS * batch * work.length * (8 * widest + 3 * heads * work.length)


def _num_tokens(work: StatisticsWork) -> int:
    return work.num_samples * work.length


def _num_entries(work: StatisticsWork) -> int:
    return sum(math.prod(weight.shape) for weight in work.weights)


def _largest(weights: Sequence[Source]) -> int:
    return max((source.num_bytes for source in weights), default=0)
