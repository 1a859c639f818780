"""What one shard of statistics does, as data."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

_KEPT_NAME = re.compile(r"statistics-[0-9a-f]{40}-\d{5}\.safetensors")

STATISTICS_FORMAT = 1
"""What kept statistics mean: raised when other numbers are measured, or in another way."""

IDS = "tokens"
HIDDEN = "hidden"
"""Names of tensors that the first shard of an expert leaves, and all of them, for the next one."""

GRADIENT = "gradient"
LABELS = "labels"
SIZE = "fisher.size"
"""Names of tensors that a shard which goes back leaves for the next one (:class:`Backward`)."""


def kept_name(key: str, number: int) -> str:
    """Name of a file that is kept for other merges (:mod:`merging.kept`).

    Args:
        key: Whatever its bytes follow from, as a text.
        number: Its place in a chain of files.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:40]
    return f"statistics-{digest}-{number:05d}.safetensors"


def is_kept_name(name: str) -> bool:
    """Whether :func:`kept_name` gives such names."""
    return _KEPT_NAME.fullmatch(name) is not None


class Weight(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the expert that a shard reads."""

    name: str
    shape: tuple[int, ...]


class Measure(msgspec.Struct, frozen=True):
    """What is measured at some modules.

    Attributes:
        kind: ``gram``: XᵀX of the inputs; ``rows``: the inputs themselves; ``norm``: sums of
            squares of the normalised inputs; ``fisher``: means of squared gradients.
        width: Of an input; of ``fisher`` the entries of a tensor.
        modules: By name; all read the same input, that of the first is measured. Of ``fisher`` the
            name of a tensor.
        num_experts: The module is a parameter that holds the layers of as many experts of a
            mixture (E×O×I): the statistics of all, one after the other, then their counts.
    """

    kind: str
    width: int
    modules: tuple[str, ...]
    num_experts: int = 0

    @property
    def name(self) -> str:
        """Of the result: no name of a tensor."""
        return f"{self.modules[0]}.inputs" if self.num_experts else self.modules[0]


class SampleWork(msgspec.Struct, frozen=True):
    """Where the worker finds the samples.

    Attributes:
        settings: As of :class:`merging.recipe.calibration.CalibrationSettings`.
        items: Samples that stand in the recipe; else they are in the first of the files.
        uri: Address of that file.
        tokenizer: Names of the tokenizer's files, which follow; none where samples are tokens.
    """

    settings: dict[str, Any]
    items: tuple[Any, ...] | None
    uri: str
    tokenizer: tuple[str, ...]


class Backward(msgspec.Struct, frozen=True):
    """That a shard goes back through its part (:mod:`merging.plan.fisher`).

    What such a shard reads, before its weights: the tokens; hidden states before its part, unless
    that is the embedding; then, unless it is the head, which comes first, what the shard before it
    left: the gradient behind its part, and the size of all that was measured so far. The embedding,
    if it is the head's weight too, reads the hidden states and the labels of the head.

    What it leaves: the gradient before its part unless that is the embedding; the labels if it is
    the head; the size; what is measured.

    Attributes:
        labels: ``sampled`` or ``given``, as of :class:`merging.recipe.calibration`.
        seed: For those that are sampled.
        is_tied: The head's matrix is the embedding's.
    """

    labels: str
    seed: int
    is_tied: bool


class StatisticsWork(msgspec.Struct, frozen=True):
    """What one shard does: in the plan, the parameters of its setting.

    What is read lies in ``given`` of the shard's first problem: tokens and hidden states (for a
    block), or the samples' files; then the weights, in their order.

    Attributes:
        uri: The expert's.
        config: Its ``config.json``.
        architecture: Class of transformers.
        stack: Name of the list of blocks.
        block: Which one; -1 for what stands before them.
        is_last: What stands behind the blocks is run too.
        leaves: Hidden states behind it are left, and by the first shard the tokens.
        weights: To be read.
        measures: In the order of the results behind tokens and hidden states.
        num_samples: How many.
        length: Places of a sample.
        batch: Samples at once.
        sample_digest: See :attr:`merging.plan.samples.Samples.digest`.
        samples: For the first shard, unless the model sees images: then it reads these.
        image_shape: Of an image that the model sees; empty if it sees tokens.
        backward: It goes back through its part; what stands behind the blocks (``is_last``) is one.
    """

    uri: str
    config: dict[str, Any]
    architecture: str
    stack: str
    block: int
    is_last: bool
    leaves: bool
    weights: tuple[Weight, ...]
    measures: tuple[Measure, ...]
    num_samples: int
    length: int
    batch: int
    sample_digest: str
    samples: SampleWork | None = None
    backward: Backward | None = None
    image_shape: tuple[int, ...] = ()
