"""Several recipes in one: documents that refer to each other by name, as for mergekit-multi.

What is published is the result of the document without a name, or else of the last one; all others
are steps on the way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merging.errors import Fault
from merging.recipe.addresses import read_model, split_adapter
from merging.recipe.parameters import nearest, shorten
from merging.recipe.recipe import Recipe

KEY = "documents"

MAX_DOCUMENTS = 50

_ADAPTED_BASE = "base_model with its adapter"
_MODEL_KEYS = frozenset({"model", "base_model", "source"})

Read = Callable[[dict[str, Any]], tuple[Recipe, list[Fault]]]
"""One document, and what is wrong with it."""


def read_documents(data: Mapping[str, Any], read: Read) -> tuple[Recipe | None, list[Fault]]:
    """Read a recipe of several documents.

    Args:
        data: With the key ``documents``.
        read: Reads one.

    Returns:
        The recipe that is published, with the others that it needs; and what is wrong, with
        pointers that begin with the document.
    """
    faults: list[Fault] = []
    raw = data[KEY]
    if data.keys() != {KEY}:
        detail = f"A recipe of several documents has nothing beside {KEY!r}."
        return None, [Fault("", "invalid_recipe", detail)]
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_DOCUMENTS:
        given = len(raw) if isinstance(raw, list) and raw else shorten(raw)
        detail = f"{KEY!r} is a list of 1 to {MAX_DOCUMENTS} recipes, not {given}."
        return None, [Fault(f"/{KEY}", "invalid_recipe", detail)]
    documents: list[Recipe] = []
    for number, item in enumerate(raw):
        pointer = f"/{KEY}/{number}"
        if not isinstance(item, dict):
            detail = f"A document is a recipe, not {shorten(item)}."
            faults.append(Fault(pointer, "invalid_recipe", detail))
            continue
        recipe, found = read(item)
        faults += [replace(fault, pointer=pointer + fault.pointer) for fault in found]
        if item.get("sweep") is not None:
            detail = "A sweep is submitted by itself, not as one of several documents."
            faults.append(Fault(f"{pointer}/sweep", "incompatible_options", detail))
        documents.append(replace(recipe, pointer=pointer))
    if faults:
        return None, faults
    return _Joining(documents, faults).join(), faults


def read_adapted(data: dict[str, Any], read: Read) -> tuple[Recipe, list[Fault]]:
    """Read one recipe; a base model with an adapter on it becomes a step of its own.

    What is merged is then measured from the model that the step makes, which is rounded as any
    checkpoint: mergekit too puts the adapter into the model first.
    """
    base = _address(data.get("base_model"))
    if not base or split_adapter(base)[1] is None:
        return read(data)
    first, found = read({"merge_method": "passthrough", "models": [{"model": data["base_model"]}]})
    if found:
        return first, [replace(fault, pointer="/base_model") for fault in found]
    recipe, found = read(_renamed(data, base, _ADAPTED_BASE))
    first = replace(first, name=_ADAPTED_BASE, pointer="/base_model")
    return replace(recipe, documents=(first,)), found


def _address(value: object) -> str:
    return read_model(value, "", lambda *_: None)[0]


def _renamed(data: Any, address: str, name: str) -> Any:
    """The same with another name for a model, wherever one is named."""
    if isinstance(data, list):
        return [_renamed(item, address, name) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: name
        if key in _MODEL_KEYS and _address(value) == address
        else _renamed(value, address, name)
        for key, value in data.items()
    }


@dataclass(frozen=True, slots=True)
class _Reference:
    """An address in a document, and where it stands."""

    address: str
    pointer: str


class _Joining:
    """Puts documents in the order in which they need each other."""

    def __init__(self, documents: Sequence[Recipe], faults: list[Fault]) -> None:
        self._documents = documents
        self._faults = faults
        self._by_name: dict[str, Recipe] = {}
        self._ordered: list[Recipe] = []

    def join(self) -> Recipe | None:
        """The recipe that is published; None if something is wrong."""
        unnamed = [document for document in self._documents if document.name is None]
        for document in unnamed[1:]:
            self._refuse(document.pointer, "One document at the most has no 'name'.")
        for document in self._documents:
            if document.name is not None:
                self._add_name(document, document.name)
        for document in self._documents:
            self._check_references(document)
        last = (unnamed or self._documents)[-1]
        if not self._faults:
            self._order(last, ())
        if self._faults:
            return None
        unused = [d for d in self._documents if d not in self._ordered]
        warnings = tuple(
            f"The document {document.name!r} is needed by no other, and is not merged: published is"
            f" {repr(last.name) if last.name else 'the one without a name'}."
            for document in unused
        )
        return replace(
            last, documents=tuple(self._ordered[:-1]), warnings=(*last.warnings, *warnings)
        )

    def _refuse(self, pointer: str, detail: str) -> None:
        self._faults.append(Fault(pointer, "invalid_recipe", detail))

    def _add_name(self, document: Recipe, name: str) -> None:
        pointer = f"{document.pointer}/name"
        if not name or set("/+:\\") & set(name):
            self._refuse(
                pointer, "The name of a document is a text without '/', '\\', '+' and ':'."
            )
        elif self._by_name.setdefault(name, document) is not document:
            self._refuse(pointer, f"The name {shorten(name)} stands twice.")

    def _check_references(self, document: Recipe) -> None:
        """A plain word that no document is called is a slip, and no folder."""
        for reference in _references(document):
            word = reference.address
            if word not in self._by_name and not set("/.:\\~") & set(word):
                known = nearest(word, self._by_name.keys())
                self._refuse(
                    reference.pointer,
                    f"No document is called {shorten(word)}.{known} A folder here is './{word}'.",
                )

    def _order(self, document: Recipe, above: tuple[Recipe, ...]) -> None:
        """Add a document after those that it needs; the first circle ends the search."""
        if document in self._ordered:
            return
        chain = (*above, document)
        for reference in _references(document):
            needed = self._by_name.get(reference.address)
            if needed is None:
                continue
            if needed in chain:
                names = " → ".join(str(d.name) for d in (*chain[chain.index(needed) :], needed))
                self._refuse(reference.pointer, f"Documents need each other in a circle: {names}.")
                return
            self._order(needed, chain)
            if self._faults:
                return
        self._ordered.append(document)


def _references(document: Recipe) -> Iterator[_Reference]:
    """The addresses of models in a document."""
    found: dict[str, str] = {}
    for section in document.sections:
        for number, entry in enumerate(section.entries):
            pointer = f"{section.pointer}/{number}/model"
            found.setdefault(split_adapter(entry.model)[0], pointer)
        if section.base_model is not None and section.base_model != document.base_model:
            found.setdefault(section.base_model, f"{section.owner}/base_model")
    if document.base_model is not None:
        found.setdefault(document.base_model, "/base_model")
    if document.tokenizer is not None:
        for address, pointer in document.tokenizer.models():
            found.setdefault(address, pointer)
    for address, pointer in found.items():
        yield _Reference(address, document.pointer + pointer)
