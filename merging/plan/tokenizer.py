"""Whose tokenizer the output has, and what becomes of models whose tokens have other numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.checkpoint.documents import parse_config
from merging.checkpoint.index import list_folder
from merging.checkpoint.vocabulary import (
    TOKENIZER_NAME,
    AddedToken,
    Tokenizer,
    is_tokenizer_file,
    read_tokenizer,
)
from merging.errors import Fault, MergeError, RecipeError, at_place
from merging.plan.inputs import Inputs
from merging.plan.outputs import Companion
from merging.plan.vocabulary import Vocabulary, text_configs, unite, vocabulary_tensors
from merging.recipe import Recipe
from merging.recipe.tokenizer import SOURCE_WORDS, TokenizerChoice
from merging.storage.base import Storage

_CONFIG_NAME = "config.json"
_GENERATION_NAME = "generation_config.json"
_SPECIAL = "_token_id"
"""How keys of a config end that hold numbers of tokens."""
_MAX_CONFIG_BYTES = 16 << 20
_CONVERT = (
    "Convert it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers"
    " writes one"
)


@dataclass(frozen=True, slots=True)
class OutputTokenizer:
    """What goes beside the output's weights.

    Attributes:
        companions: The files.
        vocabulary: The output's, if rows of embeddings have to be put in its order.
        special_ids: Keys of the config whose numbers are other ones in that vocabulary.
    """

    companions: tuple[Companion, ...]
    vocabulary: Vocabulary | None = None
    special_ids: Mapping[str, Any] = field(default_factory=dict)

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """What the tokenizer's files lack."""
        return self.vocabulary.added if self.vocabulary else ()

    def adapt_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A ``config.json`` with the size and special tokens of the vocabulary."""
        if self.vocabulary is None:
            return config
        inner = config.get("text_config")
        changes = {"vocab_size": self.vocabulary.num_rows, **self.special_ids}
        changed = {key: changes.get(key, value) for key, value in config.items()}
        if isinstance(inner, dict):
            changed["text_config"] = self.adapt_config(inner)
        else:
            changed["vocab_size"] = self.vocabulary.num_rows
        return changed


def plan_tokenizer(
    recipe: Recipe, inputs: Inputs, storage: Storage, warnings: list[str]
) -> OutputTokenizer:
    """The files beside the output's weights, and its vocabulary where models have others.

    All files are the donor's, but for those of the tokenizer where ``tokenizer_source`` names
    another model. Without that key no tokenizer is looked at.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        storage: Where they are.
        warnings: Models without a vocabulary, and tokens without an embedding, are told here.

    Raises:
        RecipeError: ``incompatible_options``: a tokenizer that is not there, or in another form.
        CheckpointError: A tokenizer is damaged.
        StorageError: A tokenizer cannot be read.
    """
    donor = inputs.donor
    files = _companions(donor.uri, donor.companions)
    if recipe.tokenizer is None:
        return OutputTokenizer(files)
    return _Planner(recipe.tokenizer, inputs, storage, warnings).plan(files)


def _companions(uri: str, names: Mapping[str, str]) -> tuple[Companion, ...]:
    return tuple(
        Companion(f"{uri}/{name}", name, version) for name, version in sorted(names.items())
    )


class _Planner:
    """One call of :func:`plan_tokenizer`."""

    def __init__(
        self, choice: TokenizerChoice, inputs: Inputs, storage: Storage, warnings: list[str]
    ) -> None:
        self._choice = choice
        self._donor = inputs.donor
        self._indexes = inputs.all_indexes
        self._storage = storage
        self._warnings = warnings
        self._source = inputs.donor.uri
        self._files: Mapping[str, str] = inputs.donor.companions
        if choice.source not in SOURCE_WORDS:
            self._source, self._files = self._list(choice.source)
        self._heights = {index.uri: vocabulary_tensors(index) for index in self._indexes}

    def plan(self, files: tuple[Companion, ...]) -> OutputTokenizer:
        if TOKENIZER_NAME not in self._files:
            raise self._refusal(self._lack(self._source, self._files))
        source = self._read(self._source, self._files)
        models = self._models(source)
        vocabulary = self._vocabulary(source, models)
        is_renumbered = vocabulary is not None and self._source != self._donor.uri
        replaced = _replaced_with_numbers if is_renumbered else is_tokenizer_file
        kept = [file for file in files if not replaced(file.file_name)]
        own = {name: version for name, version in self._files.items() if replaced(name)}
        joined = sorted([*kept, *_companions(self._source, own)], key=lambda file: file.file_name)
        if vocabulary is None or not is_renumbered:
            return OutputTokenizer(tuple(joined), vocabulary)
        special = self._special_ids(models[self._donor.uri].vocabulary, vocabulary)
        return OutputTokenizer(tuple(joined), vocabulary, special)

    def _models(self, source: Tokenizer) -> dict[str, Tokenizer]:
        """The tokenizers of all models; of one without any, that of the donor or the source."""
        found: dict[str, Tokenizer] = {}
        for index in self._indexes:
            if index.uri == self._source:
                found[index.uri] = source
            elif TOKENIZER_NAME in index.companions:
                found[index.uri] = self._read(index.uri, index.companions)
            elif _other_forms(index.companions):
                raise self._refusal(self._lack(index.uri, index.companions))
            else:
                like = self._donor.uri if self._donor.uri in found else self._source
                found[index.uri] = found.get(like, source)
                self._warnings.append(
                    f"{index.uri} has no {TOKENIZER_NAME}; its vocabulary is taken to be that of"
                    f" {like}."
                )
        return found

    def _vocabulary(self, source: Tokenizer, models: Mapping[str, Tokenizer]) -> Vocabulary | None:
        """The output's vocabulary; None if all models have it, in equally many rows."""
        added: tuple[AddedToken, ...] = ()
        if self._choice.source == "union":
            others = [
                (models[uri], max(own.values(), default=0)) for uri, own in self._heights.items()
            ]
            added = unite(source, others)
        numbers = source.vocabulary | {token.content: token.id for token in added}
        first = 1 + max(numbers.values(), default=-1)
        new = [token for token in self._choice.tokens if token not in numbers]
        added += tuple(AddedToken(first + place, token) for place, token in enumerate(new))
        numbers |= {token.content: token.id for token in added}
        multiple = self._choice.pad_to_multiple_of
        is_same = all(tokenizer.vocabulary == numbers for tokenizer in models.values())
        heights = {height for own in self._heights.values() for height in own.values()}
        if is_same and len(heights) <= 1 and not (self._choice.tokens or multiple):
            return None
        num_tokens = 1 + max(numbers.values(), default=-1)
        return Vocabulary(
            numbers=numbers,
            num_rows=-(-num_tokens // (multiple or 1)) * (multiple or 1),
            models={uri: tokenizer.vocabulary for uri, tokenizer in models.items()},
            heights=self._heights,
            choices={
                token: dataclasses.replace(choice, model=self._storage.normalise(choice.model))
                if choice.model
                else choice
                for token, choice in self._choice.tokens.items()
            },
            added=added,
        )

    def _read(self, uri: str, files: Mapping[str, str]) -> Tokenizer:
        return read_tokenizer(self._storage, f"{uri}/{TOKENIZER_NAME}", files[TOKENIZER_NAME])

    def _special_ids(self, ours: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, Any]:
        """What the source's config says, else where the donor's special tokens now are."""
        theirs = self._config()
        tokens = {number: token for token, number in ours.items()}

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [n for n in map(move, value) if n is not None]
            return vocabulary.numbers.get(tokens.get(value, "")) if type(value) is int else None

        found: dict[str, Any] = {}
        for config in text_configs(self._donor.config):
            for key, value in config.items():
                if key.endswith(_SPECIAL) and value is not None:
                    said = [c[key] for c in text_configs(theirs) if c.get(key) is not None]
                    found[key] = said[0] if said else move(value)
        return found

    def _config(self) -> dict[str, Any]:
        """The ``config.json`` of the source."""
        for index in self._indexes:
            if index.uri == self._source:
                return index.config
        if _CONFIG_NAME not in self._files:
            return {}
        uri = f"{self._source}/{_CONFIG_NAME}"
        version = self._files[_CONFIG_NAME]
        data = self._storage.read_bytes(uri, limit=_MAX_CONFIG_BYTES, version=version)
        return parse_config(data, uri)

    def _list(self, address: str) -> tuple[str, dict[str, str]]:
        """The normalised address of a model, and its files with their versions."""
        try:
            uri = self._storage.normalise(address)
            return uri, {n: stat.version for n, stat in list_folder(self._storage, uri).items()}
        except MergeError as error:
            raise at_place(error, self._choice.pointer) from error

    def _lack(self, uri: str, files: Mapping[str, str]) -> str:
        """What to do about a model without ``tokenizer.json``."""
        if forms := _other_forms(files):
            return (
                f"{uri} has its tokenizer as {', '.join(forms)} alone; vocabularies are compared"
                f" and written as {TOKENIZER_NAME}. {_CONVERT}."
            )
        return (
            f"{uri} has no {TOKENIZER_NAME}, by which vocabularies are compared. Save its"
            " tokenizer with the tokenizers library, or remove the key."
        )

    def _refusal(self, detail: str) -> RecipeError:
        fault = Fault(self._choice.pointer, "incompatible_options", detail)
        return RecipeError(detail, code="incompatible_options", faults=[fault])


def _replaced_with_numbers(name: str) -> bool:
    """Whether a file belongs to a tokenizer, or holds numbers of its tokens."""
    return is_tokenizer_file(name) or name == _GENERATION_NAME


def _other_forms(files: Mapping[str, str]) -> list[str]:
    """Files that hold a vocabulary in other forms (sentencepiece, tiktoken, lists)."""
    endings = (".model", ".spm", ".tiktoken", "tekken.json", "vocab.json", "vocab.txt")
    return sorted(name for name in files if name.endswith(endings) or ".model.v" in name)
