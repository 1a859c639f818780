"""A merge of adapters whose result is an adapter, as PEFT reads it.

Each layer that an adapter changes is merged into two factors, an intermediate result of which the
output's lora_A and lora_B are parts. The base model is not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from merging.checkpoint.adapter import WEIGHTS_NAME, AdapterIndex
from merging.errors import Fault, RecipeError
from merging.factored import FACTORS
from merging.method import get_method
from merging.options import MergeOptions
from merging.plan.adapters import WRAPPER
from merging.plan.cost import problem_cost, problem_load
from merging.plan.inputs import Inputs
from merging.plan.intermediate import Intermediates, part_of
from merging.plan.packing import make_shard
from merging.plan.plan import Parts, Problem, Shard, Source
from merging.plan.problems import ProblemBuilder, promote
from merging.plan.variants import takes_passes
from merging.plan.wording import shorten_list
from merging.recipe import Recipe
from merging.singular_values import SVC

WITHOUT = "Leave 'adapter_rank' out for a whole checkpoint."


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """The output's tensors and its ``adapter_config.json``."""

    problems: list[Problem]
    config: dict[str, Any]


def _no_update(method: str) -> str:
    return (
        f"The result of {method} is no base model with an update that follows from each layer's"
        " factors, so it cannot be written as an adapter."
    )


def refuse_adapter_output(options: MergeOptions) -> None:
    """Refuse an adapter as the result of several documents, whose results are whole models.

    Raises:
        RecipeError: ``incompatible_options``.
    """
    if options.adapter_rank is not None:
        detail = f"The result of several documents cannot be written as an adapter. {WITHOUT}"
        fault = Fault("/documents", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])


def adapter_shard(problems: Sequence[Problem], index: int) -> Shard:
    """The one file of an adapter."""
    return make_shard(index, WEIGHTS_NAME, problems, kind="weights")


def check_adapter_output(recipe: Recipe, inputs: Inputs, *, has_own_tokens: bool) -> None:
    """Refuse recipes whose result is no adapter.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        has_own_tokens: The vocabulary is not that of the base model.

    Raises:
        RecipeError: ``incompatible_options``, with a fault for each reason.
    """
    method = get_method(recipe.merge_method)
    faults: list[Fault] = []

    def refuse(pointer: str, detail: str) -> None:
        faults.append(Fault(pointer, "incompatible_options", f"{detail} {WITHOUT}"))

    for key in ("sweep", "slices", "modules"):
        if getattr(recipe, key):
            refuse(f"/{key}", f"A recipe with {key!r} cannot be written as an adapter.")
    if has_own_tokens and recipe.tokenizer is not None:
        refuse(recipe.tokenizer.pointer, "An adapter has the vocabulary of its base model.")
    if not method.takes_adapters or not method.needs_base:
        refuse("/merge_method", _no_update(method.name))
    for expert in inputs.experts:
        if expert.adapter is None or expert.index is not inputs.base:
            refuse(expert.pointer, "Only adapters of the base model are merged into an adapter.")
    if faults:
        raise RecipeError(faults[0].detail, code="incompatible_options", faults=faults)


def adapter_output(
    problems: Sequence[Problem],
    stages: Intermediates,
    builder: ProblemBuilder,
    inputs: Inputs,
    rank: int,
) -> AdapterOutput:
    """The output's tensors in place of those of a checkpoint.

    Args:
        problems: Of the checkpoint.
        stages: To which the merging of factors is added.
        builder: Knows the plan's settings.
        inputs: Adapters of one base, as :func:`check_adapter_output` has seen to.
        rank: Of the result, in the recipe's type or that of the factors; 0 is that of all experts'
            factors of a layer together.

    Raises:
        RecipeError: ``incompatible_options``: an adapter changes something else than layers.
    """
    changed = [p for p in problems if stages.method(p) is not None and p.num_made]
    if any(_looks_further(problem, builder) for problem in changed):
        detail = f"{_no_update(inputs.method.name + ' with these parameters')} {WITHOUT}"
        fault = Fault("/merge_method", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])
    _check(changed, inputs)
    made: list[tuple[Problem, str, int]] = []
    for problem in changed:
        rows, columns = problem.input_shape
        own = min(rank or sum(problem.ranks), sum(problem.ranks), rows, columns)
        made.append((problem, _module(problem, inputs), own))
    maps = [_factors(p, m, own, builder.dtype, stages) for p, m, own in made]
    sources = stages.write(maps, "factors")
    found: list[Problem] = []
    for (problem, module, own), source in zip(made, sources, strict=True):
        found += _parts(problem, module, own, source, builder, stages)
    ranks = {module: own for _, module, own in made}
    transposed = any(problem.transposed for problem in changed)
    return AdapterOutput(found, _config(inputs, ranks, transposed=transposed))


