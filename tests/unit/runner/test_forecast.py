"""What receipts say of the workers' speed reaches whoever answers for plans, and no record."""

from __future__ import annotations

import msgspec

from merging.receipts import Receipt
from service.jobs.states import JobState
from tests.support.fake_pool import FakePool
from tests.support.rates import RATES
from tests.support.runner_bench import Bench
from workers.messages import ShardTask


class MeasuredPool(FakePool):
    """Its workers know their speed."""

    def _publish(self, task: ShardTask) -> Receipt:
        return msgspec.structs.replace(super()._publish(task), rates=RATES)


def test_rates_in_receipts_make_forecasts(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner(MeasuredPool(bench.storage))
    forecast = runner.runner._forecast
    runner.turn_until(lambda: bench.store.load_plan(job.id))
    plan = bench.store.load_plan(job.id)
    assert plan is not None
    assert forecast.estimate(plan) is None
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    estimate = forecast.estimate(plan)
    assert estimate is not None
    assert estimate.slots == runner.pool.slots()
    for shard in bench.store.shards(job.id):
        assert shard.receipt is not None
        assert "rates" not in shard.receipt
