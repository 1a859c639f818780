"""Parts of models with several: which tensors a recipe's ``modules`` mean.

Names are mergekit's: ``text_decoder``, ``vision_tower``, ``multi_modal_projector`` of models that
see, ``encoder``, ``decoder`` and ``shared`` of those with an encoder, ``default`` of all others;
or what stands before the numbers of layers, one module for each such stack, and ``default`` for the
rest. They are told from names of tensors, as roles are: there is no table of architectures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.checkpoint.index import CheckpointIndex
from merging.errors import Fault, RecipeError
from merging.plan.wording import shorten_list
from merging.recipe.document import escape_pointer

_PROJECTOR = re.compile(r"projector|connector|merger|aligner|^embed_(vision|audio)$")
_VISION = re.compile(r"vision|visual|image")
_AUDIO = re.compile(r"audio|speech")
_CODERS = ("encoder", "decoder")
_LAYER = re.compile(r"\.\d+\.")
_VISION_NAMES = ("vision_tower", "vision_model")
"""What different models call the same part."""

_Rule = Callable[[str], str]


@dataclass(slots=True)
class ModuleSplit:
    """Checkpoints by module.

    Attributes:
        names: Of the modules that the recipe lists.
        rule: The module of a tensor, by its name.
    """

    names: Sequence[str]
    rule: _Rule
    _views: dict[tuple[str, str], CheckpointIndex] = dataclasses.field(default_factory=dict)

    def part(self, index: CheckpointIndex, module: str) -> CheckpointIndex:
        """A checkpoint's tensors of a module; ``""`` is all that the recipe does not list."""
        key = (index.uri, module)
        if key not in self._views:
            tensors = {
                name: entry
                for name, entry in index.tensors.items()
                if (own := self.rule(name)) == module or (not module and own not in self.names)
            }
            self._views[key] = dataclasses.replace(index, tensors=tensors)
        return self._views[key]


def split_modules(donor: CheckpointIndex, names: Sequence[str]) -> ModuleSplit:
    """How a recipe's modules divide its models.

    Args:
        donor: Whose tensors the output has.
        names: Of the recipe's modules.

    Raises:
        RecipeError: ``incompatible_options``: the model has no such parts.
    """
    known = []
    for rule in (_by_purpose(donor, names), _by_stack(donor)):
        found = list(dict.fromkeys(map(rule, donor.tensors)))
        if set(names) <= set(found):
            return ModuleSplit(names, rule)
        known.append(shorten_list(found))
    faults = []
    for name in names:
        detail = (
            f"{donor.uri} has no module {name!r}. By what parts are for it has {known[0]}; by"
            f" stacks of layers {known[1]}."
        )
        faults.append(Fault(f"/modules/{escape_pointer(name)}", "incompatible_options", detail))
    raise RecipeError(faults[0].detail, code="incompatible_options", faults=faults)


def _by_purpose(donor: CheckpointIndex, names: Sequence[str]) -> _Rule:
    """What the parts of a model are for."""
    vision = next((name for name in _VISION_NAMES if name in names), _VISION_NAMES[0])

    def of_senses(name: str) -> str:
        path = name.split(".")
        if any(map(_PROJECTOR.search, path)):
            return "multi_modal_projector"
        if any(map(_VISION.search, path)):
            return vision
        return "audio_tower" if any(map(_AUDIO.search, path)) else "text_decoder"

    def of_coders(name: str) -> str:
        first = [part for part in name.split(".")[:2] if part in _CODERS]
        return first[0] if first else "shared"

    if {*map(of_senses, donor.tensors)} & {vision, "audio_tower"}:
        return of_senses
    if {*map(of_coders, donor.tensors)}.issuperset(_CODERS):
        return of_coders
    return lambda _: "default"


def _by_stack(donor: CheckpointIndex) -> _Rule:
    """What stands before the numbers of layers."""
    found = [name[: match.start()] for name in donor.tensors if (match := _LAYER.search(name))]
    stacks = list(dict.fromkeys(found))

    def stack_of(name: str) -> str:
        if match := _LAYER.search(name):
            return name[: match.start()]
        return next((stack for stack in stacks if name.startswith(stack)), "default")

    return stack_of if len(stacks) > 1 else lambda _: "default"
