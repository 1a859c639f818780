"""The checkpoints of a merge: resolved, read, and checked against each other from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from merging.checkpoint.index import CheckpointIndex, read_checkpoint_index
from merging.errors import Fault, MergeError, RecipeError
from merging.method import MergeMethod, get_method
from merging.recipe import Recipe
from merging.recipe.parse import count_problem
from merging.storage.base import Storage

_INDEX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert: its checkpoint, and its place under ``models`` in the recipe."""

    index: CheckpointIndex
    entry: int

    @property
    def pointer(self) -> str:
        """JSON pointer to its address."""
        return f"/models/{self.entry}/model"


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
        RecipeError: ``incompatible_options``: the output is inside an input, or the number of
            experts does not suit the method.
        CheckpointError: A checkpoint is damaged.
        StorageError: An address is not allowed, or cannot be read.
    """
    method = get_method(recipe.merge_method)
    named = [(f"/models/{i}/model", entry.model) for i, entry in enumerate(recipe.models)]
    if recipe.base_model is not None:
        named.append(("/base_model", recipe.base_model))
    uris = _normalise(named, storage)
    base = uris.get("/base_model")
    model_uris = [uris[pointer] for pointer, _ in named[: len(recipe.models)]]
    chosen = [
        (number, uri)
        for number, uri in enumerate(model_uris)
        if not (method.uses_base(is_named=base is not None) and uri == base)
    ]
    problem = count_problem(method, len(chosen))
    if problem is not None:
        fault = Fault("/models", "incompatible_options", problem)
        raise RecipeError(problem, code="incompatible_options", faults=[fault])
    _check_output(output_uri, uris)
    indexes = _read_indexes(uris, storage)
    return Inputs(
        method=method,
        base=indexes[base] if base is not None else None,
        experts=tuple(Expert(indexes[uri], number) for number, uri in chosen),
    )


def _normalise(named: Sequence[tuple[str, str]], storage: Storage) -> dict[str, str]:
    """Normalised addresses by pointer."""
    uris: dict[str, str] = {}
    failures: list[tuple[str, MergeError]] = []
    for pointer, model in named:
        try:
            uris[pointer] = storage.normalise(model)
        except MergeError as error:
            failures.append((pointer, error))
    raise_together(failures)
    return uris


def _check_output(output_uri: str, uris: dict[str, str]) -> None:
    for pointer, uri in uris.items():
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


def _read_indexes(uris: dict[str, str], storage: Storage) -> dict[str, CheckpointIndex]:
    """Indexes by address, each checkpoint read once."""
    pointers = {uri: pointer for pointer, uri in reversed(uris.items())}
    unique = list(dict.fromkeys(uris.values()))

    def read(uri: str) -> CheckpointIndex | MergeError:
        try:
            return read_checkpoint_index(storage, uri)
        except MergeError as error:
            return error

    with ThreadPoolExecutor(min(_INDEX_THREADS, len(unique))) as pool:
        results = dict(zip(unique, pool.map(read, unique), strict=True))
    raise_together(
        [(pointers[uri], found) for uri, found in results.items() if isinstance(found, MergeError)]
    )
    return {uri: found for uri, found in results.items() if isinstance(found, CheckpointIndex)}


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
