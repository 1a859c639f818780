"""The checkpoints of a merge: resolved, read, and checked against each other from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from merging.checkpoint.adapter import AdapterIndex, read_model_index
from merging.checkpoint.index import CheckpointIndex
from merging.errors import CheckpointError, Fault, MergeError, RecipeError
from merging.method import MergeMethod, get_method
from merging.plan.adapters import AdaptedTensor, fit_adapter
from merging.recipe import Recipe
from merging.recipe.addresses import split_adapter
from merging.recipe.parse import count_problem
from merging.storage.base import Storage

_INDEX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert.

    Attributes:
        index: Its checkpoint; of an adapter, the model that it is put on.
        entry: Its place under ``models`` in the recipe.
        adapter: What is put on the checkpoint, if anything is.
        adapted: What that makes of the checkpoint's tensors, by name.
    """

    index: CheckpointIndex
    entry: int
    adapter: AdapterIndex | None = None
    adapted: Mapping[str, AdaptedTensor] = field(default_factory=dict)

    @property
    def pointer(self) -> str:
        """JSON pointer to its address."""
        return _pointer(self.entry)


@dataclass(frozen=True, slots=True)
class Inputs:
    """All input checkpoints.

    Attributes:
        method: The recipe's method.
        base: The base model; for a method that needs none, the model that ``base_model`` names.
        experts: What is merged, in recipe order.
    """

    method: MergeMethod
    base: CheckpointIndex | None
    experts: tuple[Expert, ...]

    @property
    def donor(self) -> CheckpointIndex:
        """The model whose tensors, config and tokenizer set the pattern: the base if there is one,
        otherwise the first expert.
        """
        return self.base or self.experts[0].index

    @property
    def all_indexes(self) -> tuple[CheckpointIndex, ...]:
        """Every checkpoint once, donor first."""
        indexes = [self.donor, *(expert.index for expert in self.experts)]
        return tuple({index.uri: index for index in indexes}.values())


def read_inputs(recipe: Recipe, storage: Storage, output_uri: str) -> Inputs:
    """Resolve addresses and read the indexes of all models, several at a time.

    Args:
        recipe: A checked recipe.
        storage: Where the models are.
        output_uri: Normalised address of the output, which may not touch an input.

    Raises:
        RecipeError: ``incompatible_options``: the output is inside an input, the number of experts
            does not suit the method, or an adapter has no model to be put on.
        CheckpointError: A checkpoint is damaged, or an adapter does not fit its model.
        StorageError: An address is not allowed, or cannot be read.
    """
    method = get_method(recipe.merge_method)
    models = _Models(recipe, storage)
    uses_base = method.uses_base(is_named=models.base is not None)
    chosen = [
        number
        for number, (model, adapter) in enumerate(models.entries)
        if not (uses_base and adapter is None and model == models.base)
    ]
    problem = count_problem(method, len(chosen))
    if problem is not None:
        fault = Fault("/models", "incompatible_options", problem)
        raise RecipeError(problem, code="incompatible_options", faults=[fault])
    _check_output(output_uri, models.pointers)
    models.read(storage)
    base = models.checkpoint(models.base) if models.base is not None else None
    return Inputs(method=method, base=base, experts=models.experts(chosen))


def _pointer(entry: int) -> str:
    return f"/models/{entry}/model"


