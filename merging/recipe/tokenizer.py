"""Reading what a recipe says of the output's tokenizer and of the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.errors import Fault
from merging.recipe.addresses import read_model, split_adapter
from merging.recipe.document import escape_pointer
from merging.recipe.parameters import check_keys, shorten

SOURCE_WORDS = frozenset({"base", "union"})
"""What ``tokenizer_source`` says instead of a model's address."""

_KEYS = frozenset({"source", "tokens", "pad_to_multiple_of"})
_TOKEN_KEYS = frozenset({"source", "force"})
_KINDS = {"zero": frozenset({"kind"}), "model_token": frozenset({"kind", "model", "token"})}
_MAX_TOKENS = 10_000
_MAX_MULTIPLE = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """What the embedding of a token is in models that lack it.

    Attributes:
        model: Address of the model that has it; None is zeros.
        token: The token of that model; None is the token itself, unless there is a number.
        token_id: The token of that model, by its number.
        force: In all models, also in those that have the token.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    def plain(self) -> dict[str, Any]:
        """As it is written in a recipe."""
        source: Any = self.model
        if self.model is None:
            source = {"kind": "zero"}
        elif self.token_id is not None:
            source = {"kind": "model_token", "model": self.model, "token_id": self.token_id}
        elif self.token is not None:
            source = {"kind": "model_token", "model": self.model, "token": self.token}
        return {"source": source} | ({"force": True} if self.force else {})


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """The output's tokenizer.

    Attributes:
        source: Whose it is: ``base``, ``union`` or a model's address.
        tokens: Embeddings of single tokens, which are added where the tokenizer lacks them.
        pad_to_multiple_of: The rows of embeddings are so many, or twice as many, …
        key: The recipe's key that says so.
    """

    source: str
    tokens: Mapping[str, TokenChoice] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    key: str = field(default="tokenizer", compare=False)

    @property
    def pointer(self) -> str:
        """JSON pointer to the source."""
        return "/tokenizer/source" if self.key == "tokenizer" else f"/{self.key}"

    def models(self) -> Iterator[tuple[str, str]]:
        """The addresses of models that it names, and where each stands."""
        if self.source not in SOURCE_WORDS:
            yield self.source, self.pointer
        for token, choice in self.tokens.items():
            if choice.model is not None:
                yield choice.model, f"/tokenizer/tokens/{escape_pointer(token)}/source"

    def plain(self) -> dict[str, Any]:
        """As the recipe's keys, in one form."""
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.source}
        tokens = {name: choice.plain() for name, choice in sorted(self.tokens.items())}
        found = {
            "source": self.source,
            "tokens": tokens or None,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        return {"tokenizer": {key: value for key, value in found.items() if value is not None}}


def read_tokenizer(data: Mapping[str, Any], faults: list[Fault]) -> TokenizerChoice | None:
    """What ``tokenizer_source`` or ``tokenizer`` of a recipe says; None if neither is there.

    Args:
        data: The recipe.
        faults: What is wrong is added here.
    """
    given = [key for key in ("tokenizer", "tokenizer_source") if data.get(key) is not None]
    if not given:
        return None
    reader = _Reader(faults)
    if len(given) > 1:
        detail = "Give 'tokenizer' or 'tokenizer_source', not both: they say the same."
        reader.refuse("/tokenizer_source", detail, "incompatible_options")
    value = data[given[0]]
    if given[0] == "tokenizer_source":
        source = reader.address(value, "/tokenizer_source")
        return TokenizerChoice(source, key="tokenizer_source")
    if not isinstance(value, dict):
        detail = f"'tokenizer' is a mapping with 'source', not {shorten(value)}."
        reader.refuse("/tokenizer", detail)
        return None
    check_keys(value, "/tokenizer", _KEYS, reader.refuse)
    return TokenizerChoice(
        reader.address(value.get("source", "union"), "/tokenizer/source"),
        reader.tokens(value.get("tokens"), "/tokenizer/tokens"),
        reader.multiple(value.get("pad_to_multiple_of"), "/tokenizer/pad_to_multiple_of"),
    )


class _Reader:
    """Reads parts of ``tokenizer``, collecting faults."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults

    def refuse(self, pointer: str, detail: str, code: str = "invalid_recipe") -> None:
        self._faults.append(Fault(pointer, code, detail))

    def address(self, value: Any, pointer: str) -> str:
        """``base``, ``union`` or a model's address; ``""`` if it is none of them."""
        if isinstance(value, str) and value in SOURCE_WORDS:
            return value
        return self._model(value, pointer)

    def _model(self, value: Any, pointer: str) -> str:
        address, _ = read_model(value, pointer, self.refuse)
        if split_adapter(address)[1] is None:
            return address
        self.refuse(pointer, "Name the model alone: an adapter has no vocabulary of its own.")
        return ""

    def multiple(self, value: Any, pointer: str) -> int | None:
        if value is None or (type(value) is int and 0 < value <= _MAX_MULTIPLE):
            return value
        detail = (
            f"'pad_to_multiple_of' is a whole number from 1 to {_MAX_MULTIPLE}, not"
            f" {shorten(value)}."
        )
        self.refuse(pointer, detail)
        return None

    def tokens(self, raw: Any, pointer: str) -> dict[str, TokenChoice]:
        if raw is None:
            return {}
        if not isinstance(raw, dict) or len(raw) > _MAX_TOKENS:
            detail = f"'tokens' is a mapping of at most {_MAX_TOKENS} tokens with 'source' each."
            self.refuse(pointer, detail)
            return {}
        return {
            token: self._choice(item, f"{pointer}/{escape_pointer(token)}", token)
            for token, item in raw.items()
        }

    def _choice(self, raw: Any, pointer: str, token: str) -> TokenChoice:
        if not token:
            self.refuse(pointer, "A token is a text of at least one character.")
        if not isinstance(raw, dict):
            self.refuse(pointer, f"A token has a mapping with 'source', not {shorten(raw)}.")
            return TokenChoice()
        check_keys(raw, pointer, _TOKEN_KEYS, self.refuse)
        force = raw.get("force", False)
        if not isinstance(force, bool):
            self.refuse(f"{pointer}/force", f"'force' is true or false, not {shorten(force)}.")
        source, here = raw.get("source"), f"{pointer}/source"
        if source is None:
            detail = "Say with 'source' where the embedding is from: a model, or {kind: zero}."
            self.refuse(here, detail)
        elif isinstance(source, dict) and ("kind" in source or "model" not in source):
            return self._special(source, here, force=force is True)
        else:
            return TokenChoice(self._model(source, here), force=force is True)
        return TokenChoice()

    def _special(self, source: dict[str, Any], pointer: str, *, force: bool) -> TokenChoice:
        """``{kind: zero}`` or ``{kind: model_token, model: …, token: …}`` (or ``token_id``)."""
        kind = source.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            self.refuse(f"{pointer}/kind", f"'kind' is zero or model_token, not {shorten(kind)}.")
            return TokenChoice()
        own = _KINDS[kind] | ({"token_id"} if kind == "model_token" else set())
        check_keys(source, pointer, own, self.refuse)
        if kind == "zero":
            return TokenChoice(force=force)
        token = self._part(source, "token", pointer, lambda t: isinstance(t, str) and t != "")
        number = self._part(source, "token_id", pointer, lambda n: type(n) is int and n >= 0)
        if (source.get("token") is None) == (source.get("token_id") is None):
            self.refuse(pointer, "Name one token of the model: by 'token' or by 'token_id'.")
        model = self._model(source.get("model"), f"{pointer}/model")
        return TokenChoice(model, token, number, force)

    def _part(
        self, source: dict[str, Any], key: str, pointer: str, fits: Callable[[Any], bool]
    ) -> Any:
        value = source.get(key)
        if value is None or fits(value):
            return value
        what = "a token's text" if key == "token" else "a token's number, from 0 on"
        self.refuse(f"{pointer}/{key}", f"{key!r} is {what}, not {shorten(value)}.")
        return None
