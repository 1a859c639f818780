"""What an adapter makes of each tensor of its base model, from headers alone.

Every tensor of the adapter is accounted for: it is a factor of an update of a tensor of the base,
or replaces one (modules_to_save, biases, embeddings), or the adapter is refused.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from merging.checkpoint.adapter import WEIGHTS_NAME, AdapterIndex
from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import is_float
from merging.errors import Fault
from merging.plan.renaming import match_names
from merging.plan.wording import shorten_list
from merging.roles import describe_tensor

WRAPPER = "base_model.model."
"""In front of the model's own names, since peft wraps the model."""

_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_COPY = ".modules_to_save."
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
        module: The layer's name in the adapter, if it has an update.
        factors: lora_A and lora_B of an update that is added.
        scaling: On the product of the factors.
        flipped: The product is that of the transposed tensor.
    """

    replacement: TensorEntry | None = None
    module: str = ""
    factors: tuple[TensorEntry, ...] = ()
    scaling: float = 1.0
    flipped: bool = False

    @property
    def rank(self) -> int:
        """Of the update; 0 if there is none."""
        return self.factors[0].shape[0] if self.factors else 0


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
    fitting = _Fitting(adapter, base, pointer)
    return fitting.run(), fitting.faults


class _Fitting:
    """One call of :func:`fit_adapter`."""

    def __init__(self, adapter: AdapterIndex, base: CheckpointIndex, pointer: str) -> None:
        self.faults: list[Fault] = []
        self._adapter = adapter
        self._base = base
        self._pointer = pointer
        self._modules: dict[str, _Module] = {}
        self._replacements: dict[str, TensorEntry] = {}
        self._twice: list[str] = []

    def run(self) -> dict[str, AdaptedTensor]:
        self._sort()
        rename = match_names([f"{name}.weight" for name in self._modules], self._base.tensors)
        found: dict[str, AdaptedTensor] = {}
        missing: list[str] = []
        for name, entry in self._replacements.items():
            if target := self._target(name, rename):
                found[target.name] = AdaptedTensor(replacement=entry)
            else:
                missing.append(name)
        for name, module in self._modules.items():
            if target := self._target(f"{name}.weight", rename):
                before = found.get(target.name, AdaptedTensor())
                if before.factors:
                    self._twice.append(name)
                elif len(module.factors) == 2:
                    found[target.name] = self._update(name, module, target, before.replacement)
            else:
                missing.append(f"{name}.weight")
        self._refuse_missing(missing)
        self._refuse(
            "missing_tensor",
            [name for name, module in self._modules.items() if len(module.factors) < 2],
            "has only one of the two factors of",
            "Finish its download, or save it again",
        )
        self._refuse(
            "index_inconsistent",
            self._twice,
            "says more than once what becomes of",
            "Save it again, with one name for each tensor",
        )
        if not self._adapter.tensors:
            self._refuse("missing_tensor", [WEIGHTS_NAME], "holds nothing in", "Save it again")
        self._check_shapes(found)
        return found

    def _refuse(self, code: str, items: list[str], what: str, advice: str) -> None:
        """Add a fault, unless there are no items."""
        if items:
            detail = f"The adapter {self._adapter.uri} {what}: {shorten_list(items)}. {advice}."
            self.faults.append(Fault(self._pointer, code, detail))

    def _sort(self) -> None:
        """Tell factors from tensors that replace others, and from what is not known."""
        foreign: dict[str, list[str]] = defaultdict(list)
        for name, entry in self._adapter.tensors.items():
            own = name.removeprefix(WRAPPER)
            if match := _FACTOR.fullmatch(own):
                module = self._modules.setdefault(match[1], _Module({}))
                self._take(module.factors, match[2] or match[3], entry)
                module.is_embedding = match[3] is not None
            elif reasons := [reason for part, reason in _FOREIGN if part in own]:
                foreign[reasons[0]].append(name)
            elif _ORIGINAL not in own:
                self._take_replacement(_SAVED.sub("", own), entry)
        for reason, names in foreign.items():
            self._refuse(
                "adapter_unsupported",
                names,
                f"has tensors that {reason}",
                "Merge it with peft's merge_and_unload() and name the new folder",
            )

    def _take(self, entries: dict[str, TensorEntry], key: str, entry: TensorEntry) -> None:
        if entries.setdefault(key, entry) is not entry:
            self._twice.append(entry.name)

    def _take_replacement(self, key: str, entry: TensorEntry) -> None:
        """With ``bias: all``, peft writes biases of saved modules under a second name as well."""
        if _COPY in entry.name:
            self._replacements.setdefault(key, entry)
            return
        if key in self._replacements and _COPY in self._replacements[key].name:
            del self._replacements[key]
        self._take(self._replacements, key, entry)

    def _target(self, name: str, rename: Callable[[str], str]) -> TensorEntry | None:
        """The base's tensor of that name."""
        tensors = self._base.tensors
        return tensors.get(rename(name)) or tensors.get(name)

    def _update(
        self, name: str, module: _Module, target: TensorEntry, replacement: TensorEntry | None
    ) -> AdaptedTensor:
        factors = (module.factors["A"], module.factors["B"])
        role = describe_tensor(target.name, target.shape, self._base.config)
        rank = max(1, math.prod(factors[0].shape[:1]))
        scaling = self._adapter.config.scaling_of(name, rank)
        flipped = module.is_embedding or role.transposed
        return AdaptedTensor(replacement, name, factors, scaling, flipped)

    def _refuse_missing(self, names: list[str]) -> None:
        tied = ""
        if any(name.endswith("lm_head.weight") for name in names):
            tied = "A head that is tied to the embedding cannot be changed by itself. "
        self._refuse(
            "missing_tensor",
            names,
            f"is for {len(names)} tensors that {self._base.uri} does not have",
            tied + self._advice,
        )

    @property
    def _advice(self) -> str:
        trained_on = self._adapter.config.base_name
        said = f" (its config names {trained_on!r})" if trained_on else ""
        return f"Name the model that it was trained on{said}"

    def _check_shapes(self, found: Mapping[str, AdaptedTensor]) -> None:
        """Refuse what does not fit the base's tensors, or the config."""
        shapes, ranks, layouts = [], [], []
        config = self._adapter.config
        for name, adapted in found.items():
            target = self._base.tensors[name]
            if misfit := _misfit(target, adapted):
                shapes.append(misfit)
            elif adapted.rank and adapted.rank != config.rank_of(adapted.module):
                ranks.append(f"{adapted.module} has {adapted.rank}")
            elif adapted.rank and not adapted.flipped:
                layouts.append(name)
        self._refuse("shape_mismatch", shapes, f"does not fit {self._base.uri}", self._advice)
        self._refuse(
            "config_invalid",
            ranks,
            "has factors of other ranks than its adapter_config.json says",
            "The two files do not belong together; save it again",
        )
        if config.fan_in_fan_out and not any(adapted.flipped for adapted in found.values()):
            self._refuse(
                "config_invalid",
                layouts,
                "is of layers stored in×out (fan_in_fan_out in its adapter_config.json), but those"
                f" of {self._base.uri} are not",
                self._advice,
            )


