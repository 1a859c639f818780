"""Whether the tensors of all inputs fit together, and which of them the output has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.checkpoint.scaled import scaled_tensors
from merging.dtypes import is_float
from merging.errors import CheckpointError, Fault
from merging.plan.inputs import Expert, Inputs
from merging.plan.wording import shorten_list


class OutputTensor(NamedTuple):
    """A tensor of the output.

    Attributes:
        name: Its name.
        entry: The donor's tensor.
        section: Number of the section of the inputs that it is merged from.
    """

    name: str
    entry: TensorEntry
    section: int


def check_tensors(inputs: Inputs, warnings: list[str]) -> list[OutputTensor]:
    """The donor's tensors that the output has, in the donor's order; section by section.

    Args:
        inputs: All checkpoints.
        warnings: What the user should know is added here.

    Raises:
        CheckpointError: With a fault for each expert and kind of mismatch; the first ten tensors
            of each are named, the others counted.
    """
    donor = inputs.donor
    dropped = _tied_heads(inputs, warnings)
    faults = _quantised(inputs)
    for section in inputs.sections:
        for expert in section.experts:
            if expert.index is not section.donor:
                faults += _compare(section.donor, expert, dropped, warnings)
            faults += _adapted_heads(expert, dropped)
    if faults:
        more = f" ({len(faults) - 1} more.)" if len(faults) > 1 else ""
        raise CheckpointError(
            faults[0].detail + more,
            code=faults[0].code,
            faults=faults,
            context={"uri": donor.uri},
        )
    _compare_configs(inputs, warnings)
    return [
        OutputTensor(name, entry, number)
        for number, section in enumerate(inputs.sections)
        for name, entry in section.donor.tensors.items()
        if name not in dropped
    ]


def _compare(
    donor: CheckpointIndex, expert: Expert, dropped: set[str], warnings: list[str]
) -> list[Fault]:
    ours, theirs = donor.tensors, expert.index.tensors
    uri = expert.index.uri
    faults: list[Fault] = []

    def refuse(code: str, items: list[str], what: Callable[[str], str]) -> None:
        if items:
            count = f"{len(items)} tensor{'s' if len(items) > 1 else ''}"
            faults.append(Fault(expert.pointer, code, what(count) + f": {shorten_list(items)}."))

    missing = [n for n, e in ours.items() if is_float(e.dtype) and n not in theirs]
    refuse(
        "missing_tensor",
        [ours[name].name for name in missing if name not in dropped],
        lambda count: f"{uri} lacks {count} that {donor.uri} has",
    )
    extra = [n for n in theirs if n not in ours and n not in dropped]
    refuse(
        "extra_tensor",
        [theirs[name].name for name in extra if is_float(theirs[name].dtype)],
        lambda count: f"{uri} has {count} that {donor.uri} does not have",
    )
    buffers = [name for name in extra if not is_float(theirs[name].dtype)]
    if buffers:
        warnings.append(
            f"{uri} has {len(buffers)} integer tensors that {donor.uri} does not have; they are"
            f" left out: {shorten_list(buffers)}."
        )
    shared = [(ours[n], theirs[n]) for n in ours if n in theirs and n not in dropped]
    merged = [(a, b) for a, b in shared if is_float(a.dtype)]
    refuse(
        "shape_mismatch",
        [
            f"{b.name} {list(b.shape)} instead of {list(a.shape)}"
            for a, b in merged
            if a.shape != b.shape
        ],
        lambda count: (
            f"{uri} has {count} of another shape than {donor.uri}; models must agree in"
            " architecture, and in vocabulary unless 'tokenizer_source' says whose to take"
        ),
    )
    refuse(
        "dtype_unsupported",
        [f"{b.name} {b.dtype} instead of {a.dtype}" for a, b in merged if not is_float(b.dtype)],
        lambda count: (
            f"{uri} stores {count} as integers that {donor.uri} stores as floats; a"
            " quantised model must be converted back before it is merged"
        ),
    )
    return faults


def _adapted_heads(expert: Expert, dropped: set[str]) -> list[Fault]:
    """An adapter's work on a head that the output does not have would be lost."""
    lost = sorted(dropped & expert.adapted.keys())
    if not lost:
        return []
    detail = (
        f"The adapter of {expert.pointer} changes {shorten_list(lost)}, which other models tie to"
        " the embedding, so that the merged model has none. Leave the adapter or those models out."
    )
    return [Fault(expert.pointer, "extra_tensor", detail)]


def _quantised(inputs: Inputs) -> list[Fault]:
    """Stored numbers of a quantised checkpoint mean nothing without their scales."""
    pointers = {expert.index.uri: expert.pointer for expert in reversed(inputs.experts)}
    faults = []
    for index in inputs.all_indexes:
        config, scaled = index.config.get("quantization_config"), scaled_tensors(index.tensors)
        if isinstance(config, dict) or scaled:
            kind = "by its tensors"
            if isinstance(config, dict):
                kind = f"{config.get('quant_method', 'quantised')}, by its config.json"
            which = f" of {shorten_list(scaled)}" if scaled else ""
            detail = (
                f"{index.uri} is quantised ({kind}): the stored numbers{which} mean nothing without"
                " their scales and cannot be merged. Convert it to bfloat16 first (load it with"
                " transformers, dequantised, and save it; or by the script that came with it), and"
                " remove quantization_config from its config.json."
            )
            pointer = pointers.get(index.uri, "/base_model")
            faults.append(Fault(pointer, "dtype_unsupported", detail))
    return faults


def _tied_heads(inputs: Inputs, warnings: list[str]) -> set[str]:
    """Output heads that some inputs store and others tie to their embedding: the output ties."""
    indexes = inputs.all_indexes
    if not all(is_tied(index.config) for index in indexes):
        return set()
    heads = {name: None for index in indexes for name in index.tensors if is_head(name)}
    dropped = set()
    for name in heads:
        without = [index.uri for index in indexes if name not in index.tensors]
        if without:
            dropped.add(name)
            warnings.append(
                f"{name} is left out: {shorten_list(without)} tie it to the embedding"
                " (tie_word_embeddings), so the merged model does."
            )
    return dropped


def is_head(name: str) -> bool:
    """Whether a tensor is the output head of a language model."""
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def is_tied(config: dict[str, Any]) -> bool:
    """``tie_word_embeddings``, which is true in transformers if nothing is said."""
    inner = config.get("text_config")
    default = inner.get("tie_word_embeddings", True) if isinstance(inner, dict) else True
    return config.get("tie_word_embeddings", default) is not False


def _compare_configs(inputs: Inputs, warnings: list[str]) -> None:
    donor = inputs.donor
    for index in inputs.all_indexes[1:]:
        for key in ("model_type", "architectures"):
            ours, theirs = donor.config.get(key), index.config.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                warnings.append(
                    f"{index.uri} says {key} {theirs!r} in its config.json, {donor.uri} says"
                    f" {ours!r}; the merged model takes the latter."
                )


def unmatched_filters(filters: Iterable[str], names: Sequence[str]) -> list[str]:
    """Filters that are part of no tensor's name: most likely misspelled."""
    return [f for f in dict.fromkeys(filters) if not any(f in name for name in names)]
