"""What a merge method is, and the registry of them.

A method is one file in ``merging/methods`` that declares what it needs and gives one pure function
from tensors to a tensor. It never does I/O, never logs, never chooses a device, never changes its
inputs and never touches global random state. Method modules are imported by the planner, the API
and the command line, which run without torch: numerics are imported inside the function that
computes.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from merging.errors import RecipeError
from merging.ops.geometry import Cost as Cost
from merging.ops.geometry import Geometry as Geometry
from merging.parameters import NoParameters, Parameters

if TYPE_CHECKING:
    import torch

    from merging.ops.layer_method import LayerMethod

Separability = Literal["elementwise", "rows", "whole", "sum", "fold"]
"""How a method's tensor may be cut: anywhere with the same bits (``elementwise``); by output rows
once the in×in matrices over all rows are known (``rows``); not at all (``whole``). The results of
tiles of a ``sum``, which are whole numbers, are added up. Each tile of a ``fold`` goes on from
where the one before it ended (``task.memory``); the result is the last one's."""


@dataclass(slots=True)
class Task:
    """One call of a method's function: a tensor, or a tile of an elementwise method's tensor.

    Attributes:
        tensor_name: Fully qualified name; random methods mix it into their seed.
        shape: Of the whole tensor as it is stored; empty where it goes without saying.
        parameters: The method's parameters as resolved for this tensor.
        expert_parameters: One per expert, in recipe order.
        seed: The recipe's seed.
        offset: Flat index, in the whole tensor, of this tile's first entry; 0 for a whole tensor.
        row_block: Rows of the output solved at a time, fixed by the plan; 0 means all at once.
        transposed: The tensor is stored in×out (GPT-2's Conv1D); methods with a right side
            transpose it first.
        ranks: Of the experts if all of them are adapters and the step takes these; else empty.
        figures: The function puts what the report should say here (JSON-able numbers and strings).
        given: Results of the method's reductions (:class:`Staged`), flat, on the device.
        memory: What tiles of one tensor, which come in order, tell one another.
        out: For the result of a step that ``rounds``: flat, in the type of the file, if given.
    """

    tensor_name: str
    parameters: Any
    expert_parameters: Sequence[Any]
    seed: int = 0
    offset: int = 0
    row_block: int = 0
    transposed: bool = False
    ranks: tuple[int, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    given: Sequence[torch.Tensor] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    out: torch.Tensor | None = None


MergeFunction = Callable[["torch.Tensor | None", "Iterator[torch.Tensor]", Task], "torch.Tensor"]
"""``merge(base, experts, task)``.

``base`` and each expert have the same shape, are in their stored dtype, and are on the device to
work on; ``experts`` yields them one at a time, in recipe order, as their bytes arrive. A method
that can work on one expert at a time must not hold on to earlier ones: that is what bounds memory.
Returns a new float32 tensor (float64 if an input is float64) of the same shape, on the same device,
or a view of ``task.out``.
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A function over tensors, with what planning and execution must know of it.

    Attributes:
        merge: The function.
        cost: Flops and workspace of one problem.
        separable: How its tensors may be cut.
        streaming: Whether experts are consumed one at a time (see :data:`MergeFunction`).
        takes_adapters: An expert that is an adapter comes as an
            :class:`~merging.ops.low_rank.Adapter` of the stored tensor and not expanded.
        flat: Inputs are handed over flat, whatever their lengths.
        rounds: The function rounds its result block by block, and holds nothing else as large.
        by_row: Tiles are whole rows of the tensor (what follows its first dimension; a vector is
            one row).
    """

    merge: MergeFunction
    cost: Callable[[Geometry, Any], Cost]
    separable: Separability = "elementwise"
    streaming: bool = False
    takes_adapters: bool = False
    flat: bool = False
    rounds: bool = False
    by_row: bool = False


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A pass over a model that finds what merging any of its tensors depends on.

    Attributes:
        name: Of its intermediate files.
        map: What is found of one tensor: a flat result, from what the method gets.
        entries: Of that result, given the recipe-level parameters.
        part: Those of them that are combined; all by default.
        dtype: safetensors type of the result; None is float32, or float64 if an input is.
        combine: Of the parts of all tensors, in the model's order, as experts; None if tensors are
            never reduced together, and go by their own map's result.
        combined_entries: Of its result, given the number of experts.
        combined_dtype: Type of that.
        ignores: Recipe-level parameters that the map does not depend on: variants of a sweep that
            differ in no others share its result.
        needed: Whether it is, with these parameters; else the pass is left out.
    """

    name: str
    map: Step
    entries: Callable[[Geometry, Any], int]
    part: Callable[[Geometry], slice] = lambda _: slice(None)
    dtype: str | None = None
    combine: Step | None = None
    combined_entries: Callable[[int], int] = lambda _: 0
    combined_dtype: str = "F64"
    ignores: frozenset[str] = frozenset()
    needed: Callable[[Any], bool] = lambda _: True


@dataclass(frozen=True, kw_only=True)
class Staged:
    """How a method merges a tensor with the help of others, or one that is too large at once.

    Every reduction reads the inputs again; its map gets the combined results of those before it as
    ``task.given``, and ``finish`` those of all.

    Attributes:
        reductions: In this order.
        finish: Merges a tensor, from what the method gets.
        group: From recipe-level and expert parameters, tensors of which settings are reduced
            together; None for a tensor by itself, which is staged only if the method's own function
            needs more memory than there is. The result is the same.
        takes_double: So is one with float64 inputs.
        keeps_map: ``finish`` gets, in place of the experts, as many entries of the last map's
            result as the tensor has; the others come last in ``task.given``.
    """

    reductions: tuple[Reduction, ...]
    finish: Step
    group: Callable[[Any, Sequence[Any]], Any] = lambda _, __: None
    takes_double: bool = False
    keeps_map: bool = False

    def steps(self) -> dict[str, Step]:
        """Every step by the name that plans have for it."""
        steps = {FINISH: self.finish}
        for reduction in self.reductions:
            steps[reduction.name] = reduction.map
            if reduction.combine is not None:
                steps[reduction.name + COMBINED] = reduction.combine
        return steps


FINISH = "finish"
COMBINED = ".combined"


@dataclass(frozen=True, kw_only=True)
class Divided:
    """How a method divides one O×I layer over several workers.

    Attributes:
        sums: From what the method gets: A (I×I), B and ΣT (O×I) and ``num_sums`` numbers, flat.
        rows: From A, some rows of B and of ΣT, and these numbers: the merged update of the rows,
            and ``num_rows`` numbers.
        join: From the base and all results of ``rows`` in order: the merged tensor.
        num_sums: See ``sums``.
        num_rows: See ``rows``.
        applies: Whether a layer is summed up in this form, for its geometry and parameters.
    """

    sums: Step
    rows: Step
    join: Step
    num_sums: int
    num_rows: int
    applies: Callable[[Geometry, Any], bool]

    def steps(self) -> dict[str, Step]:
        """Every step by the name that plans have for it."""
        return {SUMS: self.sums, ROWS: self.rows, JOIN: self.join}


SUMS = "sums"
ROWS = "rows"
JOIN = "join"

MASKS = "masks"
OWN = "own"


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Step):
    """The declaration of a merge method. Schema, docs, ``/v1/methods`` and help come from it.

    What a :class:`Step` has is that of the function that merges a tensor by itself, in one go.

    Attributes:
        name: As in recipes; equals the module's name.
        title: Name in the literature.
        summary: One or two sentences for someone choosing a method.
        source: Paper, venue, year, arXiv number, equation.
        parameters: Model of the recipe-level parameters.
        expert_parameters: Model of the parameters that may differ from expert to expert.
        needs_base: Whether a base model is required.
        optional_base: A base model is used if the recipe names one, and not required.
        min_experts: Fewest experts accepted.
        max_experts: Most experts accepted; None for no limit.
        default_touch: Which tensors it merges unless the recipe says otherwise: ``all`` float
            tensors, or ``linear`` (2-D weights of linear layers; no embeddings, head, norms).
        default_rest: What other float tensors become: ``base`` values or the experts' ``mean``.
        symmetric: Permuting experts (with their parameters) changes nothing.
        recommended: Marked as the one to start with.
        layer: How it solves layers, if that is what it does: variants of one merge then share what
            they can.
        staged: How it merges in several passes, if it ever does.
        divided: How it divides a large layer over workers, if it can.
        calibrated: What it does with statistics of samples (:mod:`merging.sampled`), if anything.
        sequential: These are of what comes out of the merged blocks before each block, and not out
            of the expert's own: one block is merged after another.
        task_masks: What is published beside the merged model so that each task's own can be made
            of it (:mod:`merging.task_masks`), if anything: the step ``MASKS`` finds all tasks'
            masks of a tensor, ``OWN`` makes a task's tensor.
        adapter_note: What someone who merges adapters with it should know; "" if nothing.
    """

    name: str
    title: str
    summary: str
    source: str
    parameters: type[Parameters] = NoParameters
    expert_parameters: type[Parameters] = NoParameters
    needs_base: bool = True
    optional_base: bool = False
    min_experts: int = 1
    max_experts: int | None = None
    default_touch: str = "all"
    default_rest: Literal["base", "mean"] = "base"
    symmetric: bool = True
    recommended: bool = False
    layer: LayerMethod | None = None
    staged: Staged | None = None
    divided: Divided | None = None
    calibrated: Mapping[str, Step] = field(default_factory=dict)
    sequential: bool = False
    task_masks: Mapping[str, Step] = field(default_factory=dict)
    adapter_note: str = ""

    def step(self, name: str) -> Step:
        """A step by the name that plans have for it; the method itself has none."""
        if not name:
            return self
        passes = self.staged or self.divided
        return (passes.steps() if passes else {**self.calibrated, **self.task_masks})[name]

    @property
    def keeps_statistics(self) -> bool:
        """Whether what it measures of samples serves other merges too."""
        return bool(self.calibrated) and not self.sequential

    def uses_base(self, *, is_named: bool) -> bool:
        """Whether a recipe's base model, if it names one, is a base and not one more expert."""
        return self.needs_base or (self.optional_base and is_named)

    def describe(self) -> dict[str, Any]:
        """The method as a JSON object, with JSON Schema of its parameters."""
        return {
            "object": "method",
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "source": self.source,
            "needs_base": self.needs_base,
            "optional_base": self.optional_base,
            "min_experts": self.min_experts,
            "max_experts": self.max_experts,
            "separable": self.separable,
            "default_touch": self.default_touch,
            "default_rest": self.default_rest,
            "recommended": self.recommended,
            "parameters": self.parameters.model_json_schema(),
            "expert_parameters": self.expert_parameters.model_json_schema(),
        }


_REGISTRY: dict[str, MergeMethod] = {}


def register(method: MergeMethod) -> MergeMethod:
    """Add a method to the registry; called at the end of each method module."""
    if method.name in _REGISTRY:
        raise ValueError(f"merge method {method.name!r} is registered twice")
    _REGISTRY[method.name] = method
    return method


@functools.cache
def _import_methods() -> None:
    package = importlib.import_module("merging.methods")
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")


def all_methods() -> dict[str, MergeMethod]:
    """Every method by name, in sorted order; the first call imports ``merging.methods``."""
    _import_methods()
    return dict(sorted(_REGISTRY.items()))


def get_method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        RecipeError: ``unknown_method``, naming the nearest known ones.
    """
    from difflib import get_close_matches

    methods = all_methods()
    if name in methods:
        return methods[name]
    near = get_close_matches(name, methods, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RecipeError(
        f"Unknown merge method {name!r}.{hint} Known methods: {', '.join(methods)}.",
        code="unknown_method",
    )
