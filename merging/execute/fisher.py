"""Going back through one part of an expert: means of squared gradients, sample by sample.

Of a sample x with labels y, log p(y|x) is the sum over its tokens. With labels that the model
samples, the mean of squared gradients is an unbiased estimate of the diagonal of the Fisher
information, E_x E_{y∼p(·|x)} (∂ log p(y|x)/∂θ)²; with the given next tokens it is the "empirical"
one. (Kunstner et al., "Limitations of the Empirical Fisher Approximation", NeurIPS 2019.)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from merging.execute.skeleton import Done, Passing, Skeleton, with_hidden
from merging.execute.tokens import PADDING
from merging.ops.precision import float32_products
from merging.plan.statistics_work import Backward, StatisticsWork

_ROWS = 32
"""Predictions summed up together, in float64."""

_ENTRIES = 1 << 18
"""Entries summed up together, likewise: few, since each takes twice its memory."""


class FisherRun:
    """One shard's way back.

    Args:
        work: Which part; its ``backward`` is set.
        read: Reads the next of what the shard is given, flat.
        device: Where it runs.

    Attributes:
        num_tokens: Of all samples.
    """

    def __init__(self, work: StatisticsWork, read: Callable[[], torch.Tensor], device: str) -> None:
        assert work.backward is not None
        self._work = work
        self._back: Backward = work.backward
        self._device = device
        shape = (work.num_samples, work.length)
        self._tokens = read().view(shape)
        self.num_tokens = int((self._tokens != PADDING).sum())
        self._hidden = read().view(*shape, -1) if work.block >= 0 else torch.zeros(*shape, 0)
        self._labels = torch.full(shape, PADDING, dtype=torch.int32)
        self._size = torch.zeros(2)
        if not work.is_last:
            self._behind = read().view(*shape, -1)
            self._size = read()
        if self._runs_head and not work.is_last:
            self._hidden = read().view(*shape, -1)
            self._labels = read().view(shape)
        self._skeleton = Skeleton(work, device)
        for weight in work.weights:
            self._skeleton.load(weight.name, read().view(weight.shape))
        if self._back.is_tied and self._runs_head:
            self._skeleton.tie_head()
        self._sums = [torch.zeros(measure.width, device=device) for measure in work.measures]
        self._places = [self._skeleton.place(measure.modules[0]) for measure in work.measures]
        names = dict.fromkeys(place.parameter for place in self._places if place is not None)
        self._parameters = {name: self._skeleton.model.get_parameter(name) for name in names}
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        self._part = _Part(self._skeleton, work)

    @property
    def _runs_head(self) -> bool:
        """The head is the part, or stands at the other end of a tied embedding."""
        return self._work.is_last or (self._work.block < 0 and self._back.is_tied)

    def run(self, before_sample: Callable[[], None]) -> list[torch.Tensor]:
        """What the shard leaves, in the order of its problems.

        Args:
            before_sample: Called for every sample.
        """
        gradients = torch.zeros_like(self._hidden) if self._work.block >= 0 else None
        for number, length in enumerate((self._tokens != PADDING).sum(1).tolist()):
            before_sample()
            with float32_products(torch.device(self._device)), torch.enable_grad():
                gradient = self._go_back(number, length)
            if gradients is not None:
                gradients[number, :length] = gradient[0].cpu()
        diagonals = [total.div_(self._work.num_samples).cpu() for total in self._sums]
        results = [] if gradients is None else [gradients]
        if self._work.is_last:
            results.append(self._labels)
        return [*results, self._join_size(diagonals), *diagonals]

    def _join_size(self, diagonals: list[torch.Tensor]) -> torch.Tensor:
        """Frobenius norm and number of entries of these diagonals and those before."""
        parts = (part for own in diagonals for part in own.split(_ENTRIES))
        squares = sum(float(part.double().square().sum()) for part in parts)
        norm, entries = self._size.double().tolist()
        entries += sum(own.numel() for own in diagonals)
        return torch.tensor([(norm**2 + squares) ** 0.5, entries])

    def _go_back(self, number: int, length: int) -> torch.Tensor:
        """Add the squares of one sample's gradients; the gradient before the part (1×T×d)."""
        tokens = self._tokens[number : number + 1, :length].to(self._device).long()
        hidden = self._hidden[number : number + 1, :length].to(self._device).requires_grad_()
        ends: list[torch.Tensor] = []
        behind: list[torch.Tensor | None] = []
        if not self._work.is_last:
            ends.append(self._part.through(tokens, hidden))
            behind.append(self._behind[number : number + 1, :length].to(self._device))
        if self._runs_head:
            ends.append(self._likelihood(self._part.logits(tokens, hidden), tokens, number))
            behind.append(None)
        before, *found = torch.autograd.grad(
            ends, [hidden, *self._parameters.values()], behind, allow_unused=True
        )
        gradients = dict(zip(self._parameters, found, strict=True))
        for place, total in zip(self._places, self._sums, strict=True):
            gradient = gradients[place.parameter] if place is not None else None
            if place is not None and gradient is not None:
                own = place.of(gradient).reshape(-1)
                total.addcmul_(own, own)
        return before

    def _likelihood(self, logits: torch.Tensor, tokens: torch.Tensor, number: int) -> torch.Tensor:
        """The log-likelihood of one sample's labels, which the head's shard decides on."""
        log_probabilities = logits[0].float().log_softmax(-1)
        labels = self._labels[number, : len(log_probabilities)]
        if self._work.is_last and self._back.labels == "given":
            labels[:-1] = tokens[0, 1:].cpu()
        elif self._work.is_last:
            labels.copy_(self._sample(log_probabilities.detach(), number))
        rows = (labels != PADDING).nonzero()[:, 0].to(self._device)
        return log_probabilities[rows, labels.long().to(self._device)[rows]].sum()

    def _sample(self, log_probabilities: torch.Tensor, number: int) -> torch.Tensor:
        """A token for every place, drawn by the seed and the number of the sample."""
        key = hashlib.sha256(f"{self._back.seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))
        labels = []
        for rows in log_probabilities.split(_ROWS):
            drawn = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
            summed = rows.double().exp().cumsum(-1).cpu()
            labels.append(torch.searchsorted(summed, drawn * summed[:, -1:])[:, 0])
        return torch.cat(labels).clamp_(max=log_probabilities.shape[-1] - 1)


class _Part:
    """Runs a part of a model in the model's own ``forward``, with its inputs put in place."""

    def __init__(self, skeleton: Skeleton, work: StatisticsWork) -> None:
        self._skeleton = skeleton
        self._hidden = torch.empty(0)
        self._found = torch.empty(0)
        self._is_through = True
        blocks = skeleton.blocks
        is_block = work.block >= 0 and not work.is_last
        for number in range(work.block if is_block else len(blocks) - 1):
            blocks[number] = Passing(lambda: self._hidden)
        if work.block < 0:
            blocks[0].register_forward_pre_hook(self._arrive, with_kwargs=True)
        elif is_block:
            blocks[work.block].register_forward_pre_hook(self._enter, with_kwargs=True)
            blocks[work.block].register_forward_hook(self._leave)
        blocks[-1].register_forward_hook(self._replace)

    def through(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of a block that ``hidden`` goes into, or out of the embedding."""
        self._is_through, self._hidden = True, hidden
        with contextlib.suppress(Done):
            self._skeleton.run(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        return self._found

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the head makes of hidden states behind the last block."""
        self._is_through, self._hidden = False, hidden
        output = self._skeleton.run(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        logits: torch.Tensor = output.logits
        return logits

    def _arrive(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_through:
            self._found = args[0] if args else kwargs["hidden_states"]
            raise Done

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return with_hidden(args, kwargs, self._hidden)

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._found = output[0] if isinstance(output, tuple) else output
        raise Done

    def _replace(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """The last block's output is what is to go into the head, whatever the block gave."""
        return (self._hidden, *output[1:]) if isinstance(output, tuple) else self._hidden
