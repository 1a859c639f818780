"""The plan: a whole merge as data, made from headers alone, serialisable and deterministic.

Everything that the bytes of the output depend on is fixed here: sources and their versions,
resolved parameters, row blocks, accumulation order, thread count. A worker receives one
:class:`ShardWork` and needs nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from merging.checkpoint.vocabulary import AddedToken
from merging.plan.outputs import Companion, Input, Totals, Variant

PLAN_FORMAT = 4
"""Version of the serialised form; a worker refuses a plan of another one."""

WORKSPACE = ".mergeyard"
"""Folder under the output that holds a merge in progress; removed when it is published."""

Kind = Literal["weights", "masks", "intermediate"]
"""What a shard's file is; see :class:`Shard`."""

COPY = "copy"
"""Pseudo-method of a tensor that is taken over from one source (its base), cast if need be."""

STATISTICS = "statistics"
"""Pseudo-method of what is measured in an expert (:mod:`merging.plan.statistics`)."""

ALIGN = "align"
"""Pseudo-method of rows in another order, that of the output's tokens
(:mod:`merging.plan.alignment`)."""


class SourceFile(msgspec.Struct, frozen=True, array_like=True):
    """A file to read from, pinned to the version that was seen at planning.

    ``shard`` is the shard that makes the file while the plan runs: its address and version are
    filled in once that is done (:meth:`Plan.work`). None for a file of an input. ``variant`` says
    which of that shard's files it is, if there is one for each variant.
    """

    uri: str
    size: int
    version: str
    shard: int | None = None
    variant: int = 0


class Source(msgspec.Struct, frozen=True, array_like=True):
    """One input tensor: ``file`` indexes the plan's files, offsets are absolute in that file.

    ``name`` is its name there where it is another one than the output tensor's (of a layer that
    has another number).
    """

    file: int
    start: int
    end: int
    dtype: str
    name: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return self.end - self.start


class Parts(msgspec.Struct, frozen=True, array_like=True):
    """What an expert's tensor is put together from.

    It starts as a stored tensor, or as the base; an adapter adds ``scaling · up @ down``.

    Attributes:
        is_stored: A tensor is read for it; else it starts as the base, without a read of its own.
        rank: Of the adapter, whose two factors are read after that; 0 if there is none.
        scaling: Of the adapter.
        flipped: The factors are those of the transposed tensor: the first one read is
            rank×rows of the stored tensor, the second columns×rank. Otherwise the first is
            rank×columns and the second rows×rank.
    """

    is_stored: bool = True
    rank: int = 0
    scaling: float = 1.0
    flipped: bool = False


class Setting(msgspec.Struct, frozen=True):
    """A method with resolved parameters, shared by all problems that use the same ones.

    Attributes:
        method: Its name.
        parameters: Of the merge.
        expert_parameters: Of each expert.
        step: The part of a method that works in several passes (:meth:`MergeMethod.step`).
        others: In a sweep, what its other variants do with the same problems, in order; empty where
            all do the same.
    """

    method: str
    parameters: dict[str, Any] = {}
    expert_parameters: tuple[dict[str, Any], ...] = ()
    step: str = ""
    others: tuple[Setting, ...] = ()

    def of_variant(self, number: int) -> Setting:
        """What one variant does."""
        if number and self.others:
            return self.others[number - 1]
        return msgspec.structs.replace(self, others=())


