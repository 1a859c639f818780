"""What goes into each expert of a mixture that the model has as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
        torch.Tensor.__matmul__,
    }
)

Look = Callable[[torch.Tensor], None]
"""Called with the rows that go into a layer."""


class Mixture(nn.Module):
    """In place of the module of a mixture's experts, which it runs on tokens alone.

    Padding is routed like tokens; without it no expert sees any. The layers of experts have no
    modules of their own: they are known by the slices of parameters that inputs are multiplied by.

    Args:
        experts: The module.
        mask: Tells tokens from padding in the batch that is running, B×L.

    Attributes:
        layers: Those that are looked at, by the address of their slice's memory.
        has_run: On the batch that is running.
    """

    def __init__(self, experts: nn.Module, mask: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.experts = experts
        self.layers: dict[int, Look] = {}
        self.has_run = False
        self._mask = mask

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of the module, whose first inputs have a row for each token of the batch."""
        mask = self._mask().reshape(-1)

        def of_tokens(value: Any) -> Any:
            is_of_batch = isinstance(value, torch.Tensor) and value.shape[:1] == mask.shape
            return value[mask] if is_of_batch else value

        with _Products(self.layers):
            made = self.experts(
                *map(of_tokens, args), **{name: of_tokens(value) for name, value in kwargs.items()}
            )
        self.has_run = True
        whole: torch.Tensor = made.new_zeros(len(mask), *made.shape[1:])
        whole[mask] = made
        return whole


class _Products(TorchFunctionMode):
    """Shows what is multiplied by the slices of parameters that are looked at."""

    def __init__(self, layers: dict[int, Look]) -> None:
        super().__init__()
        self._layers = layers

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if func in _PRODUCTS and len(args) > 1:
            look = self._layers.get(args[1].data_ptr())
            if look is not None:
                look(args[0])
        return func(*args, **(kwargs or {}))
