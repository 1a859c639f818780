"""From tensors to problems: sources, method, output type and cost of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import RECIPE_NAMES, WRITABLE_FLOATS, is_float
from merging.errors import Fault, PlanError, RecipeError
from merging.method import MergeMethod
from merging.plan.adapters import AdaptedTensor
from merging.plan.cost import (
    Budgets,
    Load,
    ProblemCost,
    problem_cost,
    problem_load,
    takes_matrices,
    with_cost,
)
from merging.plan.inputs import Expert, Inputs
from merging.plan.plan import Parts, Problem, Source, SourceFile
from merging.plan.slices import stands_before_layers
from merging.plan.tensors import OutputTensor
from merging.plan.variants import (
    Layout,
    PlannedVariant,
    VariantSettings,
    planned_variants,
    shared_layout,
)
from merging.plan.vocabulary import Vocabulary
from merging.plan.wording import shorten_list
from merging.recipe import Recipe
from merging.roles import Role, TouchFilter, describe_tensor, touch_filter
from merging.selectors import layer_position

_READ_ONLY_FLOATS_BECOME = "BF16"
"""Output type of F8 tensors, which are read and not written."""

_WIDTH = {"F16": 1, "BF16": 1, "F32": 2, "F64": 3}


def promote(dtypes: Iterable[str]) -> str:
    """The narrowest writable type that holds values of all these float types exactly."""
    found = {d if d in WRITABLE_FLOATS else _READ_ONLY_FLOATS_BECOME for d in dtypes}
    widest = max(_WIDTH[d] for d in found)
    if widest == 1 and len(found) > 1:  # F16 has more digits, BF16 more range
        return "F32"
    return max(found, key=_WIDTH.__getitem__)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the output, with what its name tells."""

    name: str
    entry: TensorEntry
    role: Role
    tower: str
    section: int


@dataclass(frozen=True, slots=True)
class _Expert:
    """What an expert's tensor is made of."""

    parts: Parts
    stored: tuple[Source, ...]
    factors: tuple[Source, ...]