class Problem(msgspec.Struct, frozen=True):
    """One tensor to be produced.

    Attributes:
        tensor_name: Its name in the output.
        shape: Its shape.
        dtype: safetensors dtype of the output tensor.
        setting: Index into the plan's settings.
        base: The base tensor; None if the method uses none.
        experts: What is read for the experts, in recipe order.
        row_block: Rows solved at a time (multiple of 64); 0 means all.
        transposed: Stored in×out (GPT-2's Conv1D).
        flops: Estimated operations.
        host_bytes: Host memory held at once while it is worked on, input buffers included.
        device_bytes: Device memory likewise.
        role: Role of the tensor (``attention.q``, ``mlp.up``, ``norm``, ``embedding`` …).
        layer: Its layer number, or -1 outside the layers.
        source_shape: Shape of the inputs where it is another one.
        given: Small results of earlier shards, read once for the shard.
        num_given_apart: In a sweep, how many variants are given results of their own: those of one
            stand after another's. 0 if what is given is for all.
        has_own_experts: Each variant gets one of the experts, its own; they are in its order.
        parts: What makes each expert, in recipe order; empty if each is one stored tensor.
        sees_base: The method gets the base; otherwise only experts are made of it.
    """

    tensor_name: str
    shape: tuple[int, ...]
    dtype: str
    setting: int
    base: Source | None
    experts: tuple[Source, ...]
    row_block: int = 0
    transposed: bool = False
    flops: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0
    role: str = "other"
    layer: int = -1
    source_shape: tuple[int, ...] | None = None
    given: tuple[Source, ...] = ()
    parts: tuple[Parts, ...] = ()
    sees_base: bool = False
    num_given_apart: int = 0
    has_own_experts: bool = False

    def given_to(self, variant: int) -> tuple[Source, ...]:
        """What a variant is given."""
        if not self.num_given_apart:
            return self.given
        count = len(self.given) // self.num_given_apart
        return self.given[variant * count : (variant + 1) * count]

    @property
    def num_entries(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the inputs."""
        return self.shape if self.source_shape is None else self.source_shape

    @property
    def sources(self) -> tuple[Source, ...]:
        """Base first if there is one, then experts in order."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def factor_positions(self) -> frozenset[int]:
        """Positions among :attr:`sources` of adapters' factors."""
        found: list[int] = []
        position = 1 if self.base else 0
        for part in self.parts:
            position += part.is_stored
            if part.rank:
                found += (position, position + 1)
                position += 2
        return frozenset(found)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self.parts) or len(self.experts)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the experts if all are adapters of the base; else empty."""
        if any(part.is_stored for part in self.parts):
            return ()
        return tuple(part.rank for part in self.parts)

    @property
    def num_made(self) -> int:
        """How many of the experts are not simply one stored tensor."""
        return sum(part != Parts() for part in self.parts)

    @property
    def expanded_bytes(self) -> int:
        """Bytes of all tensors that go in; those that are made are float32."""
        factors = self.factor_positions
        stored = [s.num_bytes for n, s in enumerate(self.sources) if n not in factors]
        entries = math.prod(self.input_shape)
        return sum(stored) + 4 * entries * self.num_made

    @property
    def bytes_read(self) -> int:
        """Bytes of all its sources."""
        return sum(source.num_bytes for source in self.sources)


class Shard(msgspec.Struct, frozen=True):
    """One file: its problems in the order of the file, and the file's exact size.

    A file of ``weights`` is part of the output; later shards may read it too. One of ``masks`` is
    published beside these (:mod:`merging.task_masks`), and not in the checkpoint's index. An
    ``intermediate`` one lies in the plan's workspace, is read by later shards, and goes when the
    output is published; its tensors are named after the output tensors that they are for.

    Every variant of a sweep has a file of weights of the same name and size: the shard is all of
    them. An intermediate one is a file for each variant if they do not do the same.

    ``folder`` is where an intermediate file lies that other merges use too (:mod:`merging.kept`).
    """

    index: int
    file_name: str
    size: int
    problems: tuple[Problem, ...]
    kind: Kind = "weights"
    num_files: int = 1
    folder: str = ""

    @property
    def is_output(self) -> bool:
        """The file is published: part of the merged checkpoint, or beside it."""
        return self.kind != "intermediate"

    @property
    def bytes_read(self) -> int:
        """Bytes read for it."""
        given = {source for problem in self.problems for source in problem.given}
        return sum(item.bytes_read for item in self.problems) + sum(s.num_bytes for s in given)

    @property
    def bytes_written(self) -> int:
        """Bytes of its files."""
        return self.size * self.num_files

    @property
    def flops(self) -> float:
        """Estimated operations."""
        return sum(problem.flops for problem in self.problems)


class ShardWork(msgspec.Struct, frozen=True):
    """All that a worker needs to produce one shard; small, versioned, without tensors.

    ``files`` and ``settings`` are the plan's tables cut down to what the shard refers to.
    """

    format: int
    plan_digest: str
    output_uri: str
    shard: Shard
    files: tuple[SourceFile, ...]
    settings: tuple[Setting, ...]
    seed: int
    threads: int
    memory_budget: int
    check_finite: bool
    variants: tuple[str, ...] = ()

    @property
    def file_uris(self) -> tuple[str, ...]:
        """Where the shard's files go, in the order of the variants."""
        return file_uris(self.output_uri, self.plan_digest, self.shard, self.variants)


