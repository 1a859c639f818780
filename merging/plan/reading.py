"""The checkpoints of a merge: resolved, read, and checked against each other from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from merging.checkpoint.adapter import AdapterIndex, read_model_index
from merging.checkpoint.index import CheckpointIndex
from merging.errors import CheckpointError, Fault, MergeError, RecipeError
from merging.method import get_method
from merging.plan.adapters import AdaptedTensor, fit_adapter
from merging.plan.inputs import Expert, Inputs
from merging.plan.modules import split_modules
from merging.plan.slices import SectionAddresses, SliceCutter
from merging.recipe import Recipe
from merging.recipe.addresses import split_adapter
from merging.recipe.parse import count_problem
from merging.storage.base import Storage

_INDEX_THREADS = 8


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
    chosen = []
    for section in models.sections:
        uses_base = method.uses_base(is_named=section.base is not None)
        chosen.append(
            [
                number
                for number, (model, adapter) in enumerate(section.entries)
                if not (uses_base and adapter is None and model == section.base)
            ]
        )
        problem = count_problem(method, len(chosen[-1]))
        if problem is not None:
            raise _refusal(section.pointer, problem)
    _check_output(output_uri, models.pointers)
    models.read(storage)
    base = models.checkpoint(models.base) if models.base is not None else None
    experts = models.experts(chosen)
    if not (recipe.slices or recipe.modules):
        return Inputs(method=method, base=base, experts=experts[0])
    donor = base or experts[0][0].index
    names = [module.name for module in recipe.modules]
    split = split_modules(donor, names) if names else None
    slices = SliceCutter(recipe, method, models.sections, models.checkpoint, split).cut(experts)
    rest = split.part(donor, "") if split is not None else None
    if rest is not None and rest.tensors:
        slices += (Inputs(method=method, base=rest, experts=()),)
    own = dict.fromkeys(s.base for s in models.sections if s.base != models.base)
    return Inputs(
        method=method,
        base=base,
        experts=_each_once(experts),
        slices=slices,
        slice_bases=tuple(models.checkpoint(uri) for uri in own if uri is not None),
    )


def _refusal(pointer: str, detail: str) -> RecipeError:
    fault = Fault(pointer, "incompatible_options", detail)
    return RecipeError(detail, code="incompatible_options", faults=[fault])


def _each_once(sections: Sequence[Sequence[Expert]]) -> tuple[Expert, ...]:
    """The experts of all slices, each once."""
    found: dict[tuple[str, str], Expert] = {}
    for expert in (expert for section in sections for expert in section):
        adapter = expert.adapter.uri if expert.adapter else ""
        found.setdefault((expert.index.uri, adapter), expert)
    return tuple(found.values())


class _Models:
    """The folders that a recipe names.

    Attributes:
        base: Normalised address of the base model.
        sections: Those of each section of the recipe.
        pointers: Every address once, with the first place in the recipe that names it.
    """

    def __init__(self, recipe: Recipe, storage: Storage) -> None:
        self.pointers: dict[str, str] = {}
        self._architectures = recipe.architectures
        self._normalised: dict[str, str] = {}
        self._failures: list[tuple[str, MergeError]] = []
        self._indexes: dict[str, CheckpointIndex | AdapterIndex] = {}
        self.base: str | None = None
        self.sections: list[SectionAddresses] = []
        for section in recipe.sections:
            entries = []
            for number, entry in enumerate(section.entries):
                pointer = f"{section.pointer}/{number}/model"
                model, adapter = split_adapter(entry.model)
                uri = self._normalise(model, pointer, storage)
                entries.append((uri, adapter and self._normalise(adapter, pointer, storage)))
            base = section.base_model
            if base is not None:
                is_own = base != recipe.base_model
                pointer = f"{section.owner}/base_model" if is_own else "/base_model"
                base = self._normalise(base, pointer, storage)
            self.sections.append(SectionAddresses(section.pointer, base, entries))
        if recipe.base_model is not None:
            self.base = self._normalise(recipe.base_model, "/base_model", storage)
        raise_together(self._failures)

    def _normalise(self, address: str, pointer: str, storage: Storage) -> str:
        """The address in its one form; ``""``, and a failure noted once, if it is not allowed."""
        if address in self._normalised:
            return self._normalised[address]
        uri = ""
        try:
            uri = storage.normalise(address)
            self.pointers.setdefault(uri, pointer)
        except MergeError as error:
            self._failures.append((pointer, error))
        self._normalised[address] = uri
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
        for address, name in self._architectures.items():
            uri = self._normalised[address]
            index = self.checkpoint(uri)
            config = {**index.config, "architectures": [name]}
            self._indexes[uri] = dataclasses.replace(index, config=config)

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
        raise _refusal(self.pointers[uri], detail)

    def experts(self, chosen: Sequence[Sequence[int]]) -> list[tuple[Expert, ...]]:
        """The experts of each section, at these places.

        Raises:
            RecipeError: ``incompatible_options``: an adapter without a model, or the other way
                around.
            CheckpointError: With all that does not fit between adapters and their models.
        """
        faults: list[Fault] = []
        fitted: dict[tuple[str, str], Mapping[str, AdaptedTensor]] = {}
        sections = []
        for section, numbers in zip(self.sections, chosen, strict=True):
            experts = []
            for number in numbers:
                pointer = f"{section.pointer}/{number}/model"
                model, adapter = self._parts(section, number)
                if adapter is None:
                    experts.append(Expert(model, number, pointer))
                    continue
                key = (model.uri, adapter.uri)
                if key not in fitted:
                    fitted[key], wrong = fit_adapter(adapter, model, pointer)
                    faults += wrong
                experts.append(Expert(model, number, pointer, adapter, fitted[key]))
            sections.append(tuple(experts))
        if faults:
            more = f" ({len(faults) - 1} more.)" if len(faults) > 1 else ""
            raise CheckpointError(
                faults[0].detail + more,
                code=faults[0].code,
                faults=faults,
            )
        return sections

    def _parts(
        self, section: SectionAddresses, number: int
    ) -> tuple[CheckpointIndex, AdapterIndex | None]:
        """The checkpoint of an entry, and the adapter on it."""
        model_uri, adapter_uri = section.entries[number]
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
        elif section.base is not None:
            return self.checkpoint(section.base), index
        else:
            detail = (
                f"{model_uri} is an adapter, and the recipe names no base_model to put it on. Name"
                " the model with it: 'model+adapter'."
            )
        raise _refusal(f"{section.pointer}/{number}/model", detail)


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
