"""Tiny models of transformers and what goes through them, for tests of calibrated methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from merging.execute.shard import run_shard
from merging.method import get_method
from merging.plan.plan import Plan, Shard, file_uri
from merging.plan.stages import shards_needed
from merging.receipts import Receipt
from merging.storage.base import Storage

SAMPLES = [[1, 2, 3, 4, 5, 6, 7, 3, 9], [5, 9, 20], [8] * 12, [60, 2, 33, 4], [17]]
"""Token ids of different lengths, so that some are padded."""

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED, **_SPECIAL))


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_GROUPED, **_SPECIAL))


def _gemma3() -> Any:
    """Norms of 1 + weight; heads before tokens where its q/k norms are; two kinds of masks."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **_GROUPED, **_SPECIAL, sliding_window=4, layer_types=kinds
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=4, vocab_size=64, n_positions=64, **_SPECIAL
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**_SIZES))


def _mixtral() -> Any:
    """Its checkpoints hold every expert by itself, under names that the model does not have."""
    config = transformers.MixtralConfig(
        **_GROUPED, **_SPECIAL, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _qwen2_moe() -> Any:
    """Beside the experts one that sees all tokens, and layers that are no mixtures."""
    config = transformers.Qwen2MoeConfig(
        **_GROUPED,
        **_SPECIAL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        mlp_only_layers=[1],
    )
    return transformers.Qwen2MoeForCausalLM(config)


_PIXELS = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 3, "num_attention_heads": 4}


def _clip_vision() -> Any:
    config = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=40, **_PIXELS)
    return transformers.CLIPVisionModel(config)


def _vit() -> Any:
    config = transformers.ViTConfig(hidden_size=16, intermediate_size=40, **_PIXELS)
    return transformers.ViTModel(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "bert": _bert,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "clip_vision": _clip_vision,
    "vit": _vit,
}
VISION = ("clip_vision", "vit")


def write_images(path: Path, **tensors: torch.Tensor) -> str:
    """Images as a processor makes them, more than are used; ``tensors`` may be others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"labels": torch.arange(9), "pixel_values": images()} | tensors, path)
    return str(path)


def images() -> torch.Tensor:
    """Nine images of 3×16×16."""
    return torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def write_models(folder: Path, architecture: str, num_experts: int = 2) -> list[Path]:
    """A base model and experts near to it, as transformers saves them."""
    paths = []
    for number in range(num_experts + 1):
        model = ARCHITECTURES[architecture]()
        start = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=start))
                parameter += 0.03 * (number + 1) * torch.randn(parameter.shape, generator=own)
        paths.append(folder / f"model-{number}")
        model.save_pretrained(paths[-1])
    return paths


def calibrated_recipe(
    models: Sequence[object], method: str = "lot", **calibration: Any
) -> dict[str, Any]:
    """A recipe over :func:`write_models`."""
    base, *experts = models
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(expert)} for expert in experts],
        "calibration": {"data": SAMPLES, "batch": 2, **calibration},
    }
    return document | ({"base_model": str(base)} if get_method(method).needs_base else {})


def statistics_shards(plan: Plan) -> list[Shard]:
    """Those that run experts on samples."""
    return [s for s in plan.shards if plan.settings[s.problems[0].setting].method == "statistics"]


def run_shards(
    plan: Plan, storage: Storage, shards: Sequence[Shard], receipts: dict[int, Receipt]
) -> None:
    """Run some shards; receipts of those before are taken from and added to ``receipts``."""
    needed, digest = shards_needed(plan), plan.digest
    for shard in shards:
        versions = {index: receipts[index].versions for index in needed[shard.index]}
        receipts[shard.index] = run_shard(plan.work(shard.index, digest, versions), storage)


def shard_uri(plan: Plan, shard: Shard) -> str:
    """Where its file is."""
    return file_uri(plan.output_uri, plan.digest, shard)


def hooked_inputs(
    folder: Path, module_names: Sequence[str], num_images: int = 0
) -> dict[str, torch.Tensor]:
    """By plain hooks on the whole model, sample by sample: rows that go into modules."""
    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    [architecture] = config.architectures
    model = getattr(transformers, architecture).from_pretrained(folder, config=config).eval()
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in module_names}

    def hook(name: str) -> Callable[..., None]:
        def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows[name].append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

        return look

    def look_at_expert(name: str, number: int) -> Callable[..., None]:
        def look(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, chosen = inputs[:2]
            x = hidden.detach()[(chosen == number).any(-1)]
            if name.endswith(("w2", "down_proj")):
                gate, up = (x @ module.gate_up_proj[number].detach().T).chunk(2, -1)
                x = torch.nn.functional.silu(gate) * up
            rows[name].append(x)

        return look

    for name in module_names:
        own = name.replace("block_sparse_moe", "mlp")
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+", own)
        if expert:
            look = look_at_expert(name, int(expert[2]))
            model.get_submodule(expert[1]).register_forward_pre_hook(look)
        else:
            if own not in dict(model.named_modules()):
                own = _renamed(model, own)
            model.get_submodule(own).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for image in images()[:num_images]:
            model(pixel_values=image[None])
        for sample in [] if num_images else SAMPLES:
            model(input_ids=torch.tensor([sample]))
    return {name: torch.cat(found) for name, found in rows.items()}


def _renamed(model: Any, name: str) -> str:
    """The model's name of a module that its checkpoints call otherwise."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    renamed, _ = rename_source_key(f"{name}.weight", get_model_conversion_mapping(model), [])
    return renamed.removesuffix(".weight")
