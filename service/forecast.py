"""How long merges should take, from what workers said of their speed in receipts."""

from __future__ import annotations

from pathlib import Path

from merging.plan.plan import Plan
from merging.plan.timing import PlanEstimate, estimate_seconds
from merging.rates import RateBook, Rates


class Forecast:
    """Remembers rates of workers and how many there are; may be used from several threads.

    Args:
        path: File that keeps the rates; None keeps them in memory.
        device: Device setting of shards: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(self, path: Path | None = None, device: str = "auto") -> None:
        self._book = RateBook(path)
        self._device = None if device == "auto" else device.partition(":")[0]
        self._slots = 1

    def note_rates(self, rates: Rates | None) -> None:
        """Take in what a receipt carries, if it carries rates."""
        if rates is not None:
            self._book.note(rates)

    def note_slots(self, count: int) -> None:
        """Take in how many shards are worked on at once; 0 while nobody can say."""
        self._slots = count or self._slots

    def estimate(self, plan: Plan) -> PlanEstimate | None:
        """The time of a plan on the workers seen last; None before any were seen."""
        rates = self._book.find(device=self._device)
        return estimate_seconds(plan, rates, self._slots) if rates else None
