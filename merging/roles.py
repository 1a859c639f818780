"""What a tensor is for, judged from its name, its shape and the model's config alone.

No table of architectures: names follow a few habits (``self_attn.q_proj``, ``attn.c_attn``,
``attention.self.query`` …), and a new model that keeps to them needs nothing here. A tensor that
fits no habit is ``other``; it is still a linear layer if it is a two-dimensional ``weight``. Where
that is wrong for a model, a recipe names its tensors by regular expression (:func:`touch_filter`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic_core import SchemaError, SchemaValidator, core_schema

from merging.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is for.

    Attributes:
        kind: ``attention.`` with q, k, v, o, qkv, kv, q_a, q_b, kv_a, kv_b (low-rank pairs) or
            other; ``mlp.`` with gate, up, down, gate_up, fc_in, fc_out or other, and the same
            behind ``mlp.experts.`` and ``mlp.shared_experts.``; ``router``, ``norm``, ``bias``,
            ``embedding``, ``position``, ``head``, ``conv``, ``projection`` (between the towers of
            CLIP) or ``other``.
        layer: Number of its layer within its stack of layers, or -1 outside of any.
        is_linear: The weight matrix of a linear layer that acts on hidden states: no embedding,
            head, norm, router or bias, and not the 3-D tensors that hold all experts of a layer.
        transposed: A linear layer stored in×out where torch stores out×in.
        is_matrix: It has two dimensions.
    """

    kind: str
    layer: int
    is_linear: bool
    transposed: bool
    is_matrix: bool


TouchSpec = str | Sequence[str]
"""``all``, ``linear``, ``matrices``, ``wudi-vit``, or regular expressions, one of which matches."""

TouchFilter = Callable[[str, Role], bool]
"""Whether a method works on the tensor of that name and role."""

NOT_LINEAR = frozenset({"router", "norm", "bias", "embedding", "position", "head", "conv"})
"""Kinds of tensors that are no linear layers, whatever their shape."""