def _misfit(target: TensorEntry, adapted: AdaptedTensor) -> str | None:
    """What of an adapter does not fit a tensor; None if all does."""
    new = adapted.replacement
    if not is_float(target.dtype):
        return f"{target.name} is {target.dtype}, which cannot be adapted"
    if new is not None and not (new.shape == target.shape and is_float(new.dtype)):
        return f"{new.name} {new.dtype} {list(new.shape)} instead of {list(target.shape)}"
    if not adapted.factors:
        return None
    first, second = adapted.factors
    if is_float(first.dtype) and is_float(second.dtype) and _multiply(target, adapted):
        return None
    return (
        f"lora_A {first.dtype} {list(first.shape)} and lora_B {second.dtype} {list(second.shape)}"
        f" for {target.name} {list(target.shape)}"
    )


def _multiply(target: TensorEntry, adapted: AdaptedTensor) -> bool:
    """Whether the product of the factors has the shape of the tensor (convolutions unrolled)."""
    first, second = (factor.shape for factor in adapted.factors)
    if min(map(len, (first, second, target.shape))) < 2 or not adapted.rank:
        return False
    rows, *columns = target.shape
    if adapted.flipped:
        return (*first, *second) == (adapted.rank, rows, *columns, adapted.rank)
    is_flat = math.prod(second[2:]) == 1
    return is_flat and second[:2] == (rows, adapted.rank) and first[1:] == tuple(columns)
