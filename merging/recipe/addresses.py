"""How recipes name models."""

from __future__ import annotations

import re

_SECOND_ADDRESS = re.compile(r"\+(?=/|[A-Za-z0-9]+://)")

_HUB_SCHEMES = frozenset({"hf", "huggingface", "http", "https"})


def address_problem(value: object) -> str | None:
    """What keeps a value from being a model's address; None if nothing does.

    An address is a local path, ``file:///path`` or ``s3://bucket/prefix``, or two of them with a
    ``+`` in between: a model and an adapter (:func:`split_adapter`). ``org/name`` is a path
    like any other: models of a hub have to be downloaded first. Whether an address is allowed and
    exists is for storage to say.
    """
    if isinstance(value, dict):
        return (
            "Models given as a mapping (override_architecture …) are not supported by this"
            " version; give the address of a checkpoint, or 'model+adapter'."
        )
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
