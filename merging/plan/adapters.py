"""What an adapter makes of each tensor of its base model, from headers alone.

Every tensor of the adapter is accounted for: it is a factor of an update of a tensor of the base,
or replaces one (modules_to_save, biases, embeddings), or the adapter is refused.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.documents import shorten_all
from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import is_float
from merging.errors import Fault
from merging.roles import describe_tensor

_WRAPPER = "base_model.model."
"""In front of the model's own names, since peft wraps the model."""

_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_ORIGINAL = ".original_module."
"""In names of the base's tensors beside those that replace them; saved now and then, and unused."""

_FOREIGN = (
    ("lora_magnitude_vector", "belong to DoRA"),
    ("lora_B.bias", "are biases of the factors (lora_bias)"),
    ("trainable_tokens", "are tuned single tokens"),
    ("token_adapter", "are tuned single tokens"),
    ("lora_", "are of a kind of adapter that is not supported"),
)


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """What an adapter has for one tensor of its base model.

    Attributes:
        replacement: Stands for the base's tensor.
        factors: lora_A and lora_B of an update that is added.
        rank: Of the update; 0 if there is none.
        scaling: On the product of the factors.
        flipped: The product is that of the transposed tensor.
    """

    replacement: TensorEntry | None = None
    factors: tuple[TensorEntry, ...] = ()
    rank: int = 0
    scaling: float = 1.0
    flipped: bool = False


@dataclass(slots=True)
class _Module:
    """The factors of one module, by letter."""

    factors: dict[str, TensorEntry]
    is_embedding: bool = False


def fit_adapter(
    adapter: AdapterIndex, base: CheckpointIndex, pointer: str
) -> tuple[dict[str, AdaptedTensor], list[Fault]]:
    """What the adapter makes of the base's tensors, by their names; and what does not fit.

    Args:
        adapter: The adapter.
        base: The model that it is put on.
        pointer: Into the recipe, for faults.
    """
    return _Fitting(adapter, base, pointer).run()


class _Fitting:
    """One call of :func:`fit_adapter`."""

    def __init__(self, adapter: AdapterIndex, base: CheckpointIndex, pointer: str) -> None:
        self._adapter = adapter
        self._base = base
        self._pointer = pointer
        self._faults: list[Fault] = []
        self._modules: dict[str, _Module] = {}
        self._replacements: dict[str, TensorEntry] = {}

    def run(self) -> tuple[dict[str, AdaptedTensor], list[Fault]]:
        self._sort()
        weights = [f"{module}.weight" for module in self._modules]
        rename = match_names(weights, self._base.tensors)
        found: dict[str, AdaptedTensor] = {}
        self._refuse_missing([n for n in weights if rename(n) not in self._base.tensors])
        self._refuse_missing([n for n in self._replacements if self._place(n, rename) is None])
        for name, entry in self._replacements.items():
            place = self._place(name, rename)
            if place and self._replaces(entry, self._base.tensors[place]):
                found[place] = AdaptedTensor(replacement=entry)
        for name, module in self._modules.items():
            target = self._base.tensors.get(rename(f"{name}.weight"))
            if target is not None:
                updated = self._update(name, module, target)
                if updated is not None:
                    before = found.get(target.name, AdaptedTensor())
                    found[target.name] = _replace_before(updated, before)
        if not (found or self._faults):
            self._refuse("missing_tensor", f"The adapter {self._adapter.uri} holds no tensors.")
        self._check_layout(found)
        return found, self._faults

    def _refuse(self, code: str, detail: str) -> None:
        self._faults.append(Fault(self._pointer, code, detail))

    def _sort(self) -> None:
        """Tell factors from tensors that replace others."""
        foreign: dict[str, list[str]] = defaultdict(list)
        for name, entry in self._adapter.tensors.items():
            own = name.removeprefix(_WRAPPER)
            if match := _FACTOR.fullmatch(own):
                module = self._modules.setdefault(match[1], _Module({}))
                module.factors[match[2] or match[3]] = entry
                module.is_embedding = match[3] is not None
            elif reasons := [reason for part, reason in _FOREIGN if part in own]:
                foreign[reasons[0]].append(name)
            elif _ORIGINAL not in own:
                self._replacements[_SAVED.sub("", own)] = entry
        for reason, names in foreign.items():
            self._refuse(
                "adapter_unsupported",
                f"{len(names)} tensors of the adapter {self._adapter.uri} {reason}:"
                f" {shorten_all(names)}. Merge it into its base model with peft's"
                " merge_and_unload(), save that, and name the new folder.",
            )

    def _place(self, name: str, rename: Callable[[str], str]) -> str | None:
        """The base's tensor that one of that name replaces."""
        return next((n for n in (rename(name), name) if n in self._base.tensors), None)

    def _refuse_missing(self, names: list[str]) -> None:
        if not names:
            return
        trained_on = self._adapter.config.base_name
        said = f" (its config names {trained_on!r})" if trained_on else ""
        tied = (
            " The base ties its head to the embedding and stores none: an adapter of the head"
            " cannot be kept apart from the embedding."
            if any(name.endswith("lm_head.weight") for name in names)
            else ""
        )
        self._refuse(
            "missing_tensor",
            f"The adapter {self._adapter.uri} adapts {len(names)} tensors that {self._base.uri}"
            f" does not have: {shorten_all(names)}.{tied} Name the model that it was trained on"
            f"{said}.",
        )

    def _replaces(self, entry: TensorEntry, target: TensorEntry) -> bool:
        if entry.shape == target.shape and is_float(entry.dtype) and is_float(target.dtype):
            return True
        self._refuse(
            "shape_mismatch",
            f"{entry.name} of the adapter {self._adapter.uri} is {entry.dtype}"
            f" {list(entry.shape)}; {target.name} of {self._base.uri}, which it replaces, is"
            f" {target.dtype} {list(target.shape)}. Models must agree in vocabulary and classes.",
        )
        return False

    def _update(self, name: str, module: _Module, target: TensorEntry) -> AdaptedTensor | None:
        uri, config = self._adapter.uri, self._adapter.config
        if len(module.factors) < 2:
            there = next(iter(module.factors))
            self._refuse(
                "missing_tensor",
                f"The adapter {uri} has lora_{there} of {name} without its other factor. Finish its"
                " download, or save it again.",
            )
            return None
        first, second = module.factors["A"], module.factors["B"]
        role = describe_tensor(target.name, target.shape, self._base.config)
        flipped = module.is_embedding or role.transposed
        rank = first.shape[0] if first.shape else 0
        if not (
            _fits(first, second, target, flipped=flipped) and _all_float(first, second, target)
        ):
            rows, columns = target.shape[:1], target.shape[1:]
            if flipped:
                rows, columns = columns, rows
            self._refuse(
                "shape_mismatch",
                f"The adapter {uri} has factors {first.dtype} {list(first.shape)} and"
                f" {second.dtype} {list(second.shape)} of {name}; {target.name} of"
                f" {self._base.uri}, {target.dtype} {list(target.shape)}, needs floats"
                f" {['r', *columns]} and {[*rows, 'r']}. Name the model that it was trained on.",
            )
            return None
        if rank != config.rank_of(name):
            self._refuse(
                "config_invalid",
                f"{uri}/adapter_config.json gives {name} rank {config.rank_of(name)}, but its"
                f" factors have rank {rank}: the two files do not belong together. Save the adapter"
                " again.",
            )
            return None
        scaling = config.scaling_of(name, rank)
        return AdaptedTensor(None, (first, second), rank, scaling, flipped)

    def _check_layout(self, found: Mapping[str, AdaptedTensor]) -> None:
        """A config that says in×out for a model that stores out×in is that of another model."""
        updated = [n for n, a in found.items() if a.rank]
        if (
            self._adapter.config.fan_in_fan_out
            and updated
            and not any(found[name].flipped for name in updated)
        ):
            self._refuse(
                "config_invalid",
                f"{self._adapter.uri}/adapter_config.json says that layers are stored in×out"
                f" (fan_in_fan_out), but those of {self._base.uri} are not, such as {updated[0]}."
                " Name the model that it was trained on.",
            )