class ProblemBuilder:
    """Builds the problems of one merge.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        budgets: What a worker may use for tensors.

    Attributes:
        files: Those that are read, in the order in which they came up.
        dtype: Of the output's floats, if the recipe says.
        vocabulary: The output's, if rows are put in another order.
        aligned: Where tensors are read whose rows were put in another order, by address (of an
            adapter that changes them, with that) and name.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, budgets: Budgets) -> None:
        self.files: list[SourceFile] = []
        self.vocabulary: Vocabulary | None = None
        self.aligned: dict[tuple[str, str], Source] = {}
        entries = [[expert.entry for expert in one.experts] for one in inputs.merged]
        self._variants = planned_variants(recipe)
        self.settings = VariantSettings(self._variants, entries)
        self._inputs = inputs
        self._budgets = budgets
        self.dtype = RECIPE_NAMES.get(recipe.out_dtype or recipe.dtype or "")
        self._has_adapters = [
            any(e.adapter and e.index is one.donor for e in one.experts) for one in inputs.sections
        ]
        self._rest_is_mean = False
        self._file_numbers: dict[str, int] = {}
        self._costs: dict[tuple[int, Load], ProblemCost] = {}

    def build(self, found: Sequence[OutputTensor]) -> list[Problem]:
        """One problem for each tensor, in the model's order.

        Raises:
            RecipeError: ``bad_parameter``: values that do not go together for some tensor;
                ``incompatible_options``: a method for matrices is to merge something else.
            PlanError: ``nothing_to_do``.
        """
        tensors = self._describe(found)
        num_layers: dict[tuple[int, str], int] = {}
        for tensor in tensors:
            key = (tensor.section, tensor.tower)
            first = self._inputs.sections[tensor.section].first_layer
            num_layers[key] = max(num_layers.get(key, 0), tensor.role.layer + 1 - first)
        layout = shared_layout(
            self._variants,
            lambda v: Layout(self._touched(v, tensors), _rest_is_mean(v, self._inputs)),
            [tensor.name for tensor in tensors],
        )
        self._rest_is_mean = layout.rest_is_mean
        ordered = _model_order(list(zip(tensors, layout.touched, strict=True)))
        problems = [
            self._problem(tensor, num_layers[tensor.section, tensor.tower], is_touched=is_touched)
            for tensor, is_touched in ordered
        ]
        self.settings.raise_faults()
        return problems

    def _describe(self, found: Sequence[OutputTensor]) -> list[_Tensor]:
        tensors = []
        for name, entry, section in found:
            config = self._inputs.sections[section].donor.config
            role = describe_tensor(name, entry.shape, config)
            tower = f".{name}".partition(f".{role.layer}.")[0] if role.layer >= 0 else ""
            tensors.append(_Tensor(name, entry, role, tower, section))
        return tensors

    def _touched(self, variant: PlannedVariant, tensors: Sequence[_Tensor]) -> list[bool]:
        """Which tensors the method of a variant merges.

        A method with matrices of rows×columns takes tensors that are one, and above all no stack
        of many matrices, which would pass for one wide matrix.
        """
        method = variant.method
        touches = _touch(variant)
        touched = [is_float(t.entry.dtype) and touches(t.name, t.role) for t in tensors]
        if not any(touched):
            raise PlanError(
                f"{method.name} would merge none of the {len(tensors)} tensors of"
                f" {self._inputs.donor.uri}. Choose other tensors with the parameter 'touch'.",
                code="nothing_to_do",
            )
        if takes_matrices(method):
            chosen = [t for t, is_touched in zip(tensors, touched, strict=True) if is_touched]
            _refuse_others(method, [t.entry for t in chosen if not t.role.is_matrix])
        return touched

    def _problem(self, tensor: _Tensor, num_layers: int, *, is_touched: bool) -> Problem:
        name, entry, role = tensor.name, tensor.entry, tensor.role
        section = self._inputs.sections[tensor.section]
        experts = self._experts(tensor, is_touched=is_touched)
        sees_base = is_touched and _uses_base(section)
        base = None
        if not experts or sees_base or any(not one.parts.is_stored for one in experts):
            base = self._tensor_source(section.donor, entry, name)
        if not experts:
            setting = self.settings.copy()
        elif is_touched:
            position = layer_position(role.layer - section.first_layer, num_layers)
            names = [expert.index.tensors[name].name for expert in section.experts]
            setting = self.settings.merge(
                name, position if role.layer >= 0 else 0.0, tensor.section, names
            )
        else:
            setting = self.settings.mean(tensor.section)
        types = [base.dtype] if base else []
        if experts:  # adapters have no say: they are often kept wider than their model
            types += [e.index.tensors[name].dtype for e in section.experts]
        parts = tuple(one.parts for one in experts)
        problem = Problem(
            tensor_name=name,
            shape=entry.shape,
            dtype=(self.dtype or promote(types)) if is_float(entry.dtype) else entry.dtype,
            setting=setting,
            base=base,
            experts=tuple(source for one in experts for source in (*one.stored, *one.factors)),
            transposed=role.transposed,
            role=role.kind,
            layer=role.layer,
            sees_base=sees_base,
            parts=() if all(part == Parts() for part in parts) else parts,
        )
        return with_cost(problem, self._cost(setting, problem_load(problem)))

    def _experts(self, tensor: _Tensor, *, is_touched: bool) -> list[_Expert]:
        """What each expert's tensor is made of; nothing if the base's is taken over.

        It is where no adapter has changed it: a combination of the base with itself is the base
        (but for methods without a base, whose weights need not add up to 1).
        """
        section = self._inputs.sections[tensor.section]
        is_merged = is_touched or self._rest_is_mean or section.base is None
        if not (is_float(tensor.entry.dtype) and is_merged):
            return []
        experts = [self._expert(expert, tensor) for expert in section.experts]
        is_sum = is_touched and not _uses_base(section)
        is_unchanged = not any(one.stored or one.factors for one in experts)
        return [] if is_unchanged and not is_sum else experts

    def _expert(self, expert: Expert, tensor: _Tensor) -> _Expert:
        name = tensor.name
        donor = self._inputs.sections[tensor.section].donor
        own = self.aligned.get((expert.address, expert.index.tensors[name].name))
        if own is not None and expert.adapter is not None:
            return _Expert(Parts(), (own,), ())
        adapted = expert.adapted.get(name, AdaptedTensor())
        stored: tuple[Source, ...] = ()
        factors: tuple[Source, ...] = ()
        if expert.adapter is not None:
            factors = tuple(self.source(expert.adapter, entry, "") for entry in adapted.factors)
        if expert.adapter is not None and adapted.replacement is not None:
            stored = (self.source(expert.adapter, adapted.replacement, ""),)
        elif not (self._has_adapters[tensor.section] and expert.index is donor):
            stored = (self._tensor_source(expert.index, expert.index.tensors[name], name),)
        parts = Parts(bool(stored), adapted.rank, adapted.scaling, adapted.flipped)
        return _Expert(parts, stored, factors)

    def _tensor_source(
        self, index: CheckpointIndex, entry: TensorEntry, output_name: str
    ) -> Source:
        """Where a tensor that is merged is read."""
        aligned = self.aligned.get((index.uri, entry.name))
        return aligned or self.source(index, entry, output_name)

    def source(
        self, index: CheckpointIndex | AdapterIndex, entry: TensorEntry, output_name: str
    ) -> Source:
        """Where a tensor of an input is read, for one of that name."""
        file = index.files[entry.file]
        number = self._file_numbers.setdefault(file.uri, len(self.files))
        if number == len(self.files):
            self.files.append(SourceFile(file.uri, file.size, file.version))
        name = entry.name if output_name != entry.name else ""
        return Source(number, entry.start, entry.end, entry.dtype, name)

    def _cost(self, setting: int, load: Load) -> ProblemCost:
        key = (setting, load)
        if key not in self._costs:
            self._costs[key] = problem_cost(self.settings.methods(setting), load, self._budgets)
        return self._costs[key]


def _uses_base(section: Inputs) -> bool:
    """Whether the method sees a base in a section."""
    return section.method.uses_base(is_named=section.base is not None)


def _touch(variant: PlannedVariant) -> TouchFilter:
    given = variant.recipe.parameters.get("touch") or _preset(variant).get("touch")
    return touch_filter(given or variant.method.default_touch)


def _preset(variant: PlannedVariant) -> Mapping[str, Any]:
    """What the recipe's preset sets, if it has one."""
    return variant.method.parameters.preset_values(variant.recipe.parameters.get("preset"))


