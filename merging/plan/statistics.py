"""Statistics of what goes through the experts: the shards that come before a calibrated merge.

For each expert there is a chain of shards, one for each of its blocks
(:mod:`merging.plan.expert_chain`). So a worker holds one block and the activations, whatever the
model's size, and work that stopped goes on at a block. The chains of experts are independent.

A method may ask for what comes out of the merged blocks (``sequential``). Then a block of each
expert is run, the block is merged and written as a part of the output, and that is run on each
expert's samples to go on: three shards, or rows of such, that wait for each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from merging.checkpoint.index import is_file
from merging.errors import MergeError, RecipeError, at_place
from merging.method import MergeMethod
from merging.options import MergeOptions
from merging.plan.expert_chain import ExpertChain, Measuring
from merging.plan.fisher import add_fisher
from merging.plan.inputs import Inputs
from merging.plan.intermediate import Intermediates
from merging.plan.moving import Renumbering
from merging.plan.plan import WORKSPACE, Problem, Source
from merging.plan.problems import ProblemBuilder
from merging.plan.runnable import hidden_width, unfit
from merging.recipe import Recipe
from merging.sampled import BIAS, FISHER, LINEAR, NORM
from merging.storage.base import Storage

_EXPERTS = re.compile(r"mlp\.experts\.(gate|up|gate_up|down)")
_LINEAR = ("attention.", "mlp.", "router", "other", "projection")


def add_statistics(
    problems: Sequence[Problem],
    stages: Intermediates,
    builder: ProblemBuilder,
    inputs: Inputs,
    recipe: Recipe,
    options: MergeOptions,
    storage: Storage,
    warnings: list[str],
) -> list[Problem]:
    """The problems of the output; those with statistics as a step of their method.

    Args:
        problems: All of them.
        stages: To which the shards that measure are added.
        builder: Knows the plan's files and settings.
        inputs: The checkpoints.
        recipe: Has the samples.
        options: Say where statistics are kept.
        storage: Where samples are.
        warnings: What the user should know is added.

    Raises:
        RecipeError: ``incompatible_options``: a model that cannot be run block by block, or
            statistics that cannot be kept; ``bad_parameter``: bad samples.
        StorageError: Samples cannot be read, or statistics may not be kept there.
    """
    folder = _kept_folder(inputs, stages.output_uri, options.statistics_uri, storage)
    if not inputs.method.calibrated:
        return list(problems)
    faults = [f for expert in inputs.experts for f in unfit(expert)]
    if faults:
        raise RecipeError(faults[0].detail, code=faults[0].code, faults=faults)
    width = hidden_width(inputs.experts[0].index) or 0
    wanted = _wanted(problems, inputs.method, stages, width)
    measuring = Measuring(
        measured=_measured(problems, wanted, recipe, is_kept=bool(folder)),
        stages=stages,
        builder=builder,
        recipe=recipe,
        storage=storage,
        threads=options.threads,
        folder=folder,
    )
    if FISHER in inputs.method.calibrated:
        return add_fisher(problems, inputs.experts, measuring, options.seed, warnings)
    chains = [
        ExpertChain(n, expert, measuring, warnings) for n, expert in enumerate(inputs.experts)
    ]
    if inputs.method.sequential:
        return _merge_in_turn(problems, wanted, chains, builder, stages)
    found: dict[str, dict[str, Source]] = {}
    for chain in chains:
        if chain.key not in found:
            found[chain.key] = _run(chain)
    statistics = [found[chain.key] for chain in chains]
    return [_with_statistics(problem, wanted, statistics, stages) for problem in problems]


def _kept_folder(inputs: Inputs, output_uri: str, uri: str | None, storage: Storage) -> str:
    """Normalised address of the folder for statistics; "" if they go with the merge."""
    if uri is None:
        return ""
    method = inputs.method
    try:
        if not method.keeps_statistics:
            why = "measures what merged blocks make of samples, which serves no other merge"
            raise _refusal(
                f"{method.name} {why if method.calibrated else 'looks at no samples'}: there are no"
                " statistics to keep. Leave statistics_uri out."
            )
        folder = storage.normalise(uri)
        storage.list(f"{folder}/{WORKSPACE}")  # holds nothing; fails where nothing can be read
        if is_file(storage, folder):
            raise _refusal(f"{folder} is a file; statistics are kept in a folder of their own.")
        for other in (output_uri, *(index.uri for index in inputs.all_indexes)):
            if f"{folder}/".startswith(f"{other}/"):
                raise _refusal(
                    f"Statistics cannot be kept in {folder}: that is part of {other}, which this"
                    " merge reads or writes. Give them a folder of their own."
                )
    except MergeError as error:
        raise at_place(error, "/options/statistics_uri") from error
    return folder


def _refusal(detail: str) -> RecipeError:
    return RecipeError(detail, code="incompatible_options")


def _merge_in_turn(
    problems: Sequence[Problem],
    wanted: Mapping[str, str],
    chains: Sequence[ExpertChain],
    builder: ProblemBuilder,
    stages: Intermediates,
) -> list[Problem]:
    """Merge block after block; all but the last, and what stands behind it, are written by then."""
    last = chains[0].num_blocks - 1
    blocks: dict[int, list[Problem]] = {block: [] for block in range(-1, last + 1)}
    for problem in problems:
        blocks[chains[0].block_of(problem.tensor_name)].append(problem)
    finals: dict[str, Problem] = {}
    vocabulary = builder.vocabulary
    renumbering = Renumbering(vocabulary, builder, stages) if vocabulary else None
    for block, own in blocks.items():
        found = [chain.run(block, leaves=False) for chain in chains]
        merges = [_with_statistics(problem, wanted, found, stages) for problem in own]
        finals |= {merge.tensor_name: merge for merge in merges}
        if block < last:
            merged = stages.write_output(merges)
            for chain in chains:
                chain.run(block, measures=False, merged=chain.renumbered(merged, renumbering))
    return [finals[problem.tensor_name] for problem in problems]


def _run(chain: ExpertChain) -> dict[str, Source]:
    """Have an expert run from its first block to its last; where its statistics will be."""
    found: dict[str, Source] = {}
    for block in range(-1, chain.num_blocks):
        found |= chain.run(block, leaves=block < chain.num_blocks - 1)
    return found


def _with_statistics(
    problem: Problem,
    wanted: Mapping[str, str],
    found: Sequence[Mapping[str, Source]],
    stages: Intermediates,
) -> Problem:
    """The problem as a step that reads, of every expert, its tensor and then its statistic."""
    step = wanted.get(problem.tensor_name)
    if step is None:
        return problem
    if step == BIAS:
        return stages.of_step(problem, step)
    alternating = tuple(
        source
        for expert, statistics in zip(problem.experts, found, strict=True)
        for source in (expert, statistics[problem.tensor_name])
    )
    return stages.of_step(msgspec.structs.replace(problem, experts=alternating), step)


def _wanted(
    problems: Sequence[Problem], method: MergeMethod, stages: Intermediates, width: int
) -> dict[str, str]:
    """Tensors that a step of the method merges, with its name."""
    wanted = {}
    for problem in problems:
        if stages.method(problem) is method:
            step = FISHER if FISHER in method.calibrated else _step(problem, width)
            if step in method.calibrated:
                wanted[problem.tensor_name] = step
    return wanted


def _step(problem: Problem, width: int = 0) -> str:
    """The step for a tensor, if the method has it; "" for one without a rule.

    Args:
        problem: Makes the tensor.
        width: Of the model's hidden states, by which experts that are stored in×out are told.
    """
    is_weight = problem.tensor_name.endswith(".weight")
    if problem.role == "bias" and len(problem.shape) == 1:
        return BIAS
    if is_weight and problem.role == "norm" and len(problem.shape) == 1:
        return NORM
    if is_weight and len(problem.shape) == 2 and problem.role.startswith(_LINEAR):
        return LINEAR
    if len(problem.shape) == 3 and _EXPERTS.fullmatch(problem.role):
        columns = problem.shape[1 if problem.role.endswith("down") else 2]
        return LINEAR if columns == width else ""
    return ""


def _measured(
    problems: Sequence[Problem], wanted: Mapping[str, str], recipe: Recipe, *, is_kept: bool
) -> dict[str, str]:
    """Tensors of which there are statistics, with what kind.

    Of those that are kept more than are wanted, for other methods: norms cost next to nothing. Not
    where the recipe chooses its tensors one by one, which may be since others cannot be measured.
    """
    found = {name: step for name, step in wanted.items() if step != BIAS}
    if is_kept and LINEAR in found.values() and isinstance(recipe.parameters.get("touch", ""), str):
        found |= {p.tensor_name: NORM for p in problems if _step(p) == NORM}
    return found
