"""Running one block of an expert on its samples.

The model's own ``forward`` is run on a skeleton that has the weights of this block alone, so that
masks and positions are the model's; blocks before it pass by, and it gets the hidden states that
the shard before this one left. Once it is through, the run stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from merging.errors import CheckpointError
from merging.execute.measuring import Observer, make_meter
from merging.execute.skeleton import Done, Passing, Skeleton, with_hidden
from merging.execute.tokens import PADDING
from merging.plan.images import PIXELS
from merging.plan.statistics_work import StatisticsWork


class BlockRunner:
    """Runs all batches through one part of a model.

    Attributes:
        meters: What was measured, in the order of the work's measures.
    """

    def __init__(self, skeleton: Skeleton, work: StatisticsWork, device: str) -> None:
        rows = work.num_samples * work.length
        self.meters = [make_meter(measure, rows, device) for measure in work.measures]
        self._skeleton = skeleton
        self._work = work
        self._device = device
        self._observer = Observer(skeleton, self.meters)
        self._hidden = torch.empty(0)
        self._left: torch.Tensor | None = None
        blocks = skeleton.blocks
        for number in range(max(work.block, 0)):
            blocks[number] = Passing(lambda: self._hidden)
        first = blocks[max(work.block, 0)]
        if work.block < 0:
            first.register_forward_pre_hook(self._arrive, with_kwargs=True)
        else:
            first.register_forward_pre_hook(self._enter, with_kwargs=True)
            first.register_forward_hook(self._leave)

    def run(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        images: torch.Tensor,
        before_batch: Callable[[], None],
    ) -> torch.Tensor | None:
        """Hidden states behind the part (N×L×d); None where nobody needs them.

        Args:
            tokens: N×L.
            hidden: N×L×d before the part; of no entries before the first block.
            images: N×C×H×W, of no entries behind that, or if the model sees none.
            before_batch: Called for every batch.
        """
        made: torch.Tensor | None = None
        for rows, length in self._batches(tokens):
            before_batch()
            batch = tokens[rows, :length].to(self._device)
            mask = batch != PADDING
            self._hidden = hidden[rows, :length].to(self._device) if len(hidden) else hidden
            self._observer.begin(mask)
            with contextlib.suppress(Done):
                self._skeleton.run(**self._inputs(batch, mask, images[rows]))
            self._observer.check()
            if self._left is None or self._left.shape[:2] != mask.shape:
                raise CheckpointError(
                    f"{self._work.uri} ({self._work.architecture}) cannot be run block by block:"
                    " its blocks give no hidden state for each token.",
                    code="config_invalid",
                    context={"uri": self._work.uri},
                )
            if self._work.leaves:
                left = self._left.float() * mask.unsqueeze(-1)
                if made is None:
                    made = torch.zeros(*tokens.shape, left.shape[-1])
                made[rows, :length] = left.cpu()
            self._left = None
        return made

    def _inputs(
        self, batch: torch.Tensor, mask: torch.Tensor, images: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Arguments of the model; behind its first part any image will do."""
        if not self._work.image_shape:
            return {"input_ids": batch.clamp(min=0).long(), "attention_mask": mask.long()}
        if not len(images):
            images = torch.zeros(len(batch), *self._work.image_shape)
        return {PIXELS: images.to(self._device)}

    def _batches(self, tokens: torch.Tensor) -> Iterator[tuple[slice, int]]:
        """Samples of a batch, and the longest one's tokens."""
        lengths = (tokens != PADDING).sum(1)
        for start in range(0, len(tokens), self._work.batch):
            rows = slice(start, start + self._work.batch)
            yield rows, int(lengths[rows].max())

    def _arrive(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What would go into the first block is what is to be found."""
        self._left = args[0] if args else kwargs["hidden_states"]
        self._observer.passed = True
        raise Done

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block gets its own input, whatever those before it gave."""
        return with_hidden(args, kwargs, self._hidden)

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._left = output[0] if isinstance(output, tuple) else output
        self._observer.passed = True
        if not self._work.is_last:
            raise Done
        self._observer.stop_if_done()