def _replace_before(updated: AdaptedTensor, before: AdaptedTensor) -> AdaptedTensor:
    """An update of a tensor that is replaced as well."""
    return AdaptedTensor(
        before.replacement, updated.factors, updated.rank, updated.scaling, updated.flipped
    )


def _all_float(*entries: TensorEntry) -> bool:
    return all(is_float(entry.dtype) for entry in entries)


def _fits(first: TensorEntry, second: TensorEntry, target: TensorEntry, *, flipped: bool) -> bool:
    """Whether the product of two factors has the shape of a tensor (convolutions unrolled)."""
    if len(target.shape) < 2 or len(first.shape) < 2 or len(second.shape) < 2 or not first.shape[0]:
        return False
    rank = first.shape[0]
    if flipped:
        return first.shape == (rank, target.shape[0]) and second.shape == (target.shape[1], rank)
    is_flat = math.prod(second.shape[2:]) == 1
    return (
        is_flat
        and first.shape[1:] == target.shape[1:]
        and second.shape[:2]
        == (
            target.shape[0],
            rank,
        )
    )


def match_names(names: Sequence[str], known: Mapping[str, object]) -> Callable[[str], str]:
    """How names in an adapter become those of a checkpoint that puts other parts in front.

    A checkpoint of a bare model lacks the prefix that the model with a head has (``transformer.``),
    or the other way around; nested models were renamed over the years. One prefix becomes another
    if all names with it then exist, and none did before.
    """
    missing = [name for name in names if name not in known]
    if not missing:
        return lambda name: name
    endings: dict[str, list[str]] = defaultdict(list)
    for name in known:
        parts = name.split(".")
        for cut in range(len(parts) - 1):
            endings[".".join(parts[cut:])].append(name)
    prefixes: dict[str, str] = {}
    while missing:
        old, new = _prefix_pair(missing[0], endings) or (missing[0], "")
        moved = [name for name in names if name.startswith(old)]
        missing = [name for name in missing if not name.startswith(old)]
        if all(name not in known and new + name[len(old) :] in known for name in moved):
            prefixes[old] = new

    def rename(name: str) -> str:
        if name in known:
            return name
        for old, new in prefixes.items():
            if name.startswith(old) and new + name[len(old) :] in known:
                return new + name[len(old) :]
        return name

    return rename


def _prefix_pair(name: str, endings: Mapping[str, list[str]]) -> tuple[str, str] | None:
    """The prefix of a name and that of the only known name with the same longest ending."""
    parts = name.split(".")
    for cut in range(len(parts) - 1):
        ending = ".".join(parts[cut:])
        if found := endings.get(ending):
            if len(found) > 1:
                return None
            return name[: len(name) - len(ending)], found[0][: len(found[0]) - len(ending)]
    return None
