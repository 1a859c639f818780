"""From tensors to problems: sources, method, output type and cost of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import ITEM_SIZE, RECIPE_NAMES, WRITABLE_FLOATS, is_float
from merging.errors import Fault, PlanError, RecipeError
from merging.method import MergeMethod, get_method
from merging.plan.cost import Budgets, Load, ProblemCost, problem_cost, takes_matrices
from merging.plan.inputs import Inputs
from merging.plan.plan import COPY, Problem, Source, SourceFile
from merging.plan.settings import SettingTable
from merging.plan.tensors import shorten_list
from merging.recipe import Recipe
from merging.roles import Role, TouchFilter, describe_tensor, touch_filter
from merging.selectors import layer_position

_READ_ONLY_FLOATS_BECOME = "BF16"
"""Output type of F8 tensors, which are read and not written."""

_BEFORE_LAYERS = frozenset({"embedding", "position", "conv"})
"""Roles that stand before a model's first layer, where they are outside of any."""

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

    entry: TensorEntry
    role: Role
    tower: str


class ProblemBuilder:
    """Builds the problems of one merge.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        budgets: What a worker may use for tensors.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, budgets: Budgets) -> None:
        self.files: list[SourceFile] = []
        entries = [expert.entry for expert in inputs.experts]
        self.settings = SettingTable(recipe, inputs.method, entries)
        self._inputs = inputs
        self._budgets = budgets
        self._dtype = RECIPE_NAMES.get(recipe.out_dtype or recipe.dtype or "")
        self._touches = _touch(recipe, inputs)
        self._rest_is_mean = _rest_is_mean(recipe, inputs)
        self._file_numbers: dict[str, int] = {}
        self._costs: dict[tuple[int, Load], ProblemCost] = {}

    def build(self, entries: Sequence[TensorEntry]) -> list[Problem]:
        """One problem for each tensor, in the model's order.

        Raises:
            RecipeError: ``bad_parameter``: values that do not go together for some tensor;
                ``incompatible_options``: a method for matrices is to merge something else.
            PlanError: ``nothing_to_do``.
        """
        tensors = self._describe(entries)
        num_layers: dict[str, int] = {}
        for tensor in tensors:
            last = num_layers.get(tensor.tower, 0)
            num_layers[tensor.tower] = max(last, tensor.role.layer + 1)
        touched = self._choose(tensors)
        ordered = _model_order(list(zip(tensors, touched, strict=True)), num_layers)
        problems = [
            self._problem(tensor, num_layers[tensor.tower], is_touched=is_touched)
            for tensor, is_touched in ordered
        ]
        self.settings.raise_faults()
        return problems

    def _describe(self, entries: Sequence[TensorEntry]) -> list[_Tensor]:
        config = self._inputs.donor.config
        tensors = []
        for entry in entries:
            role = describe_tensor(entry.name, entry.shape, config)
            tower = f".{entry.name}".partition(f".{role.layer}.")[0] if role.layer >= 0 else ""
            tensors.append(_Tensor(entry, role, tower))
        return tensors

    def _choose(self, tensors: Sequence[_Tensor]) -> list[bool]:
        """Which tensors the method merges.

        A method with matrices of rows×columns takes tensors that are one, and above all no stack
        of many matrices, which would pass for one wide matrix.
        """
        method = self._inputs.method
        touched = [is_float(t.entry.dtype) and self._touches(t.entry.name, t.role) for t in tensors]
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
        entry, role = tensor.entry, tensor.role
        donor = self._inputs.donor
        base: tuple[CheckpointIndex, ...] = ()
        experts = [expert.index for expert in self._inputs.experts]
        if is_touched:
            setting = self.settings.merge(entry.name, layer_position(role.layer, num_layers))
            is_named = self._inputs.base is not None
            base = (donor,) if self._inputs.method.uses_base(is_named=is_named) else ()
        elif is_float(entry.dtype) and self._rest_is_mean:
            setting = self.settings.mean()
        else:
            setting = self.settings.copy()
            base, experts = (donor,), []
        stored = [index.tensors[entry.name].dtype for index in (*base, *experts)]
        dtype = (self._dtype or promote(stored)) if is_float(entry.dtype) else entry.dtype
        load = Load(
            shape=entry.shape,
            transposed=role.transposed,
            base_bytes=sum(_stored_bytes(index, entry.name) for index in base),
            expert_bytes=tuple(_stored_bytes(index, entry.name) for index in experts),
            item_size=ITEM_SIZE[dtype],
            is_double="F64" in stored,
        )
        cost = self._cost(setting, load)
        return Problem(
            tensor_name=entry.name,
            shape=entry.shape,
            dtype=dtype,
            setting=setting,
            base=self._source(base[0], entry.name) if base else None,
            experts=tuple(self._source(index, entry.name) for index in experts),
            row_block=cost.row_block,
            transposed=role.transposed,
            flops=cost.flops,
            host_bytes=cost.host_bytes,
            device_bytes=cost.device_bytes,
            role=role.kind,
            layer=role.layer,
        )

    def _source(self, index: CheckpointIndex, name: str) -> Source:
        entry = index.tensors[name]
        file = index.files[entry.file]
        number = self._file_numbers.setdefault(file.uri, len(self.files))
        if number == len(self.files):
            self.files.append(SourceFile(file.uri, file.size, file.version))
        return Source(number, entry.start, entry.end, entry.dtype)

    def _cost(self, setting: int, load: Load) -> ProblemCost:
        key = (setting, load)
        if key not in self._costs:
            name = self.settings.settings[setting].method
            method = None if name == COPY else get_method(name)
            parameters = self.settings.parameters(setting)
            self._costs[key] = problem_cost(method, parameters, load, self._budgets)
        return self._costs[key]


def _stored_bytes(index: CheckpointIndex, name: str) -> int:
    entry = index.tensors[name]
    return entry.end - entry.start


def _touch(recipe: Recipe, inputs: Inputs) -> TouchFilter:
    given = recipe.parameters.get("touch") or _preset(recipe, inputs).get("touch")
    return touch_filter(given or inputs.method.default_touch)


def _preset(recipe: Recipe, inputs: Inputs) -> Mapping[str, Any]:
    """What the recipe's preset sets, if it has one."""
    return inputs.method.parameters.preset_values(recipe.parameters.get("preset"))


def _rest_is_mean(recipe: Recipe, inputs: Inputs) -> bool:
    """Whether tensors that the method does not merge become the experts' mean."""
    rest = recipe.parameters.get("rest") or _preset(recipe, inputs).get("rest")
    if rest == "base" and inputs.base is None:
        detail = (
            "'rest: base' takes tensors from a base model, and the recipe names none; add"
            " 'base_model' or set rest to mean."
        )
        fault = Fault("/parameters/rest", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])
    return (rest or inputs.method.default_rest) == "mean" or inputs.base is None


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


def _model_order(tensors: Sequence[_Pair], towers: Iterable[str]) -> list[_Pair]:
    """What comes before the layers, the layers tower by tower, the rest.

    Tensors of one layer stay as they lie in the donor's files.
    """
    tower_rank = {tower: number for number, tower in enumerate(towers)}

    def key(pair: _Pair) -> tuple[int, int, int]:
        tensor = pair[0]
        if tensor.role.layer < 0:
            return (0 if tensor.role.kind in _BEFORE_LAYERS else 2, 0, 0)
        return (1, tower_rank[tensor.tower], tensor.role.layer)

    return sorted(tensors, key=key)