def _rest_is_mean(variant: PlannedVariant, inputs: Inputs) -> bool:
    """Whether tensors that the method does not merge become the experts' mean."""
    rest = variant.recipe.parameters.get("rest") or _preset(variant).get("rest")
    if rest == "base" and any(section.base is None for section in inputs.sections):
        detail = (
            "'rest: base' takes tensors from a base model, and the recipe names none; add"
            " 'base_model' or set rest to mean."
        )
        fault = Fault("/parameters/rest", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])
    return (rest or variant.method.default_rest) == "mean"


def _refuse_others(method: MergeMethod, others: Sequence[TensorEntry]) -> None:
    if not others:
        return
    shapes = [f"{entry.name} {list(entry.shape)}" for entry in others]
    detail = (
        f"{method.name} merges matrices, but 'touch' chooses tensors that have not two dimensions:"
        f" {shorten_list(shapes)}. Set touch to linear or matrices, or to expressions that leave"
        " them out; 'rest' says what they become."
    )
    fault = Fault("/parameters/touch", "incompatible_options", detail)
    raise RecipeError(detail, code="incompatible_options", faults=[fault])


_Pair = tuple[_Tensor, bool]


def _model_order(tensors: Sequence[_Pair]) -> list[_Pair]:
    """What comes before the layers, the layers tower by tower, the rest.

    Tensors of one layer stay as they lie in the donor's files.
    """
    towers = dict.fromkeys(tensor.tower for tensor, _ in tensors)
    tower_rank = {tower: number for number, tower in enumerate(towers)}

    def key(pair: _Pair) -> tuple[int, int, int]:
        tensor = pair[0]
        if tensor.role.layer < 0:
            return (0 if stands_before_layers(tensor.name, tensor.role) else 2, 0, 0)
        return (1, tower_rank[tensor.tower], tensor.role.layer)

    return sorted(tensors, key=key)