# Habits of naming: last part of the module's name, or any part of the path where it says so.
_STACK = re.compile(r"(^|_)(h|layers?|blocks?|resblocks|stages?|layer_groups)$")
_NUMBER = re.compile(r"[0-9]{1,6}")
_BIAS = re.compile(r"(^|_)bias(_|$)")
_POSITION = re.compile(
    r"position|pos_emb|rotary|inv_freq|^wpe$|rel_pos|rel_embeddings|relative_attention_bias"
)
_NORM = re.compile(r"norm|(^|_)(ln|bn)\d*($|_)", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"(^|_)(embed|embeddings?|wte|shared)$|^embed_(tokens|in)|_embed$|^tokens_embed$"
)
_PATCHES = re.compile(r"patch_embed")  # any part
_HEAD = re.compile(  # any part, outside the layers
    r"(^|_)(heads?|score|classifier|classification|embed_out|qa_outputs|seq_relationship"
    r"|predictions|proj_out|summary|vocab_transform|vocab_projector)$"
)
_ROUTER = re.compile(r"(^|_)router$|^moe_gate$|^shared_expert_gate$")  # any part
_EXPERTS = re.compile(r"^experts$|^expert_\d+$")  # any part
_SHARED_EXPERTS = re.compile(r"^shared_(experts?|mlp)$")  # any part
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)  # any part
_MLP = re.compile(r"mlp|ffn|feed_?forward|dense_?relu|^intermediate$|^output$", re.IGNORECASE)

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose layers are transformers' Conv1D, which stores in×out."""
_CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_CLIP_PROJECTIONS = frozenset({"proj", "text_projection"})
"""Plain matrices, not layers, of OpenAI's CLIP and OpenCLIP: ``x @ proj``, so in×out."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


_MAX_PATTERNS = 100
_MAX_PATTERN_CHARACTERS = 500

_WUDI_VIT = (
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)
_PRESETS: dict[str, TouchFilter] = {
    "all": lambda _name, _role: True,
    "linear": lambda _name, role: role.is_linear,
    "matrices": lambda _name, role: role.is_matrix,
    "wudi-vit": lambda name, _role: any(part in name for part in _WUDI_VIT),
}


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {name: part for part, names in table.items() for name in names.split()}


_ATTENTION_PARTS = _invert(
    {
        "q": "q q_proj query wq to_q q_lin q_attn query_proj",
        "k": "k k_proj key wk to_k k_lin key_proj",
        "v": "v v_proj value wv to_v v_lin value_proj",
        "o": "o o_proj out_proj dense wo to_out out_lin c_proj proj output_proj out",
        "qkv": "qkv qkv_proj c_attn query_key_value in_proj wqkv w_pack in_proj_qkv in_proj_qkvz",
        "kv": "kv kv_proj wkv to_kv key_value",
        "q_a": "q_a_proj",
        "q_b": "q_b_proj",
        "kv_a": "kv_a_proj kv_a_proj_with_mqa",
        "kv_b": "kv_b_proj",
    }
)
_MLP_PARTS = _invert(
    {
        "gate": "gate_proj w1 wi_0 gate",
        "up": "up_proj w3 wi_1",
        "down": "down_proj w2 output_linear",
        "gate_up": "gate_up_proj input_linear",
        "fc_in": "fc1 fc_in c_fc dense_h_to_4h wi lin1 linear1 intermediate",
        "fc_out": "fc2 fc_out c_proj dense_4h_to_h wo lin2 linear2",
    }
)


def describe_tensor(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> Role:
    """The role of a tensor.

    Args:
        name: Fully qualified name.
        shape: Its sizes.
        config: The model's ``config.json``; {} where there is none.
    """
    path, module, is_weight = _split_name(name)
    layer = _layer_number(path)
    kind = _kind(path, module, shape, layer, config, is_weight=is_weight)
    is_matrix = len(shape) == 2
    is_projection = kind == "projection" and not is_weight
    is_linear = is_matrix and (is_weight or is_projection) and kind not in NOT_LINEAR
    transposed = is_linear and (is_projection or _is_conv1d(path, module, config))
    return Role(kind, layer, is_linear, transposed, is_matrix)


def touch_filter(spec: TouchSpec) -> TouchFilter:
    """Turn a recipe's ``touch`` into a predicate on floating-point tensors.

    Args:
        spec: ``all``; ``linear`` (:attr:`Role.is_linear`); ``matrices`` (everything with two
            dimensions); ``wudi-vit`` (what the authors' code of WUDI touches in CLIP's image
            encoder: Cheng et al., ICML 2025, arXiv:2503.08099); or regular expressions, of which
            one must be found in the tensor's name.

    Raises:
        RecipeError: ``bad_parameter``: an unknown word or a bad expression.
    """
    if isinstance(spec, str):
        if spec not in _PRESETS:
            raise _bad_touch(
                f"touch is {spec[:80]!r}; expected {', '.join(_PRESETS)}, or a list of regular"
                " expressions."
            )
        return _PRESETS[spec]
    if not 0 < len(spec) <= _MAX_PATTERNS:
        raise _bad_touch(f"touch lists {len(spec)} expressions; 1 to {_MAX_PATTERNS} are allowed.")
    matchers = [_compile(pattern) for pattern in spec]
    return lambda name, _role: any(matcher.isinstance_python(name) for matcher in matchers)


def _split_name(name: str) -> tuple[list[str], str, bool]:
    """The parts of a name; the module that the tensor belongs to; whether it is its weight."""
    path = name.split(".")
    tail = path[-1]
    is_weight = tail == "weight" or tail.endswith("_weight")
    if tail in ("weight", "bias"):
        named = [part for part in path[:-1] if not part.isdecimal()]  # to_out.0, merger.mlp.2
        return path, named[-1] if named else "", is_weight
    return path, tail.removesuffix("_weight"), is_weight


def _layer_number(path: Sequence[str]) -> int:
    for stack, number in pairwise(path):
        if _NUMBER.fullmatch(number) and _STACK.search(stack):
            return int(number)
    return -1


def _kind(
    path: Sequence[str],
    module: str,
    shape: Sequence[int],
    layer: int,
    config: Mapping[str, Any],
    *,
    is_weight: bool,
) -> str:
    plain = _plain_kind(path, module, shape, layer)
    if plain:
        return plain
    if len(shape) == 2 and _is_router(path, shape, config):
        return "router"
    prefix = _expert_prefix(path, shape)
    if len(shape) > 2 and is_weight and not prefix:
        return "conv"
    if not prefix and _contains(_ATTENTION, path):
        return "attention." + _ATTENTION_PARTS.get(module.lower(), "other")
    if prefix or layer >= 0 or _contains(_MLP, path):
        part = _mlp_part(path, module)
        if prefix or part != "other" or _contains(_MLP, path):
            return (prefix or "mlp.") + part
    if layer < 0 and (module in _CLIP_PROJECTIONS or module.endswith("_projection")):
        return "projection"
    return "other"


def _plain_kind(path: Sequence[str], module: str, shape: Sequence[int], layer: int) -> str | None:
    """Kinds that the module's own name decides."""
    if _POSITION.search(module):
        return "position"
    if _BIAS.search(path[-1]):
        return "bias"
    if any(_NORM.search(part) for part in {module, *path[-2:]}):  # bn1.running_mean
        return "norm"
    if _EMBEDDING.search(module) or (len(shape) == 2 and _contains(_PATCHES, path)):
        return "embedding"
    is_head = _contains(_HEAD, path) if layer < 0 else module in ("head", "lm_head")
    if is_head or list(path) == ["output", "weight"]:
        return "head"
    return None


