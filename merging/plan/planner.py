"""From a recipe to a plan: everything is checked and fixed here, from headers alone.

What the output's tensors are stored as: ``out_dtype`` of the recipe, else ``dtype``, else the type
that the inputs of each tensor have in common (the wider one where they differ; F8 is read only and
becomes BF16). Arithmetic is in float32 whatever the recipe says. Tensors that are not floats are
taken over from the base model, or from the first expert where there is none; so are
``config.json``, with the type updated, and the tokenizer's files.
"""

from __future__ import annotations

import hashlib

import msgspec

from merging.checkpoint.index import CheckpointIndex, checkpoint_digest
from merging.errors import PlanError
from merging.options import MergeOptions
from merging.plan.adapter_output import (
    adapter_output,
    adapter_shard,
    check_adapter_output,
    refuse_adapter_output,
)
from merging.plan.alignment import align, with_output_rows
from merging.plan.calibrating import calibrate_after
from merging.plan.chat_template import choose_chat_template, is_chat_template
from merging.plan.cost import Budgets
from merging.plan.dividing import divide_large
from merging.plan.documents import plan_documents
from merging.plan.fit import check_fit
from merging.plan.inputs import Expert, Inputs
from merging.plan.intermediate import Intermediates
from merging.plan.masks import check_masks, mask_problems, mask_shards
from merging.plan.output_config import output_config
from merging.plan.outputs import Input
from merging.plan.packing import number_files, pack
from merging.plan.plan import (
    PLAN_FORMAT,
    WORKSPACE,
    Plan,
    checkpoint_uris,
)
from merging.plan.problems import ProblemBuilder
from merging.plan.reading import read_inputs
from merging.plan.stages import sum_up, without_idle_shards
from merging.plan.staging import Staging
from merging.plan.statistics import add_statistics
from merging.plan.tensors import check_tensors, unmatched_filters
from merging.plan.tokenizer import plan_tokenizer
from merging.plan.variants import describe_variants
from merging.plan.warnings import warn_of_inputs, warn_of_problems
from merging.plan.wording import shorten_list
from merging.recipe import Recipe
from merging.storage.base import Storage

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"


def make_plan(recipe: Recipe, storage: Storage, options: MergeOptions, output_uri: str) -> Plan:
    """Plan a merge. Reads listings, configs and headers of the inputs; never weights.

    Args:
        recipe: A checked recipe.
        storage: Where inputs are and the output goes.
        options: How to run it.
        output_uri: Folder of the merged checkpoint.

    Returns:
        The plan; the same arguments and inputs give the same plan, byte for byte.

    Raises:
        RecipeError: The recipe does not suit the models.
        CheckpointError: Models are damaged or do not fit together, with a fault for each reason.
        PlanError: ``output_exists``, ``nothing_to_do`` or ``does_not_fit``.
        StorageError: Something cannot be read.
    """
    if recipe.documents:
        refuse_adapter_output(options)
        return plan_documents(recipe, storage, options, output_uri, make_plan)
    output_uri = storage.normalise(output_uri)
    warnings = list(recipe.warnings)
    variants = describe_variants(recipe)
    if not options.overwrite:
        for uri in checkpoint_uris(output_uri, [variant.name for variant in variants]):
            check_output_free(storage, uri)
    stored = read_inputs(recipe, storage, output_uri)
    tokenizer = plan_tokenizer(recipe, stored, storage, warnings)
    vocabulary = tokenizer.vocabulary
    inputs = with_output_rows(stored, vocabulary) if vocabulary else stored
    tensors = check_tensors(inputs, warnings)
    companions = tokenizer.companions
    chat_template = choose_chat_template(recipe, inputs, storage, warnings)
    if chat_template is not None:
        companions = tuple(c for c in companions if not is_chat_template(c.file_name))
    budgets = Budgets(options.memory_budget, options.device_memory_budget)
    builder = ProblemBuilder(recipe, inputs, budgets)
    stages = Intermediates(
        builder.settings,
        builder.files,
        budgets,
        max_shard_size=options.max_shard_size,
        output_uri=output_uri,
    )
    if vocabulary is not None:
        builder.vocabulary = vocabulary
        builder.aligned = align(stored, vocabulary, builder, stages, warnings)
    problems = builder.build(tensors)
    as_adapter = None
    if options.adapter_rank is not None:
        check_adapter_output(recipe, inputs, has_own_tokens=vocabulary is not None)
        as_adapter = adapter_output(problems, stages, builder, inputs, options.adapter_rank)
        problems = as_adapter.problems
    if variants or len(inputs.slices) > 1:
        builder.settings.refuse_passes(has_sections=len(inputs.slices) > 1)
    check_masks(recipe, problems, stages, has_own_tokens=vocabulary is not None)
    masks = mask_problems(problems, stages)
    problems = add_statistics(problems, stages, builder, stored, recipe, options, storage, warnings)
    merged = Staging(stages).stage(problems)
    if not variants:
        merged = divide_large(merged, stages, options.workers or 1, warnings)
    problems = calibrate_after(problems, merged, stages)
    rest = stages.unwritten(problems)
    check_fit([*stages.problems, *rest, *masks], builder.settings.settings, budgets)
    if as_adapter is not None:
        shards = (*stages.shards, adapter_shard(rest, len(stages.shards)))
    else:
        outputs = pack(rest, options.max_shard_size, first_index=len(stages.shards))
        outputs = tuple(
            msgspec.structs.replace(shard, num_files=max(1, len(variants))) for shard in outputs
        )
        first = len(stages.shards) + len(outputs)
        beside = mask_shards(masks, options.max_shard_size, first_index=first)
        shards = number_files([*stages.shards, *outputs, *beside])
    described = _inputs(inputs)
    config = {} if as_adapter else output_config(inputs, problems, warnings)
    settings = builder.settings.settings
    warnings += warn_of_inputs(recipe, inputs, described)
    warnings += warn_of_problems(problems, settings, inputs.method, options)
    warnings += [
        f"The filter {name!r} is part of no tensor's name and has no effect."
        for name in unmatched_filters(builder.settings.filters, _names(inputs))
    ]
    plan = Plan(
        format=PLAN_FORMAT,
        recipe=recipe.normalised(),
        recipe_digest=recipe.digest,
        method=recipe.merge_method,
        output_uri=output_uri,
        overwrite=options.overwrite,
        seed=options.seed,
        threads=options.threads,
        memory_budget=options.memory_budget,
        check_finite=options.check_finite,
        inputs=described,
        files=tuple(builder.files),
        settings=tuple(settings),
        shards=shards,
        config=tokenizer.adapt_config(config) if config else {},
        companions=companions,
        warnings=tuple(warnings),
        totals=sum_up(shards, storage, output_uri),
        device_memory_budget=options.device_memory_budget,
        variants=variants,
        chat_template=chat_template,
        added_tokens=tokenizer.added_tokens,
        adapter_config=as_adapter.config if as_adapter else None,
    )
    return without_idle_shards(plan, storage)


