"""What a user should know before a merge runs, as far as headers tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from merging.dtypes import is_float
from merging.method import MergeMethod
from merging.options import MergeOptions
from merging.plan.cost import takes_matrices
from merging.plan.inputs import Expert, Inputs
from merging.plan.outputs import Input
from merging.plan.packing import data_bytes
from merging.plan.plan import Problem, Setting
from merging.plan.tensors import is_head, is_tied
from merging.plan.wording import shorten_list
from merging.recipe import Recipe
from merging.roles import describe_tensor


def warn_of_inputs(recipe: Recipe, inputs: Inputs, described: Sequence[Input]) -> list[str]:
    """Inputs that are stored differently, or that are the same."""
    return [
        *_warn_of_types(recipe, inputs),
        *_warn_of_equals(inputs, described),
        *_warn_of_adapters(inputs),
        *_warn_of_modules(inputs),
    ]


def _warn_of_modules(inputs: Inputs) -> list[str]:
    """Parts of the model that no module of the recipe is about."""
    return [
        f"The recipe's modules leave out {len(section.donor.tensors)} tensors, which are taken over"
        f" from {section.donor.uri}: {shorten_list(list(section.donor.tensors))}."
        for section in inputs.sections
        if not section.experts
    ]


def _warn_of_adapters(inputs: Inputs) -> list[str]:
    adapters = [expert.adapter for expert in inputs.experts if expert.adapter is not None]
    if not adapters:
        return []
    note = inputs.method.adapter_note
    names = {adapter.config.base_name for adapter in adapters} - {""}
    warnings = [note] if note else []
    if len(names) > 1:
        warnings.append(
            "The adapters' configs name different base models:"
            f" {shorten_list(sorted(map(repr, names)))}. An adapter means nothing on another model."
        )
    return [*warnings, *_warn_of_tied_embeddings(inputs.experts)]


_GENERATORS = ("CausalLM", "LMHead", "ConditionalGeneration")
"""In names of classes that have a head over the vocabulary."""


def _warn_of_tied_embeddings(experts: Sequence[Expert]) -> list[str]:
    """An adapter learns beside a head that stays as it is; merged, the head follows."""
    warnings = []
    for expert in experts:
        index = expert.index
        classes = str(index.config.get("architectures"))
        is_generator = any(word in classes for word in _GENERATORS)
        if not is_generator or not is_tied(index.config) or any(map(is_head, index.tensors)):
            continue
        for name in expert.adapted:
            tensor = index.tensors[name]
            if describe_tensor(name, tensor.shape, index.config).kind == "embedding":
                warnings.append(
                    f"The adapter of {expert.pointer} changes {name}, to which the head of"
                    f" {index.uri} is tied: merged, the head changes with it, as it did not when"
                    " the adapter was trained."
                )
    return warnings


def warn_of_problems(
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    method: MergeMethod,
    options: MergeOptions,
) -> list[str]:
    """Tensors that are treated in a way that the user may not expect."""
    return [
        *_warn_of_sizes(problems, options),
        *_warn_of_blocks(problems, options),
        *_warn_of_stacks(problems, settings, method),
    ]


def _warn_of_types(recipe: Recipe, inputs: Inputs) -> list[str]:
    if recipe.dtype or recipe.out_dtype:
        return []
    types = {
        index.uri: Counter(e.dtype for e in index.tensors.values() if is_float(e.dtype))
        for index in inputs.all_indexes
    }
    main = {uri: max(sorted(count), key=count.__getitem__) for uri, count in types.items() if count}
    if len(set(main.values())) < 2:
        return []
    stored = ", ".join(f"{uri} {dtype}" for uri, dtype in main.items())
    return [
        f"The models are stored in different types ({stored}); each merged tensor takes the wider"
        " one. Set 'out_dtype' for another."
    ]


def _warn_of_equals(inputs: Inputs, described: Sequence[Input]) -> list[str]:
    """Checkpoints with the same files: object storage tells equal contents by their ETags."""
    warnings: dict[str, None] = {}
    first: dict[str, Input] = {}
    for item in described:
        if item.role == "base" and not inputs.method.uses_base(is_named=True):
            continue
        other = first.setdefault(item.digest, item)
        if other is item or (inputs.slices and other.uri == item.uri):
            continue
        if other.uri == item.uri:
            text = f"The expert {item.uri} is named more than once, and counts as often."
        elif other.role == "base":
            text = f"The expert {item.uri} has the files of the base model: it changes nothing."
        else:
            text = f"The experts {other.uri} and {item.uri} have the same files: they count twice."
        warnings[text] = None
    return list(warnings)


def _warn_of_sizes(problems: Sequence[Problem], options: MergeOptions) -> list[str]:
    large = [p.tensor_name for p in problems if data_bytes(p) > options.max_shard_size]
    if not large:
        return []
    return [
        f"{len(large)} tensors are larger than max_shard_size ({options.max_shard_size} bytes) and"
        f" have files of their own: {shorten_list(large)}."
    ]


def _warn_of_blocks(problems: Sequence[Problem], options: MergeOptions) -> list[str]:
    blocked = [p for p in problems if p.row_block]
    if not blocked:
        return []
    budget = "memory_budget" if options.device_memory_budget is None else "device_memory_budget"
    smallest = min(p.row_block for p in blocked)
    return [
        f"Too large for {budget} as a whole, and solved in blocks of {smallest} rows or more, which"
        f" may take longer: {shorten_list([p.tensor_name for p in blocked])}."
    ]


def _warn_of_stacks(
    problems: Sequence[Problem], settings: Sequence[Setting], method: MergeMethod
) -> list[str]:
    """Tensors that hold the matrices of all experts of a mixture, which no layer method takes."""
    stacked = [
        p
        for p in problems
        if p.role.startswith("mlp.experts.") and len(p.shape) > 2
        if settings[p.setting].method != method.name
    ]
    if not stacked or not takes_matrices(method):
        return []
    become = settings[stacked[0].setting].method
    return [
        f"Tensors that hold the matrices of all experts of a layer in one are left to {become},"
        f" since {method.name} works on single matrices:"
        f" {shorten_list([p.tensor_name for p in stacked])}."
    ]