def _is_router(path: Sequence[str], shape: Sequence[int], config: Mapping[str, Any]) -> bool:
    """A matrix of experts × hidden. ``gate`` may also be half of a gated MLP; its height tells."""
    if _contains(_ROUTER, path):
        return True
    if "gate" not in path:
        return False
    counts = _expert_counts(config)
    return shape[0] in counts if counts else shape[0] * 4 <= shape[1]


def _expert_counts(config: Mapping[str, Any]) -> set[int]:
    """Numbers of experts that the config gives, itself or for one of several towers."""
    towers = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = (tower.get(key) for tower in towers for key in _EXPERT_COUNTS)
    return {count for count in found if isinstance(count, int) and count > 0}


def _expert_prefix(path: Sequence[str], shape: Sequence[int]) -> str:
    if _contains(_SHARED_EXPERTS, path):
        return "mlp.shared_experts."
    is_fused = len(shape) > 2 and any("moe" in part for part in path)
    return "mlp.experts." if is_fused or _contains(_EXPERTS, path) else ""


def _mlp_part(path: Sequence[str], module: str) -> str:
    if module == "dense":  # BERT: intermediate.dense, output.dense
        return "fc_in" if "intermediate" in path else "fc_out" if "output" in path else "other"
    return _MLP_PARTS.get(module.lower(), "other")


def _is_conv1d(path: Sequence[str], module: str, config: Mapping[str, Any]) -> bool:
    if module not in _CONV1D_LAYERS:
        return False
    tower = config.get(path[0])  # a composed model: "decoder": {"model_type": "gpt2"}
    model_type = (tower if isinstance(tower, Mapping) else config).get("model_type")
    return model_type in _CONV1D_MODELS


def _contains(pattern: re.Pattern[str], path: Sequence[str]) -> bool:
    return any(pattern.search(part) for part in path)


def _compile(pattern: object) -> SchemaValidator:
    """A regular expression whose time grows linearly with the name, whatever it says.

    Python's ``re`` can take exponential time and holds the interpreter meanwhile; recipes come
    from users, so pydantic's engine does it.
    """
    if not isinstance(pattern, str):
        raise _bad_touch(f"touch lists {str(pattern)[:80]!r}, which is not a regular expression.")
    if not 0 < len(pattern) <= _MAX_PATTERN_CHARACTERS:
        raise _bad_touch(
            f"touch lists {pattern[:40]!r} of {len(pattern)} characters; 1 to"
            f" {_MAX_PATTERN_CHARACTERS} are allowed."
        )
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern))
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("error: ")
        raise _bad_touch(
            f"touch lists {pattern!r}, which is not a regular expression that is understood:"
            f" {reason}."
        ) from None


def _bad_touch(detail: str) -> RecipeError:
    return RecipeError(detail, code="bad_parameter", context={"field": "touch"})