def check_output_free(storage: Storage, output_uri: str) -> None:
    """Refuse an output that holds a checkpoint; shards of an unfinished merge are none.

    Raises:
        PlanError: ``output_exists``.
    """
    names = [item.uri[len(output_uri) + 1 :] for item in storage.list(output_uri)]
    is_unfinished = any(name.startswith(f"{WORKSPACE}/") for name in names)
    found = [
        name
        for name in names
        if name in (INDEX_NAME, SINGLE_NAME, ADAPTER_NAME)
        or (name.endswith(".safetensors") and "/" not in name and not is_unfinished)
    ]
    if found:
        raise PlanError(
            f"{output_uri} already holds a checkpoint ({shorten_list(found)}). Choose another"
            " output, or allow it to be replaced with overwrite.",
            code="output_exists",
            context={"uri": output_uri},
        )


def _inputs(inputs: Inputs) -> tuple[Input, ...]:
    bases = ([inputs.base] if inputs.base else []) + list(inputs.slice_bases)
    return (
        *(Input(base.uri, "base", checkpoint_digest(base.uri, base.files)) for base in bases),
        *(_expert_input(expert, inputs.base) for expert in inputs.experts),
    )


def _names(inputs: Inputs) -> list[str]:
    """Names that filters may mean: of tensors of the output, and of the models."""
    of_output = {name for section in inputs.sections for name in section.donor.tensors}
    return sorted(of_output.union(*(index.tensors for index in inputs.all_indexes)))


def _expert_input(expert: Expert, base: CheckpointIndex | None) -> Input:
    """An expert; one that is an adapter of the base model goes by the adapter's address."""
    digest = checkpoint_digest(expert.index.uri, expert.index.files)
    adapter = expert.adapter
    if adapter is None:
        return Input(expert.index.uri, "expert", digest)
    uri = adapter.uri if expert.index is base else f"{expert.index.uri}+{adapter.uri}"
    both = "\n".join(
        (digest, checkpoint_digest(adapter.uri, adapter.files), adapter.config_version)
    )
    return Input(uri, "expert", f"sha256:{hashlib.sha256(both.encode()).hexdigest()}")