class _Models:
    """The folders that a recipe names.

    Attributes:
        base: Normalised address of the base model.
        entries: Those under ``models``: of the model, and of an adapter on it.
        pointers: Every address once, with the first place in the recipe that names it.
    """

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        self.pointers: dict[str, str] = {}
        self._failures: list[tuple[str, MergeError]] = []
        self._indexes: dict[str, CheckpointIndex | AdapterIndex] = {}
        self.entries: list[tuple[str, str | None]] = []
        for number, entry in enumerate(recipe.models):
            model, adapter = split_adapter(entry.model)
            uri = self._normalise(model, _pointer(number), storage)
            on_it = adapter and self._normalise(adapter, _pointer(number), storage)
            self.entries.append((uri, on_it))
        self.base: str | None = None
        if recipe.base_model is not None:
            self.base = self._normalise(recipe.base_model, "/base_model", storage)
        raise_together(self._failures)

    def _normalise(self, address: str, pointer: str, storage: Storage) -> str:
        try:
            uri = storage.normalise(address)
        except MergeError as error:
            self._failures.append((pointer, error))
            return ""
        self.pointers.setdefault(uri, pointer)
        return uri

    def read(self, storage: Storage) -> None:
        """Read the index of each, several at a time."""

        def read(uri: str) -> CheckpointIndex | AdapterIndex | MergeError:
            try:
                return read_model_index(storage, uri)
            except MergeError as error:
                return error

        with ThreadPoolExecutor(min(_INDEX_THREADS, len(self.pointers))) as pool:
            results = dict(zip(self.pointers, pool.map(read, self.pointers), strict=True))
        raise_together(
            [(self.pointers[uri], e) for uri, e in results.items() if isinstance(e, MergeError)]
        )
        self._indexes = {
            u: found for u, found in results.items() if not isinstance(found, MergeError)
        }

    def checkpoint(self, uri: str) -> CheckpointIndex:
        """The checkpoint at an address.

        Raises:
            RecipeError: ``incompatible_options``: it is an adapter.
        """
        index = self._indexes[uri]
        if isinstance(index, CheckpointIndex):
            return index
        detail = (
            f"{uri} is an adapter where a whole model is expected. Name the model that it was"
            " trained on as base_model, and the adapter under 'models'."
        )
        fault = Fault(self.pointers[uri], "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])

    def experts(self, chosen: Sequence[int]) -> tuple[Expert, ...]:
        """The experts at these places.

        Raises:
            RecipeError: ``incompatible_options``: an adapter without a model, or the other way
                around.
            CheckpointError: With all that does not fit between adapters and their models.
        """
        experts = []
        faults: list[Fault] = []
        for number in chosen:
            model, adapter = self._parts(number)
            if adapter is None:
                experts.append(Expert(model, number))
                continue
            adapted, wrong = fit_adapter(adapter, model, _pointer(number))
            faults += wrong
            experts.append(Expert(model, number, adapter, adapted))
        if faults:
            more = f" ({len(faults) - 1} more.)" if len(faults) > 1 else ""
            raise CheckpointError(
                faults[0].detail + more,
                code=faults[0].code,
                faults=faults,
            )
        return tuple(experts)

    def _parts(self, number: int) -> tuple[CheckpointIndex, AdapterIndex | None]:
        """The checkpoint of an entry, and the adapter on it."""
        model_uri, adapter_uri = self.entries[number]
        index = self._indexes[model_uri]
        if adapter_uri is not None:
            adapter = self._indexes[adapter_uri]
            if isinstance(adapter, AdapterIndex):
                return self.checkpoint(model_uri), adapter
            detail = (
                f"{adapter_uri}, behind the '+', is a whole model where an adapter is expected."
            )
        elif isinstance(index, CheckpointIndex):
            return index, None
        elif self.base is not None:
            return self.checkpoint(self.base), index
        else:
            detail = (
                f"{model_uri} is an adapter, and the recipe names no base_model to put it on. Name"
                " the model with it: 'model+adapter'."
            )
        fault = Fault(_pointer(number), "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])


def _check_output(output_uri: str, pointers: Mapping[str, str]) -> None:
    for uri, pointer in pointers.items():
        inner, outer = sorted((uri, output_uri), key=len, reverse=True)
        if inner == outer or inner.startswith(f"{outer}/"):
            relation = (
                "is" if inner == outer else "is inside" if inner == output_uri else "contains"
            )
            detail = (
                f"The output {output_uri} {relation} the input model {uri}; inputs are never"
                " written to. Choose another output."
            )
            raise RecipeError(
                detail,
                code="incompatible_options",
                faults=[Fault(pointer, "incompatible_options", detail)],
                context={"uri": output_uri},
            )


def raise_together(failures: Sequence[tuple[str, MergeError]]) -> None:
    """Raise one error for all failures, of the first one's kind; nothing if there are none.

    Args:
        failures: Pointers into the recipe, and what went wrong there.
    """
    if not failures:
        return
    first = failures[0][1]
    more = f" ({len(failures) - 1} more models have faults.)" if len(failures) > 1 else ""
    raise type(first)(
        first.detail + more,
        code=first.code,
        faults=[Fault(pointer, error.code, error.detail) for pointer, error in failures],
        retryable=all(error.retryable for _, error in failures),
        context=first.context,
    ) from first
