"""Whose tokenizer the output has, and whether it is the tokenizer of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merging.checkpoint.documents import shorten_all
from merging.checkpoint.index import CheckpointIndex, list_folder
from merging.checkpoint.vocabulary import TOKENIZER_NAME, is_tokenizer_file, read_vocabulary
from merging.errors import Fault, MergeError, RecipeError
from merging.plan.inputs import Inputs
from merging.plan.plan import Companion
from merging.recipe import Recipe
from merging.recipe.recipe import TOKENIZER_WORDS
from merging.storage.base import Storage

_POINTER = "/tokenizer_source"


def choose_companions(
    recipe: Recipe, inputs: Inputs, storage: Storage, warnings: list[str]
) -> tuple[Companion, ...]:
    """The files that go beside the output's weights.

    All are the donor's, but for those of the tokenizer where ``tokenizer_source`` names another
    model. With that key, all models must have one vocabulary: it is then the union of all, too.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        storage: Where they are.
        warnings: Models without a vocabulary to compare are told here.

    Raises:
        RecipeError: ``incompatible_options``: vocabularies differ, or a source has no tokenizer.
        CheckpointError: A tokenizer is damaged.
        StorageError: A tokenizer cannot be read.
    """
    donor = inputs.donor
    files = _companions(donor.uri, donor.companions)
    if recipe.tokenizer_source is None:
        return files
    source, own = donor.uri, donor.companions
    if recipe.tokenizer_source not in TOKENIZER_WORDS:
        source, own = _list(recipe.tokenizer_source, storage)
    if TOKENIZER_NAME not in own:
        detail = (
            f"{source} has no {TOKENIZER_NAME}, by which vocabularies are compared. Save its"
            " tokenizer with the tokenizers library, or remove the key."
        )
        raise _refusal([detail])
    _check_vocabularies(source, own[TOKENIZER_NAME], inputs.all_indexes, storage, warnings)
    tokenizer = {name: version for name, version in own.items() if is_tokenizer_file(name)}
    return tuple(
        sorted(
            [file for file in files if not is_tokenizer_file(file.file_name)]
            + list(_companions(source, tokenizer)),
            key=lambda file: file.file_name,
        )
    )


def _list(address: str, storage: Storage) -> tuple[str, dict[str, str]]:
    """The normalised address of a model, and its files with their versions."""
    try:
        uri = storage.normalise(address)
        return uri, {name: stat.version for name, stat in list_folder(storage, uri).items()}
    except MergeError as error:
        raise type(error)(
            error.detail,
            code=error.code,
            faults=[Fault(_POINTER, error.code, error.detail)],
            retryable=error.retryable,
            context=error.context,
        ) from error


def _companions(uri: str, names: Mapping[str, str]) -> tuple[Companion, ...]:
    return tuple(
        Companion(f"{uri}/{name}", name, version) for name, version in sorted(names.items())
    )


def _check_vocabularies(
    source: str,
    version: str,
    indexes: Sequence[CheckpointIndex],
    storage: Storage,
    warnings: list[str],
) -> None:
    """Refuse models whose tokens have other numbers than those of the source."""
    expected = read_vocabulary(storage, f"{source}/{TOKENIZER_NAME}", version)
    details = []
    for index in indexes:
        if index.uri == source:
            continue
        own = index.companions.get(TOKENIZER_NAME)
        if own is None:
            warnings.append(
                f"{index.uri} has no {TOKENIZER_NAME}; its vocabulary is taken to be that of"
                f" {source}."
            )
            continue
        vocabulary = read_vocabulary(storage, f"{index.uri}/{TOKENIZER_NAME}", own)
        if vocabulary != expected:
            details.append(_difference(index.uri, vocabulary, source, expected))
    if details:
        raise _refusal(details)


def _difference(
    uri: str, vocabulary: Mapping[str, int], source: str, expected: Mapping[str, int]
) -> str:
    parts = {
        "lacks": expected.keys() - vocabulary.keys(),
        "adds": vocabulary.keys() - expected.keys(),
        "gives other numbers to": {
            token
            for token in expected.keys() & vocabulary.keys()
            if expected[token] != vocabulary[token]
        },
    }
    told = [f"{verb} {shorten_all(sorted(tokens))}" for verb, tokens in parts.items() if tokens]
    return (
        f"{uri} has another vocabulary than {source}: it {'; it '.join(told)}. Models with"
        " different vocabularies cannot be merged by this version."
    )


def _refusal(details: Sequence[str]) -> RecipeError:
    faults = [Fault(_POINTER, "incompatible_options", detail) for detail in details]
    return RecipeError(details[0], code="incompatible_options", faults=faults)
