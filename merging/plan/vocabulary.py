"""The vocabulary of the output, and which rows of the models its tokens have.

The rules are mergekit's. A model that has a token keeps its own row for it. In the others the row
is what ``tokenizer.tokens`` says; else the base's, or that of the one model that has the token, or
the mean of those of all models that have it. A token that no model has gets zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from merging.checkpoint.index import CheckpointIndex
from merging.checkpoint.vocabulary import AddedToken, Tokenizer
from merging.errors import Fault, RecipeError
from merging.recipe.document import escape_pointer
from merging.recipe.tokenizer import TokenChoice
from merging.roles import describe_tensor

Row = tuple[int, int]
"""A row of a model's tensor: number of the model, number of the row."""

_VOCABULARY_KINDS = frozenset({"embedding", "head", "bias"})


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows: the mean of as many rows of each part, from its first one; or zeros.

    ``parts`` are pairs of a source and its first row.
    """

    count: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The output's tokens, where they differ from those of a model.

    Attributes:
        numbers: Of the tokens.
        num_rows: Of embeddings; those beyond the last token are the mean of all before.
        models: Vocabularies of the models, by address.
        heights: Of the models' tensors with a row for each token, by address and name.
        choices: What the recipe says of single tokens; addresses are normalised.
        added: What the files of the tokenizer lack.
    """

    numbers: Mapping[str, int]
    num_rows: int
    models: Mapping[str, Mapping[str, int]]
    heights: Mapping[str, Mapping[str, int]]
    choices: Mapping[str, TokenChoice] = field(default_factory=dict)
    added: tuple[AddedToken, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows that are not padding."""
        return 1 + max(self.numbers.values(), default=-1)

    def rows_of(self, uri: str, num_rows: int) -> list[int]:
        """The row of each token in a model with so many rows; -1 where it has none."""
        own = self.models[uri]
        rows = [-1] * self.num_tokens
        for token, number in self.numbers.items():
            row = own.get(token, -1)
            rows[number] = row if row < num_rows else -1
        return rows

    def tensors_of(self, index: CheckpointIndex) -> list[str]:
        """Names of a checkpoint's tensors with a row for each token, as far as a slice has them."""
        return [name for name in self.heights[index.uri] if name in index.tensors]


def unite(base: Tokenizer, others: Sequence[tuple[Tokenizer, int]]) -> tuple[AddedToken, ...]:
    """The tokens that the base's tokenizer lacks, with numbers from its highest one on.

    First those of the models proper, then added ones with their attributes; model by model, by
    number, so that the same models give the same numbers.

    Args:
        base: Its tokens keep their numbers.
        others: Tokenizers with the number of rows that their models have: tokens beyond are left
            out, as they were never trained.
    """
    numbers = dict(base.vocabulary)
    listed = {token.content for token in base.added}
    added: dict[str, AddedToken] = {}
    first = 1 + max(numbers.values(), default=-1)
    for tokenizer, num_rows in others:
        own = {token.content for token in tokenizer.added}
        for token, number in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]):
            if token not in numbers and token not in own and number < num_rows:
                numbers[token] = first + len(added)
                added[token] = AddedToken(numbers[token], token)
    number = first + len(added)
    for tokenizer, num_rows in others:
        for found in tokenizer.added:
            if found.id >= num_rows or found.content in listed:
                continue
            listed.add(found.content)
            if found.content not in numbers:
                numbers[found.content] = number
                number += 1
            added[found.content] = msgspec.structs.replace(found, id=numbers[found.content])
    return tuple(sorted(added.values(), key=lambda token: token.id))


def vocabulary_tensors(index: CheckpointIndex) -> dict[str, int]:
    """Names of tensors with a row for each token, and how many rows these are."""
    roles = {
        name: describe_tensor(name, entry.shape, index.config)
        for name, entry in index.tensors.items()
    }
    rows = {
        index.tensors[name].shape[0]
        for name, role in roles.items()
        if role.kind == "embedding" and role.layer < 0 and role.is_matrix
    }
    said = {config.get("vocab_size") for config in text_configs(index.config)}
    num_rows = max(rows & said or rows, default=0)
    return {
        name: num_rows
        for name, role in roles.items()
        if role.kind in _VOCABULARY_KINDS
        and role.layer < 0
        and index.tensors[name].shape[:1] == (num_rows,)
        and (role.is_matrix or role.kind == "bias")
    }