class Plan(msgspec.Struct, frozen=True):
    """A whole merge.

    Attributes:
        format: :data:`PLAN_FORMAT`.
        recipe: The normalised recipe.
        recipe_digest: ``sha256:…`` of it.
        method: Name of the recipe's method: of several documents, that of the published one.
        output_uri: Where the merged checkpoint goes.
        overwrite: A checkpoint already there may be replaced.
        seed: For random methods.
        threads: Torch threads of every shard: part of what the bytes depend on.
        memory_budget: Host bytes a worker may use for tensors.
        check_finite: NaN or infinity in an input fails the job.
        inputs: Base and experts.
        files: Weight files that are read.
        settings: Methods with parameters.
        shards: In an order in which they can be worked on; the output files in their own order.
        config: The output's ``config.json``.
        companions: Files to be copied.
        warnings: What the user should know before running it.
        totals: Sums.
        device_memory_budget: GPU bytes likewise: the plan is for workers that have them; None: any.
        variants: Of a sweep, each with a checkpoint of its own under the output; recipe and method
            are the whole sweep's.
        chat_template: Text of the output's; None if it is among the companions.
        adapter_config: ``adapter_config.json`` if the output is an adapter.
        added_tokens: Tokens that the output's tokenizer has beside those in its companions.
    """

    format: int
    recipe: dict[str, Any]
    recipe_digest: str
    method: str
    output_uri: str
    overwrite: bool
    seed: int
    threads: int
    memory_budget: int
    check_finite: bool
    inputs: tuple[Input, ...]
    files: tuple[SourceFile, ...]
    settings: tuple[Setting, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    companions: tuple[Companion, ...]
    warnings: tuple[str, ...]
    totals: Totals
    device_memory_budget: int | None = None
    variants: tuple[Variant, ...] = ()
    chat_template: str | None = None
    added_tokens: tuple[AddedToken, ...] = ()
    adapter_config: dict[str, Any] | None = None

    @property
    def variant_names(self) -> tuple[str, ...]:
        """Names of the variants; empty unless it is a sweep."""
        return tuple(variant.name for variant in self.variants)

    @property
    def checkpoint_uris(self) -> tuple[str, ...]:
        """Where merged checkpoints appear: the output, or a folder in it for each variant."""
        return checkpoint_uris(self.output_uri, self.variant_names)

    def merges(self) -> tuple[Plan, ...]:
        """The plan of each variant as of a merge by itself, for what comes after the shards.

        Costs stay those of all together. A plan without variants is its own only merge.
        """
        if not self.variants:
            return (self,)
        shards = tuple(msgspec.structs.replace(shard, num_files=1) for shard in self.shards)
        return tuple(
            msgspec.structs.replace(
                self,
                recipe=variant.recipe,
                recipe_digest=variant.recipe_digest,
                method=variant.method,
                output_uri=self.checkpoint_uris[number],
                settings=tuple(setting.of_variant(number) for setting in self.settings),
                shards=shards,
                variants=(),
            )
            for number, variant in enumerate(self.variants)
        )

    def to_json(self) -> bytes:
        """Canonical JSON: the same plan gives the same bytes."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def from_json(cls, data: bytes | str) -> Plan:
        """Inverse of :meth:`to_json`; raises ``msgspec.ValidationError`` on anything else."""
        return msgspec.json.decode(data, type=cls)

    @property
    def digest(self) -> str:
        """``sha256:…`` of the canonical JSON."""
        return "sha256:" + hashlib.sha256(self.to_json()).hexdigest()

    @property
    def outputs(self) -> tuple[Shard, ...]:
        """The shards whose files are published."""
        return tuple(shard for shard in self.shards if shard.is_output)

    @property
    def weights(self) -> tuple[Shard, ...]:
        """Those of them that the checkpoint's index names."""
        return tuple(shard for shard in self.shards if shard.kind == "weights")

    def work(
        self,
        shard_index: int,
        plan_digest: str,
        versions: Mapping[int, Sequence[str]] | None = None,
    ) -> ShardWork:
        """The message for one shard.

        Args:
            shard_index: Which.
            plan_digest: :attr:`digest`, computed once.
            versions: Of all files of each shard that it needs (:mod:`merging.plan.stages`).
        """
        shard = self.shards[shard_index]
        file_map: dict[int, int] = {}
        setting_map: dict[int, int] = {}

        def move(source: Source) -> Source:
            new = file_map.setdefault(source.file, len(file_map))
            return msgspec.structs.replace(source, file=new)

        problems = tuple(
            msgspec.structs.replace(
                problem,
                base=move(problem.base) if problem.base else None,
                experts=tuple(move(expert) for expert in problem.experts),
                given=tuple(move(source) for source in problem.given),
                setting=setting_map.setdefault(problem.setting, len(setting_map)),
            )
            for problem in shard.problems
        )
        return ShardWork(
            format=self.format,
            plan_digest=plan_digest,
            output_uri=self.output_uri,
            shard=msgspec.structs.replace(shard, problems=problems),
            files=tuple(self._pin(self.files[old], plan_digest, versions) for old in file_map),
            settings=tuple(self.settings[old] for old in setting_map),
            seed=self.seed,
            threads=self.threads,
            memory_budget=self.memory_budget,
            check_finite=self.check_finite,
            variants=self.variant_names,
        )

    def _pin(
        self, file: SourceFile, plan_digest: str, versions: Mapping[int, Sequence[str]] | None
    ) -> SourceFile:
        """The file as it can be read."""
        if file.shard is None:
            return file
        assert versions is not None, "a shard is worked on after those that it needs"
        shard = self.shards[file.shard]
        uri = file_uris(self.output_uri, plan_digest, shard, self.variant_names)[file.variant]
        version = versions[file.shard][file.variant]
        return msgspec.structs.replace(file, uri=uri, version=version)


def workspace_uri(output_uri: str, plan_digest: str) -> str:
    """Folder for receipts and intermediate files of one plan under its output."""
    return f"{output_uri}/{WORKSPACE}/{plan_digest.removeprefix('sha256:')[:16]}"


def checkpoint_uris(output_uri: str, variants: Sequence[str]) -> tuple[str, ...]:
    """Addresses of the checkpoints at an output."""
    return tuple(f"{output_uri}/{name}" for name in variants) or (output_uri,)


def file_uris(
    output_uri: str, plan_digest: str, shard: Shard, variants: Sequence[str]
) -> tuple[str, ...]:
    """Addresses of a shard's files, in the order of the variants."""
    if shard.is_output:
        outputs = checkpoint_uris(output_uri, variants)
        return tuple(file_uri(output, plan_digest, shard) for output in outputs)
    if shard.num_files == 1:
        return (file_uri(output_uri, plan_digest, shard),)
    workspace = workspace_uri(output_uri, plan_digest)
    return tuple(f"{workspace}/{name}/{shard.file_name}" for name in variants)


def file_uri(output_uri: str, plan_digest: str, shard: Shard) -> str:
    """Address of a shard's file."""
    workspace = shard.folder or workspace_uri(output_uri, plan_digest)
    folder = output_uri if shard.is_output else workspace
    return f"{folder}/{shard.file_name}"
