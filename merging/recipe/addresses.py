"""How recipes name models."""

from __future__ import annotations

_HUB_SCHEMES = frozenset({"hf", "huggingface", "http", "https"})


def address_problem(value: object) -> str | None:
    """What keeps a value from being a model's address; None if nothing does.

    An address is a local path, ``file:///path`` or ``s3://bucket/prefix``. ``org/name`` is a path
    like any other: models of a hub have to be downloaded first. Whether an address is allowed and
    exists is for storage to say.
    """
    if isinstance(value, dict):
        return (
            "Models given as a mapping (lora, override_architecture …) are not supported by this"
            " version; give the address of a checkpoint."
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
    if not separator and "+" in value:
        return (
            "Adapters ('model+lora') are not supported by this version; merge the adapter into its"
            " model first. (A folder with '+' in its name can be given as file:///path.)"
        )
    return None
