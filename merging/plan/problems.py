"""From tensors to problems: sources, method, output type and cost of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import ITEM_SIZE, RECIPE_NAMES, WRITABLE_FLOATS, is_float
from merging.errors import Fault, PlanError, RecipeError
from merging.method import get_method
from merging.plan.cost import Estimate, Load, estimate
from merging.plan.inputs import Inputs
from merging.plan.plan import COPY, Problem, Source, SourceFile
from merging.plan.settings import SettingTable
from merging.plan.tensors import SHOWN
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
        memory_budget: Host bytes a worker may use for tensors.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, memory_budget: int) -> None:
        self.files: list[SourceFile] = []
        entries = [expert.entry for expert in inputs.experts]
        self.settings = SettingTable(recipe, inputs.method, entries)
        self._inputs = inputs
        self._memory_budget = memory_budget
        self._dtype = RECIPE_NAMES.get(recipe.out_dtype or recipe.dtype or "")
        self._touches = _touch(recipe, inputs)
        self._rest_is_mean = _rest_is_mean(recipe, inputs)
        self._file_numbers: dict[str, int] = {}
        self._estimates: dict[tuple[int, Load], Estimate] = {}

    def build(self, entries: Sequence[TensorEntry]) -> list[Problem]:
        """One problem for each tensor, in the model's order.

        Raises:
            RecipeError: ``bad_parameter``: values that do not go together for some tensor.
            PlanError: ``nothing_to_do`` or ``does_not_fit``.
        """
        config = self._inputs.donor.config
        tensors = []
        for entry in entries:
            role = describe_tensor(entry.name, entry.shape, config)
            tower = f".{entry.name}".partition(f".{role.layer}.")[0] if role.layer >= 0 else ""
            tensors.append(_Tensor(entry, role, tower))
        num_layers: dict[str, int] = {}
        for tensor in tensors:
            last = num_layers.get(tensor.tower, 0)
            num_layers[tensor.tower] = max(last, tensor.role.layer + 1)
        touched = [is_float(t.entry.dtype) and self._touches(t.entry.name, t.role) for t in tensors]
        if not any(touched):
            raise PlanError(
                f"{self._inputs.method.name} would merge none of the {len(tensors)} tensors of"
                f" {self._inputs.donor.uri}. Choose other tensors with the parameter 'touch'.",
                code="nothing_to_do",
            )
        ordered = _model_order(list(zip(tensors, touched, strict=True)), num_layers)
        problems = [
            self._problem(tensor, num_layers[tensor.tower], is_touched=is_touched)
            for tensor, is_touched in ordered
        ]
        self.settings.raise_faults()
        self._check_fit(problems)
        return problems

    def _problem(self, tensor: _Tensor, num_layers: int, *, is_touched: bool) -> Problem:
        entry, role = tensor.entry, tensor.role
        donor = self._inputs.donor
        base: tuple[CheckpointIndex, ...] = ()
        experts = [expert.index for expert in self._inputs.experts]
        if is_touched:
            setting = self.settings.merge(entry.name, layer_position(role.layer, num_layers))
            base = (donor,) if self._inputs.method.needs_base else ()
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
        )
        cost = self._cost(setting, load)
        return Problem(
            tensor_name=entry.name,
            shape=entry.shape,
            dtype=dtype,
            setting=setting,
            base=self._source(base[0], entry.name) if base else None,
            experts=tuple(self._source(index, entry.name) for index in experts),
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

    def _cost(self, setting: int, load: Load) -> Estimate:
        key = (setting, load)
        if key not in self._estimates:
            name = self.settings.settings[setting].method
            method = None if name == COPY else get_method(name)
            parameters = self.settings.parameters(setting)
            self._estimates[key] = estimate(method, parameters, load, self._memory_budget)
        return self._estimates[key]

    def _check_fit(self, problems: Sequence[Problem]) -> None:
        budget = self._memory_budget
        large = sorted(
            (problem for problem in problems if problem.host_bytes > budget),
            key=lambda problem: -problem.host_bytes,
        )
        if not large:
            return
        faults = [
            Fault(
                "",
                "does_not_fit",
                f"Tensor {p.tensor_name!r} {list(p.shape)} needs {p.host_bytes} bytes of host"
                f" memory ({self.settings.settings[p.setting].method}); the memory budget is"
                f" {budget} bytes.",
            )
            for p in large
        ]
        others = f" {len(large) - 1} more tensors do not fit." if len(large) > 1 else ""
        raise PlanError(
            f"{faults[0].detail}{others} Set memory_budget to {large[0].host_bytes} or more, on"
            " workers that have it; or leave such tensors out with the parameter 'touch'; or take"
            " a method that works in tiles, such as task_arithmetic.",
            code="does_not_fit",
            faults=faults[:SHOWN],
            context={
                "tensor_name": large[0].tensor_name,
                "needed_bytes": large[0].host_bytes,
                "memory_budget": budget,
            },
        )


def _stored_bytes(index: CheckpointIndex, name: str) -> int:
    entry = index.tensors[name]
    return entry.end - entry.start


def _touch(recipe: Recipe, inputs: Inputs) -> TouchFilter:
    return touch_filter(recipe.parameters.get("touch") or inputs.method.default_touch)


def _rest_is_mean(recipe: Recipe, inputs: Inputs) -> bool:
    """Whether tensors that the method does not merge become the experts' mean."""
    rest = recipe.parameters.get("rest")
    if rest == "base" and inputs.base is None:
        detail = (
            "'rest: base' takes tensors from a base model, and the recipe names none; add"
            " 'base_model' or set rest to mean."
        )
        fault = Fault("/parameters/rest", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])
    return (rest or inputs.method.default_rest) == "mean" or inputs.base is None


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
