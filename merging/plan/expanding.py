"""What an adapter makes of an embedding or a head, as a tensor whose rows can be moved."""

from __future__ import annotations

import msgspec

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.index import TensorEntry
from merging.method import get_method
from merging.plan.cost import problem_cost, problem_load
from merging.plan.inputs import Expert
from merging.plan.intermediate import Intermediates, is_double
from merging.plan.plan import Parts, Problem
from merging.plan.problems import ProblemBuilder
from merging.plan.settings import MEAN_METHOD, mean_setting


def adapted_tensor(
    expert: Expert, name: str, builder: ProblemBuilder, stages: Intermediates, stage: str
) -> tuple[AdapterIndex | None, TensorEntry]:
    """An expert's whole tensor: the one in its adapter, or one that a stage makes of the factors.

    Args:
        expert: An adapter on a model, which changes this tensor.
        name: Of the tensor, in the output.
        builder: Knows the plan's files and settings.
        stages: To which the one that makes it is added.
        stage: What to call that.

    Returns:
        The adapter with its tensor; or None with one that has the number of a file of the plan.
    """
    entry, adapted = expert.index.tensors[name], expert.adapted[name]
    assert expert.adapter is not None
    if adapted.replacement is not None and not adapted.factors:
        return expert.adapter, adapted.replacement
    stored = [(expert.adapter, adapted.replacement)] if adapted.replacement else []
    parts = [*stored, *((expert.adapter, factor) for factor in adapted.factors)]
    method = get_method(MEAN_METHOD)
    problem = Problem(
        tensor_name=entry.name,
        shape=entry.shape,
        dtype="F32",
        setting=builder.settings.add(mean_setting(1)),
        base=None if stored else builder.source(expert.index, entry, ""),
        experts=tuple(builder.source(index, part, "") for index, part in parts),
        role="embedding",
        parts=(Parts(bool(stored), adapted.rank, adapted.scaling, adapted.flipped),),
    )
    if is_double(problem):
        problem = msgspec.structs.replace(problem, dtype="F64")
    cost = problem_cost([(method, method.parameters())], problem_load(problem), stages.budgets)
    problem = msgspec.structs.replace(
        problem,
        row_block=cost.row_block,
        flops=cost.flops,
        host_bytes=cost.host_bytes,
        device_bytes=cost.device_bytes,
    )
    [made] = stages.write([problem], stage)
    return None, TensorEntry(entry.name, made.dtype, entry.shape, made.file, made.start, made.end)
