"""How recipes name models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from merging.recipe.parameters import check_keys, shorten

Refuse = Callable[[str, str], None]
"""Takes a JSON pointer, and what is wrong there."""

_SECOND_ADDRESS = re.compile(r"\+(?=/|[A-Za-z0-9]+://)")

_HUB_SCHEMES = frozenset({"hf", "huggingface", "http", "https"})

_MODEL_KEYS = frozenset({"model", "lora", "override_architecture"})
_PATH_KEYS = frozenset({"path", "revision"})
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


def read_model(value: object, pointer: str, refuse: Refuse) -> tuple[str, str | None]:
    """A model as recipes name it: an address, or mergekit's mapping that says the same.

    ``{model: {path: …, revision: …}, lora: {path: …}}`` is ``path@revision+lora``. A revision is
    part of the folder's name, in which it has to lie: another one is never merged in its place.

    Args:
        value: Plain data.
        pointer: Where it stands.
        refuse: Is told of all that is wrong.

    Returns:
        The address, ``""`` if there is none; and ``override_architecture``, the class that
        ``config.json`` of the model is taken to name.
    """
    if isinstance(value, dict):
        return _read_mapping(value, pointer, refuse)
    problem = address_problem(value)
    if problem is None:
        return str(value), None
    refuse(pointer, problem)
    return "", None


def _read_mapping(value: Mapping[str, Any], pointer: str, refuse: Refuse) -> tuple[str, str | None]:
    check_keys(value, pointer, _MODEL_KEYS, refuse)
    architecture = value.get("override_architecture")
    if architecture is not None and not (
        isinstance(architecture, str) and architecture.isidentifier()
    ):
        detail = (
            f"The name of a class (LlamaForCausalLM …) stands here, not {shorten(architecture)}."
        )
        refuse(f"{pointer}/override_architecture", detail)
        architecture = None
    model = _read_path(value.get("model"), f"{pointer}/model", refuse)
    if value.get("lora") is None:
        return model, architecture
    adapter = _read_path(value["lora"], f"{pointer}/lora", refuse)
    if not (model and adapter):
        return "", architecture
    address = f"{model}+{adapter}"
    if split_adapter(address) != (model, adapter):
        detail = (
            "Behind a model's address with a scheme an adapter has a scheme too, or is an absolute"
            " path."
        )
        refuse(f"{pointer}/lora", detail)
    return address, architecture


def _read_path(value: object, pointer: str, refuse: Refuse) -> str:
    """One folder, as its address or as ``{path: …, revision: …}``; ``""`` if it is none."""
    if not isinstance(value, dict):
        return _read_folder(value, pointer, refuse)
    check_keys(value, pointer, _PATH_KEYS, refuse)
    path = _read_folder(value.get("path"), f"{pointer}/path", refuse)
    revision = value.get("revision")
    if revision is None:
        return path
    if isinstance(revision, str) and _REVISION.fullmatch(revision):
        return path and f"{path.rstrip('/')}@{revision}"
    detail = (
        "A revision is a branch, tag or commit, in quotes if it looks like a number; not"
        f" {shorten(revision)}."
    )
    refuse(f"{pointer}/revision", detail)
    return ""


def _read_folder(value: object, pointer: str, refuse: Refuse) -> str:
    problem = address_problem(value)
    if problem is None and split_adapter(str(value))[1] is not None:
        problem = (
            "One folder stands here: an adapter is named under 'lora', and a folder with '+' in its"
            " name can be given as file:///path."
        )
    if problem is None:
        return str(value)
    refuse(pointer, problem)
    return ""


def address_problem(value: object) -> str | None:
    """What keeps a value from being a model's address; None if nothing does.

    An address is a local path, ``file:///path`` or ``s3://bucket/prefix``, or two of them with a
    ``+`` in between: a model and an adapter (:func:`split_adapter`). ``org/name`` is a path
    like any other: models of a hub have to be downloaded first. Whether an address is allowed and
    exists is for storage to say.
    """
    if not isinstance(value, str) or not value.strip():
        return f"A model is a path or an address such as s3://bucket/prefix, not {value!r}."
    if any(ord(character) < 32 for character in value):
        return "A model's address is one line without control characters."
    scheme, separator, _ = value.partition("://")
    if separator and scheme.lower() in _HUB_SCHEMES:
        return (
            f"Addresses that begin with {scheme}:// are not supported; download the model to a"
            " local folder, or copy it to s3://bucket/prefix."
        )
    if not separator and (value.count("+") > 1 or not all(value.split("+"))):
        return (
            "A '+' stands between a model and one adapter ('model+adapter'). A folder with '+' in"
            " its name can be given as file:///path."
        )
    return None


def split_adapter(address: str) -> tuple[str, str | None]:
    """A model's address, and that of the adapter that is put on it (``model+adapter``) if any.

    A ``+`` in an address with a scheme belongs to it unless a scheme or an absolute path follows:
    ``s3://bucket/model+s3://bucket/adapter``.
    """
    model, separator, adapter = address.partition("+")
    if "://" in model:
        match = _SECOND_ADDRESS.search(address)
        return (
            (address[: match.start()], address[match.start() + 1 :]) if match else (address, None)
        )
    return (model, adapter) if separator else (address, None)