def text_configs(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Those parts of a ``config.json`` that may be of a language model."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


class RowTable:
    """Which rows make the tensors of some models, in the order of the output's tokens.

    Args:
        vocabulary: The output's.
        models: Addresses of the models, in recipe order, with those of adapters that change rows.
        uris: The same without adapters.
        base: Address of the base model, if there is one.
        num_rows: That the models' tensors have.

    Raises:
        RecipeError: ``incompatible_options``, with a fault for each token that is to be taken from
            a model that lacks it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        models: Sequence[str],
        uris: Sequence[str],
        base: str | None,
        num_rows: Sequence[int],
    ) -> None:
        self._vocabulary = vocabulary
        # A model that stands there under adapters alone has the rows of one of them.
        self._places = {name: place for names in (uris, models) for place, name in enumerate(names)}
        self._num_rows = num_rows
        self._base = self._places.get(base or "")
        self._tokens: list[str | None] = [None] * vocabulary.num_tokens
        for token, number in vocabulary.numbers.items():
            self._tokens[number] = token
        self._own = [vocabulary.rows_of(uri, n) for uri, n in zip(uris, num_rows, strict=True)]
        self._check_choices()
        self._defaults = self._default_rows()
        forced = {token for token, choice in vocabulary.choices.items() if choice.force}
        self._forced = {vocabulary.numbers[token] for token in forced}

    def _default_rows(self) -> list[tuple[Row, ...]]:
        """What the row of each token is in models that lack it."""
        defaults: list[tuple[Row, ...]] = []
        for number, token in enumerate(self._tokens):
            choice = self._vocabulary.choices.get(token or "")
            if token is not None and choice is not None:
                defaults.append(self._chosen(number, choice))
                continue
            present = tuple((m, rows[number]) for m, rows in enumerate(self._own))
            having = tuple(row for row in present if row[1] >= 0)
            if self._base is not None and present[self._base][1] >= 0:
                having = (present[self._base],)
            defaults.append(having)
        return defaults

    def _chosen(self, number: int, choice: TokenChoice) -> tuple[Row, ...]:
        if choice.model is None:
            return ()
        place = self._places[choice.model]
        if choice.token_id is not None:
            return ((place, choice.token_id),)
        if choice.token is not None:
            return ((place, self._vocabulary.models[choice.model][choice.token]),)
        return ((place, self._own[place][number]),)

    def _check_choices(self) -> None:
        faults = []
        for token, choice in self._vocabulary.choices.items():
            if problem := self._problem(token, choice):
                pointer = f"/tokenizer/tokens/{escape_pointer(token)}/source"
                faults.append(Fault(pointer, "incompatible_options", problem))
        if faults:
            raise RecipeError(faults[0].detail, code=faults[0].code, faults=faults)

    def _problem(self, token: str, choice: TokenChoice) -> str | None:
        """Why a choice cannot be followed; None if it can."""
        if choice.model is None:
            return None
        place = self._places.get(choice.model)
        if place is None:
            return f"{choice.model} is none of the models whose embeddings are merged."
        own = self._vocabulary.models[choice.model]
        row = choice.token_id if choice.token_id is not None else own.get(choice.token or token, -1)
        if 0 <= row < self._num_rows[place]:
            return None
        if choice.token_id is not None:
            return f"{choice.model} has {self._num_rows[place]} rows, and none numbered {row}."
        return f"{choice.model} has no embedding of the token {choice.token or token!r}."

    def missing(self) -> list[str]:
        """Tokens of the output that no model has and the recipe says nothing of."""
        choices = self._vocabulary.choices
        return [
            token
            for token, rows in zip(self._tokens, self._defaults, strict=True)
            if token is not None and not rows and token not in choices
        ]

    def runs(self, place: int) -> list[Run]:
        """The rows of one model's tensor; those of padding are not among them."""
        return runs_of(self._rows(place))

    def _rows(self, place: int) -> Iterator[tuple[Row, ...]]:
        for number, row in enumerate(self._own[place]):
            is_own = row >= 0 and number not in self._forced
            yield ((place, row),) if is_own else self._defaults[number]


def runs_of(rows: Iterable[tuple[Row, ...]]) -> list[Run]:
    """Rows, each of which is the mean of others, as runs."""
    runs: list[Run] = []
    for parts in rows:
        if runs and _follow(runs[-1], parts):
            runs[-1] = Run(runs[-1].count + 1, runs[-1].parts)
        else:
            runs.append(Run(1, parts))
    return runs


def _follow(run: Run, parts: tuple[Row, ...]) -> bool:
    """Whether rows come next after those of a run."""
    if len(run.parts) != len(parts):
        return False
    return all(
        source == own and first + run.count == row
        for (source, first), (own, row) in zip(run.parts, parts, strict=True)
    )
