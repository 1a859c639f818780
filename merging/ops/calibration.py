"""How large a layer's update is beside its task vectors, in numbers to be stored with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

UNKNOWN_LOSS = -1.0
"""Losses are not negative."""


class Calibration(NamedTuple):
    """What is known of a layer's update U before its scale is.

    Attributes:
        kept: p = (1/n) Σ_i ⟨U, T_i⟩ / ‖T_i‖²_F, the share of the task vectors that survives on
            average; 0 where nothing can be said.
        is_merged: 0 for a layer that fewer than two experts changed: its update is their sum, and
            stays as it is.
        norm: ‖U‖_F.
        sum_norm: Of the task vectors' sum.
        loss_before: WUDI's loss of that sum; :data:`UNKNOWN_LOSS` if it was not computed.
        quadratic: The loss of s·U is ``quadratic`` s² − 2 ``linear`` s + ``constant``.
        linear: See there.
        constant: See there.
    """

    kept: float
    is_merged: float
    norm: float
    sum_norm: float
    loss_before: float = UNKNOWN_LOSS
    quadratic: float = 0.0
    linear: float = 0.0
    constant: float = 0.0

    def describe(self, scale: float) -> dict[str, Any]:
        """Figures of the update at a scale."""
        figures: dict[str, Any] = {"scale": scale, "update_norm": scale * self.norm}
        if self.sum_norm > 0:
            figures["norm_ratio"] = figures["update_norm"] / self.sum_norm
        if self.is_merged and self.loss_before >= 0:
            loss = (self.quadratic * scale - 2 * self.linear) * scale + self.constant
            figures["loss_after"] = max(0.0, loss)
            if self.loss_before > 0:
                figures["interference_removed"] = 1 - figures["loss_after"] / self.loss_before
        return figures


def scale_for(kept: Sequence[float]) -> float:
    """The scale at which, averaged over layers, the whole of every task vector is kept.

    The mean of 1/p over the layers with p > 0; 1 if there are none.
    """
    inverse = [1 / share for share in kept if share > 0]
    return sum(inverse) / len(inverse) if inverse else 1.0
