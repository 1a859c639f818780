"""What is kept of a receipt beside the merge report."""

from __future__ import annotations

import msgspec

from merging.receipts import ProblemFigures
from service.runner.shards import interference_removed
from tests.support.jobs import receipt_for, tiny_plan


def test_interference_removed_is_one_share_or_null_for_each_tensor_in_file_order() -> None:
    figures = ({"interference_removed": 0.98765}, {}, {"loss_before": 1.0})
    problems = tuple(
        ProblemFigures(f"t{number}", "wudi", 0.1, figure) for number, figure in enumerate(figures)
    )
    receipt = msgspec.structs.replace(receipt_for(tiny_plan(), 0), problems=problems)
    assert interference_removed(receipt) == [0.9877, None, None]