def _looks_further(problem: Problem, builder: ProblemBuilder) -> bool:
    """Whether a layer is merged in several passes, or calibrated after that."""
    setting, parameters = problem.setting, builder.settings.parameters(problem.setting)
    is_calibrated = getattr(parameters, SVC, None) is not None
    return is_calibrated or takes_passes(builder.settings.settings[setting], parameters)


def _check(changed: Sequence[Problem], inputs: Inputs) -> None:
    """Refuse what is no factors of a layer, adapter by adapter."""
    faults = []
    for number, expert in enumerate(inputs.experts):
        others = [p.tensor_name for p in changed if not _is_of_layer(p, p.parts[number])]
        if others:
            detail = (
                "Only factors of linear layers are merged into an adapter; this one also changes"
                f" {shorten_list(others)}. {WITHOUT}"
            )
            faults.append(Fault(expert.pointer, "incompatible_options", detail))
    if faults or not changed:
        detail = faults[0].detail if faults else f"The adapters change nothing. {WITHOUT}"
        raise RecipeError(detail, code="incompatible_options", faults=faults)


def _is_of_layer(problem: Problem, part: Parts) -> bool:
    """Whether what an adapter has for a tensor is factors of a linear layer, or nothing."""
    is_plain = len(problem.input_shape) == 2 and part.flipped == problem.transposed
    return not part.is_stored and (part.rank == 0 or is_plain)


def _module(problem: Problem, inputs: Inputs) -> str:
    """What adapters call the layer."""
    found = (expert.adapted.get(problem.tensor_name) for expert in inputs.experts)
    return next(adapted.module for adapted in found if adapted is not None and adapted.module)


def _factors(
    problem: Problem, module: str, rank: int, dtype: str | None, stages: Intermediates
) -> Problem:
    """The merging of a layer into its factors, named after the first."""
    return stages.of_step(
        msgspec.structs.replace(
            problem,
            tensor_name=f"{WRAPPER}{module}.lora_A.weight",
            shape=(rank * sum(problem.input_shape),),
            source_shape=problem.input_shape,
            dtype=dtype or promote(source.dtype for source in problem.experts),
            base=None,
            sees_base=False,
        ),
        f"{FACTORS}{rank}",
    )


def _parts(
    problem: Problem,
    module: str,
    rank: int,
    source: Source,
    builder: ProblemBuilder,
    stages: Intermediates,
) -> list[Problem]:
    """lora_A and lora_B."""
    rows, columns = problem.input_shape
    if problem.transposed:
        rows, columns = columns, rows
    setting = builder.settings.copy()
    found = []
    for letter, shape, entries in (
        ("A", (rank, columns), slice(rank * columns)),
        ("B", (rows, rank), slice(rank * columns, None)),
    ):
        part = Problem(
            tensor_name=f"{WRAPPER}{module}.lora_{letter}.weight",
            shape=shape,
            dtype=source.dtype,
            setting=setting,
            base=part_of(source, entries),
            experts=(),
            role=problem.role,
            layer=problem.layer,
        )
        cost = problem_cost([(None, None)], problem_load(part), stages.budgets)
        found.append(
            msgspec.structs.replace(
                part, host_bytes=cost.host_bytes, device_bytes=cost.device_bytes
            )
        )
    return found


def _config(inputs: Inputs, ranks: Mapping[str, int], *, transposed: bool) -> dict[str, Any]:
    """``adapter_config.json``: a scaling of 1 everywhere, ranks that differ as patterns."""
    configs = [e.adapter.config for e in inputs.experts if isinstance(e.adapter, AdapterIndex)]
    names = list(dict.fromkeys(config.base_name for config in configs))
    assert inputs.base is not None
    [(rank, _)] = Counter(ranks.values()).most_common(1)
    pattern = {module: own for module, own in sorted(ranks.items()) if own != rank}
    tasks = {config.task_type for config in configs}
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": names[0] if len(names) == 1 and names[0] else inputs.base.uri,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": sorted(ranks),
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "use_dora": False,
        "use_rslora": False,
    }
