"""Which chat template the output has, if the recipe says."""

from __future__ import annotations

from collections import Counter

from merging.checkpoint.documents import parse_config
from merging.checkpoint.index import CheckpointIndex
from merging.plan.inputs import Inputs
from merging.recipe import Recipe
from merging.recipe.chat_templates import AUTO, TEMPLATES
from merging.storage.base import Storage

TEMPLATE_NAME = "chat_template.jinja"
_CONFIG_NAME = "tokenizer_config.json"
_MAX_BYTES = 4 << 20


def choose_chat_template(
    recipe: Recipe, inputs: Inputs, storage: Storage, warnings: list[str]
) -> str | None:
    """The text of the output's template; None if it comes with the tokenizer's files.

    Args:
        recipe: A checked recipe.
        inputs: Its checkpoints.
        storage: Where they are.
        warnings: That there is no template to choose is told here.

    Raises:
        CheckpointError: A ``tokenizer_config.json`` is damaged.
        StorageError: A file cannot be read.
    """
    wanted = recipe.chat_template
    if wanted != AUTO:
        return None if wanted is None else TEMPLATES.get(wanted, wanted)
    found = [_own_template(index, storage) for index in inputs.all_indexes]
    counts = Counter(template for template in found if template)
    if not counts:
        warnings.append("No model has a chat template; 'chat_template: auto' has no effect.")
        return None
    return max(counts, key=counts.__getitem__)  # of equally many, that of the first model


def is_chat_template(name: str) -> bool:
    """Whether a companion holds chat templates."""
    return name.startswith(("chat_template.", "additional_chat_templates/"))


def _own_template(index: CheckpointIndex, storage: Storage) -> str:
    """A model's default template; ``""`` if it has none."""
    if TEMPLATE_NAME in index.companions:
        return _read(index, TEMPLATE_NAME, storage).decode("utf-8", "replace").strip()
    if _CONFIG_NAME not in index.companions:
        return ""
    data = _read(index, _CONFIG_NAME, storage)
    template = parse_config(data, f"{index.uri}/{_CONFIG_NAME}").get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if isinstance(template, str) else ""


def _read(index: CheckpointIndex, name: str, storage: Storage) -> bytes:
    uri = f"{index.uri}/{name}"
    return storage.read_bytes(uri, limit=_MAX_BYTES, version=index.companions[name])
