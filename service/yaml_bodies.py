"""Request bodies in YAML, for people who write recipes by hand: read as the same JSON document."""

from __future__ import annotations

import json
import re

from merging.errors import Fault, RecipeError
from merging.recipe.document import load_document
from service.problems import RequestError

YAML_TYPE = re.compile(r"(application|text)/(x-)?yaml\s*(;.*)?", re.IGNORECASE)


def yaml_to_json(body: bytes) -> bytes:
    """The body as JSON; bounded like a recipe (size, depth, aliases, no tags).

    Raises:
        RequestError: ``malformed_request``.
    """
    faults: list[Fault] = []
    try:
        document = load_document(body, faults)
    except RecipeError as error:
        raise RequestError(f"The body cannot be read: {error.detail}") from None
    if faults:
        raise RequestError(f"The body cannot be read: {faults[0].pointer}: {faults[0].detail}")
    return json.dumps(document).encode()
