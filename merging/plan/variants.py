"""The variants of a sweep while it is planned: one table of settings out of many, one layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from merging.errors import Fault
from merging.method import MergeMethod, get_method
from merging.parameters import Parameters
from merging.plan.outputs import Variant
from merging.plan.plan import COPY, Setting
from merging.plan.settings import SettingTable
from merging.plan.wording import SHOWN, shorten_list
from merging.recipe import Recipe
from merging.recipe.parse import recipe_error

_Parts = tuple[tuple[int, int], ...]
"""Variants, and the numbers of settings in their own tables."""


class PlannedVariant(NamedTuple):
    """A recipe to be planned with others; ``name`` and ``pointer`` are empty if it is the only one.

    Attributes:
        name: Of the variant.
        pointer: Its place in the recipe.
        recipe: As of a merge by itself.
        method: Its method.
    """

    name: str
    pointer: str
    recipe: Recipe
    method: MergeMethod


def planned_variants(recipe: Recipe) -> list[PlannedVariant]:
    """The variants of a recipe, or the recipe itself."""
    if recipe.sweep is None:
        return [PlannedVariant("", "", recipe, get_method(recipe.merge_method))]
    return [
        PlannedVariant(v.name, f"/sweep/{number}", v.recipe, get_method(v.recipe.merge_method))
        for number, v in enumerate(recipe.sweep.variants)
    ]


def describe_variants(recipe: Recipe) -> tuple[Variant, ...]:
    """The variants as the plan keeps them."""
    return tuple(
        Variant(v.name, v.recipe.normalised(), v.recipe.digest, v.recipe.merge_method)
        for v in (recipe.sweep.variants if recipe.sweep else ())
    )


class AppliedVariant(NamedTuple):
    """What a variant does with a problem.

    Attributes:
        number: Of the variant.
        setting: As of a merge by itself.
        method: None is a copy.
        parameters: Those of the recipe.
    """

    number: int
    setting: Setting
    method: MergeMethod | None
    parameters: Any


class Layout(NamedTuple):
    """What decides which sources a tensor has.

    Attributes:
        touched: Whether each tensor is merged.
        rest_is_mean: Others become the experts' mean, not the base.
    """

    touched: list[bool]
    rest_is_mean: bool


def shared_layout(
    variants: Sequence[PlannedVariant],
    layout: Callable[[PlannedVariant], Layout],
    names: Sequence[str],
) -> Layout:
    """The layout of all variants, which share sources and files.

    Args:
        variants: At least one.
        layout: That of a variant.
        names: Of the tensors.

    Raises:
        RecipeError: ``incompatible_options``, with faults for each variant that differs.
    """
    first = layout(variants[0])
    faults = []
    for variant in variants[1:]:
        own = layout(variant)
        pairs = zip(names, first.touched, own.touched, strict=True)
        both = f"The variants {variants[0].name!r} and {variant.name!r}"
        reasons = []
        if other := [name for name, ours, theirs in pairs if ours != theirs]:
            reasons.append(
                f"{both} do not merge the same tensors: {shorten_list(other)}. Give the recipe a"
                " 'touch' that holds for both, or submit them as two merges."
            )
        if own.rest_is_mean != first.rest_is_mean:
            reasons.append(
                f"{both} do not make the same of tensors that they do not merge. Give the recipe a"
                " 'rest' that holds for both, or submit them as two merges."
            )
        faults += [Fault(variant.pointer, "incompatible_options", reason) for reason in reasons]
    if faults:
        raise recipe_error(faults)
    return first


class VariantSettings:
    """The settings of all variants, together: equal combinations share one.

    Args:
        variants: At least one.
        entries: The experts' places among the models of each section of the recipe.
    """

    def __init__(
        self, variants: Sequence[PlannedVariant], entries: Sequence[Sequence[int]]
    ) -> None:
        self.settings: list[Setting] = []
        self._variants = variants
        self._tables = [SettingTable(v.recipe, v.method, entries) for v in variants]
        self._numbers: dict[_Parts, int] = {}
        self._parts: list[_Parts] = []

    @property
    def num_variants(self) -> int:
        """How many there are; 1 if it is no sweep."""
        return len(self._variants)

    @property
    def filters(self) -> list[str]:
        """All name filters."""
        return [name for table in self._tables for name in table.filters]

    def parameters(self, setting: int) -> Parameters | None:
        """The validated parameters of a setting, in its first variant; None of a copy."""
        variant, number = self._parts[setting][0]
        return self._tables[variant].parameters(number)

    def methods(self, setting: int) -> list[tuple[MergeMethod | None, Any]]:
        """Methods (None is a copy) with parameters, each different one once."""
        different: list[AppliedVariant] = []
        for variant in self.variants(setting):
            if all(variant.setting != other.setting for other in different):
                different.append(variant)
        return [(variant.method, variant.parameters) for variant in different]

    def variants(self, setting: int) -> list[AppliedVariant]:
        """What each variant does."""
        found = []
        for variant, number in self._parts[setting]:
            table = self._tables[variant]
            own = table.settings[number]
            method = None if own.method == COPY else get_method(own.method)
            found.append(AppliedVariant(variant, own, method, table.parameters(number)))
        return found

    def only(self, setting: int, variant: int) -> int:
        """The setting of what one variant does by itself."""
        return self._join([part for part in self._parts[setting] if part[0] == variant])

    def fault(self, variant: int, detail: str) -> Fault:
        """Of options that do not go together, told of a variant."""
        return Fault(self._variants[variant].pointer, "incompatible_options", detail)

    def name(self, variant: int) -> str:
        """A variant as messages name it, with its method."""
        found = self._variants[variant]
        return f"{found.name!r} ({found.method.name})"

    def copy(self) -> int:
        """The setting of tensors that are taken over."""
        return self._join(enumerate(table.copy() for table in self._tables))

    def mean(self, section: int) -> int:
        """The setting of tensors that become the mean of a section's experts."""
        return self._join(enumerate(table.mean(section) for table in self._tables))

    def merge(
        self, tensor_name: str, position: float, section: int, source_names: Sequence[str]
    ) -> int:
        """The setting of a tensor that is merged; see :meth:`SettingTable.merge`."""
        return self._join(
            enumerate(t.merge(tensor_name, position, section, source_names) for t in self._tables)
        )

    def step(self, setting: int, name: str, without: Container[str] = ()) -> int:
        """The setting of a step of a method that takes several passes; see
        :meth:`SettingTable.step`.
        """
        return self._join(
            (variant, self._tables[variant].step(number, name, without))
            for variant, number in self._parts[setting]
        )

    def add(self, setting: Setting) -> int:
        """A setting of work that comes before the merging of tensors."""
        self.settings.append(setting)
        self._parts.append(())
        return len(self.settings) - 1

    def refuse_passes(self, *, has_sections: bool) -> None:
        """Refuse methods that look at more than variants, or sections, can share.

        The variants of a sweep share what is measured on samples, and every pass over the inputs;
        slices and modules have experts of their own.

        Args:
            has_sections: The recipe has several slices or modules.

        Raises:
            RecipeError: ``incompatible_options``, with a fault for each such variant.
        """
        faults = []
        first = self._variants[0]
        for number, (variant, table) in enumerate(zip(self._variants, self._tables, strict=True)):
            method = variant.method
            if method.calibrated.keys() != first.method.calibrated.keys():
                detail = (
                    f"{method.name} and {first.method.name} do not look at the same of what"
                    " goes through the experts, which variants share. Submit them as two merges."
                )
                faults.append(self.fault(number, detail))
            elif variant.name and (method.sequential or method.task_masks):
                what = (
                    "runs the merged model, block after block"
                    if method.sequential
                    else "publishes masks beside its one checkpoint"
                )
                detail = f"{self.name(number)} {what}, which variants cannot share. Submit it as a"
                faults.append(self.fault(number, f"{detail} merge by itself."))
            elif has_sections and any(
                map(_is_of_the_whole, table.settings, map(table.parameters, itertools.count()))
            ):
                detail = (
                    f"{method.name} with these parameters looks at all tensors of each"
                    " expert together, and slices and modules have experts of their own. Use"
                    " another scope."
                )
                faults.append(self.fault(number, detail))
        if faults:
            raise recipe_error(faults)

    def raise_faults(self) -> None:
        """Raise :class:`RecipeError` if the parameters of a tensor do not go together."""
        faults = [
            fault
            for variant, table in zip(self._variants, self._tables, strict=True)
            for fault in table.faults(variant.pointer or "/parameters")
        ]
        if faults:
            raise recipe_error(faults[:SHOWN])

    def _join(self, numbers: Iterable[tuple[int, int]]) -> int:
        """The setting in which variants have one of their own tables each."""
        parts = tuple(numbers)
        if parts not in self._numbers:
            first, *others = (self._tables[variant].settings[n] for variant, n in parts)
            differ = any(other != first for other in others)
            self._numbers[parts] = len(self.settings)
            self._parts.append(parts)
            self.settings.append(
                msgspec.structs.replace(first, others=tuple(others) if differ else ())
            )
        return self._numbers[parts]


def takes_passes(setting: Setting, parameters: Parameters | None) -> bool:
    """Whether a setting's tensors are merged in several passes over the model."""
    return getattr(parameters, "svc", None) is not None or _is_of_the_whole(setting, parameters)


def _is_of_the_whole(setting: Setting, parameters: Parameters | None) -> bool:
    """Whether a setting's tensors are merged with the help of others, which have its experts."""
    if setting.method == COPY:
        return False
    method = get_method(setting.method)
    if method.staged is None or method.task_masks:
        return method.sequential or bool(method.task_masks)
    experts = [method.expert_parameters.model_validate(e) for e in setting.expert_parameters]
    return method.staged.group(parameters, experts) is not None
