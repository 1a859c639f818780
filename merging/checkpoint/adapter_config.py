"""``adapter_config.json`` of a PEFT adapter, read as untrusted input.

What changes the merged weights is understood exactly or refused, with the reason; so is an option
that nobody here has heard of, unless it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.checkpoint.documents import parse_config, shorten
from merging.errors import CheckpointError

_WITHOUT_EFFECT = frozenset(
    {
        # about training and loading, or said by the tensors themselves
        "alora_offsets", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
        "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "target_modules", "task_type", "velora_config",
        # read here
        "alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
        "use_rslora",
    }
)  # fmt: skip

_UNSUPPORTED = {
    "use_dora": "it is a DoRA adapter, whose merged weights are no sum of base and update",
    "use_qalora": "it is a QA-LoRA adapter, which acts on pooled inputs",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "lora_bias": "its layers have biases of their own (lora_bias)",
    "layer_replication": "it repeats layers of the base model (layer_replication)",
    "target_parameters": "it adapts parameters that are no layers of their own, as fused experts"
    " are (target_parameters)",
    "trainable_token_indices": "it has tuned single tokens (trainable_token_indices)",
    "megatron_config": "it was trained with Megatron's parallel layers (megatron_config)",
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
    "arrow_config": "it is routed by input (Arrow)",
}

_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's weights alone."""

_MERGE = (
    "Merge it into its base model with peft's merge_and_unload(), save that, and name the new"
    " folder"
)

_MAX_PATTERNS = 10_000
_MAX_PATTERN_LENGTH = 500
_QUANTIFIER = re.compile(r"(?<!\\)[*+{]")
_RISKY = re.compile(r"\)[*+?{]|\\[1-9]|\(\?")
_MAX_QUANTIFIERS = 3

_Pattern = tuple[re.Pattern[str], float]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of an adapter's config its merged weights depend on.

    Attributes:
        base_name: What the config calls its base model; "" if it does not.
        rank: ``r``.
        alpha: ``lora_alpha``.
        is_rank_stabilised: ``use_rslora``: alpha is divided by √r instead of r.
        fan_in_fan_out: The config says that layers are stored in×out.
        rank_patterns: ``rank_pattern``, in order.
        alpha_patterns: ``alpha_pattern``, in order.
        task_type: What the model is for (``CAUSAL_LM``), if it says so.
    """

    base_name: str
    rank: int
    alpha: float
    is_rank_stabilised: bool = False
    fan_in_fan_out: bool = False
    rank_patterns: tuple[_Pattern, ...] = ()
    alpha_patterns: tuple[_Pattern, ...] = ()
    task_type: str | None = None

    def rank_of(self, module: str) -> int:
        """The rank that the config gives to a module, by its name in the model."""
        return int(_first_match(self.rank_patterns, module, self.rank))

    def scaling_of(self, module: str, rank: int) -> float:
        """The factor on a module's product of factors."""
        alpha = _first_match(self.alpha_patterns, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def parse_adapter_config(data: bytes, uri: str) -> AdapterConfig:
    """Read and check the config.

    Raises:
        CheckpointError: ``config_invalid`` or ``adapter_unsupported``, with all that is wrong.
    """
    config = parse_config(data, uri)
    reasons = _unsupported(config)
    if reasons:
        raise CheckpointError(
            f"The adapter of {uri} cannot be merged as it is: {'; '.join(reasons)}. {_MERGE}.",
            code="adapter_unsupported",
            context={"uri": uri},
        )
    name = config.get("base_model_name_or_path")
    return AdapterConfig(
        base_name=name[:200] if isinstance(name, str) else "",
        rank=int(_number(config, "r", 8, uri, lowest=1, whole=True)),
        alpha=_number(config, "lora_alpha", 8, uri),
        is_rank_stabilised=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rank_patterns=_patterns(config, "rank_pattern", uri, lowest=1, whole=True),
        alpha_patterns=_patterns(config, "alpha_pattern", uri),
        task_type=task[:200] if isinstance(task := config.get("task_type"), str) else None,
    )


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"it is of type {shorten(kind)}, and only LORA is supported"]
    reasons = [reason for key, reason in _UNSUPPORTED.items() if config.get(key)]
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in _STARTS):
        reasons.append(
            f"init_lora_weights {shorten(start)} may have changed the base model's weights, so that"
            " it does not belong to the base model as it is stored (peft can convert it, with"
            " path_initial_model_for_weight_conversion)"
        )
    known = _WITHOUT_EFFECT | _UNSUPPORTED.keys()
    strange = [key for key, value in config.items() if value and key not in known]
    if strange:
        reasons.append(f"it uses options that are not known here: {shorten(sorted(strange))}")
    return reasons


def _number(
    config: Mapping[str, Any],
    key: str,
    default: float,
    uri: str,
    *,
    lowest: float = -math.inf,
    whole: bool = False,
) -> float:
    value = config.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or value < lowest
        or (whole and value != int(value))
    ):
        what = f"a whole number from {lowest}" if whole else "a number"
        raise CheckpointError(
            f"{uri} gives {shorten(key)} the value {shorten(value)}; {what} is expected.",
            code="config_invalid",
            context={"uri": uri},
        )
    return float(value)


def _patterns(
    config: Mapping[str, Any], key: str, uri: str, *, lowest: float = -math.inf, whole: bool = False
) -> tuple[_Pattern, ...]:
    """Patterns with their numbers; each fits the end of a module's name, from a dot on."""
    given = config.get(key) or {}
    if not isinstance(given, dict) or len(given) > _MAX_PATTERNS:
        raise CheckpointError(
            f"{uri} gives {key} as {shorten(given)}; an object of at most {_MAX_PATTERNS} patterns"
            " and numbers is expected.",
            code="config_invalid",
            context={"uri": uri},
        )
    found = []
    for pattern in given:
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError):
            compiled = None
        if compiled is None or _is_costly(pattern):
            raise CheckpointError(
                f"{uri} has the pattern {shorten(pattern)} under {key}, which is no regular"
                " expression or too costly to search for. Write out the names of modules.",
                code="config_invalid",
                context={"uri": uri},
            )
        found.append((compiled, _number(given, pattern, 0, uri, lowest=lowest, whole=whole)))
    return tuple(found)


def _is_costly(pattern: str) -> bool:
    """Whether a hostile pattern could take long: repeated groups, or many repetitions."""
    return (
        len(pattern) > _MAX_PATTERN_LENGTH
        or bool(_RISKY.search(pattern))
        or len(_QUANTIFIER.findall(pattern)) > _MAX_QUANTIFIERS
    )


def _first_match(patterns: tuple[_Pattern, ...], module: str, default: float) -> float:
    return next((number for pattern, number in patterns if pattern.match(module)), default)
