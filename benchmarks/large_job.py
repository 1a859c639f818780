"""A job as large as any, told by a stand-in for the runner: no tensor is read or solved.

126 layers in 500 shards, as a model of 405 billion parameters has them, told of 20 times a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merging.plan.outputs import Input, Totals
from merging.plan.plan import PLAN_FORMAT, Plan, Problem, Setting, Shard
from service.jobs.records import NewJob, Progress, ShardCounts
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState, ShardState

ROLES = (
    "attention.q", "attention.k", "attention.v", "attention.o",
    "mlp.gate", "mlp.up", "mlp.down", "norm", "norm",
)  # fmt: skip
_BYTES = 1 << 28
_RECIPE = {"merge_method": "swudi_a", "models": [{"model": "/models/a"}], "base_model": "/models/b"}


class LargeJob:
    """Submits the job and tells of it, on the store of a service that serves the pages.

    Args:
        store: Of the service.
        layers: Of the model.
        shards: Output files.
        workers: That seem to work at once.
    """

    def __init__(
        self, store: SqlJobStore, *, layers: int = 126, shards: int = 500, workers: int = 64
    ) -> None:
        self._store = store
        self._workers = workers
        self.plan = _plan(layers, shards)
        job = NewJob(
            recipe_source=_RECIPE,
            recipe=_RECIPE,
            recipe_digest="sha256:recipe",
            method="swudi_a",
            methods=("swudi_a",),
            output_uri="/models/merged-405b",
            inputs=({"uri": "/models/a", "role": "expert", "digest": "sha256:a"},),
        )
        self.id = store.submit(job)[0].id
        claim = store.claim("benchmark", 3600)
        assert claim is not None
        assert claim.job_id == self.id
        self._claim = claim
        store.save_plan(claim, self.plan)
        store.transition(claim, JobState.RUNNING)
        store.set_phase(claim, "merging")

    def tell(self, seconds: float, *, per_second: float = 20) -> None:
        """Bring the job to its last shard in this time, by so many updates a second."""
        updates = max(1, int(seconds * per_second))
        total = len(self.plan.shards)
        begin, begun, done = time.monotonic(), 0, 0
        for update in range(1, updates + 1):
            reached = total * update // updates
            while begun < min(reached + self._workers, total):
                self._record(begun, ShardState.RUNNING)
                begun += 1
            while done < reached:
                self._record(done, ShardState.SUCCEEDED)
                done += 1
            self._progress(done, begun, update)
            time.sleep(max(0.0, begin + update / per_second - time.monotonic()))

    @contextmanager
    def telling(self, seconds: float) -> Iterator[None]:
        """Tell of it in a thread, to its end."""
        thread = threading.Thread(target=self.tell, args=(seconds,), name="telling")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _record(self, index: int, state: ShardState) -> None:
        place: dict[str, Any] = {
            "worker": f"node-{index % self._workers // 8}:{index % self._workers}",
            "device": "cuda:0 NVIDIA H100",
        }
        if state == ShardState.SUCCEEDED:
            shard = self.plan.shards[index]
            place = {
                "receipt": {
                    "size": shard.size,
                    "bytes_read": shard.bytes_read,
                    "peak_buffer_bytes": 9 * _BYTES + index,
                    "seconds": {"total": 3.0},
                    "worker": place["worker"],
                    "interference_removed": [0.7 + index % 30 / 100 for _ in shard.problems],
                }
            }
        self._store.record_shard(self._claim, index, state, attempt=1, **place)

    def _progress(self, done: int, begun: int, update: int) -> None:
        total = len(self.plan.shards)
        tensors = sum(len(shard.problems) for shard in self.plan.shards[:done])
        progress = Progress(
            shards_done=done,
            shards_total=total,
            bytes_done=done * 4 * _BYTES,
            bytes_total=total * 4 * _BYTES,
            tensors_done=tensors,
            tensors_total=self.plan.totals.tensors,
        )
        counts = []
        for index in range(done, begun):
            most = len(self.plan.shards[index].problems)
            counts.append(ShardCounts(index, most, min(most, update % (most + 1)), 0))
        self._store.update_progress(self._claim, progress, shards=counts)


def _plan(layers: int, shards: int) -> Plan:
    names = [("model.embed_tokens.weight", "embedding", -1), ("lm_head.weight", "head", -1)]
    for layer in range(layers):
        names += [
            (f"model.layers.{layer}.{role}.{place}.weight", role, layer)
            for place, role in enumerate(ROLES)
        ]
    problems = [
        Problem(name, (16384, 16384), "BF16", 0, None, (), flops=1e12, role=role, layer=layer)
        for name, role, layer in names
    ]
    made = tuple(
        Shard(
            index,
            f"model-{index + 1:05d}-of-{shards:05d}.safetensors",
            _BYTES,
            tuple(
                problems[index * len(problems) // shards : (index + 1) * len(problems) // shards]
            ),
        )
        for index in range(shards)
    )
    return Plan(
        format=PLAN_FORMAT,
        recipe=_RECIPE,
        recipe_digest="sha256:recipe",
        method="swudi_a",
        output_uri="/models/merged-405b",
        overwrite=False,
        seed=0,
        threads=1,
        memory_budget=4 << 30,
        check_finite=True,
        inputs=(Input("/models/a", "expert", "sha256:a"),),
        files=(),
        settings=(Setting("swudi_a"),),
        shards=made,
        config={},
        companions=(),
        warnings=(),
        totals=Totals(len(problems), 0, shards * _BYTES, 1e15, 10 * _BYTES, 10 * _BYTES),
    )
