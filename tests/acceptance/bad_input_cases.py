"""Everything that users get wrong, each with what they are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.adapters import factors, write_adapter
from tests.support.checkpoints import INDEX_NAME, make_family, raw_file, write_checkpoint

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj.weight"


class Home:
    """A family of models in a folder of its own, to be damaged.

    Attributes:
        folder: Holds ``base``, ``expert-0`` and ``expert-1``.
        recipe: Merges the two experts; to be changed in place.
        output: Where the merge goes; nothing is there.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        shutil.copytree(source, folder)
        self.folder = folder
        self.base, self.expert = folder / "base", folder / "expert-1"
        self.output = folder / "merged"
        self.recipe: dict[str, Any] = {
            "merge_method": "ties",
            "base_model": str(self.base),
            "models": [{"model": str(folder / f"expert-{number}")} for number in range(2)],
        }

    def change(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the tensors of the second expert."""
        tensors = load_file(self.expert / WEIGHTS)
        change(tensors)
        save_file(tensors, self.expert / WEIGHTS, metadata={"format": "pt"})

    def change_adapter(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the tensors of the second expert, which is an adapter."""
        tensors = load_file(self.expert / ADAPTER)
        change(tensors)
        save_file(tensors, self.expert / ADAPTER)

    def forge(self, data: bytes = b"", *, length: int | None = None, **entries: Any) -> None:
        """Replace the second expert's weights by a file with this header."""
        header = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            for name, (dtype, shape, offsets) in entries.items()
        }
        raw_file(self.expert / WEIGHTS, header, data, length=length)


@dataclass(frozen=True)
class Case:
    """One thing that is wrong.

    Attributes:
        spoil: Brings it about.
        says: Parts of the one line that tells it; ``{home}`` is the family's folder.
        code: Of the problem that the service answers.
        status: Likewise.
        faults: Parts of the lines for single faults, in order.
        options: Of the merge, as the service takes them; the command line's have the same names.
    """

    spoil: Callable[[Home], object]
    says: tuple[str, ...]
    code: str
    status: int = 422
    faults: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def _set(**values: Any) -> Callable[[Home], None]:
    return lambda home: home.recipe.update(values)


def _write_factors(home: Home, columns: int = 32, module: str = "") -> None:
    """Give the second expert, which is an adapter, the factors of one module."""
    generator = torch.Generator().manual_seed(0)
    made = factors(module or QUERY.removesuffix(".weight"), 32, columns, 4, generator)
    save_file(made, home.expert / ADAPTER)


def _adapter(
    spoil: Callable[[Home], object] = lambda _: None, **config: Any
) -> Callable[[Home], None]:
    """Make the second expert an adapter, and spoil that."""

    def make(home: Home) -> None:
        shutil.rmtree(home.expert)
        write_adapter(home.expert, {}, **config)
        _write_factors(home)
        spoil(home)

    return make


def _to_pickled_adapter(home: Home) -> None:
    (home.expert / ADAPTER).rename(home.expert / "adapter_model.bin")


def _put_on_another(home: Home) -> None:
    home.recipe["models"] = [{"model": f"{home.folder}/expert-0+{home.expert}"}]


def _to_linear(home: Home) -> None:
    home.recipe["merge_method"] = "linear"
    del home.recipe["base_model"]


def _misspell_keys(home: Home) -> None:
    home.recipe["parameter"] = {}
    home.recipe["models"][0]["modle"] = home.recipe["models"][0].pop("model")


def _remove_expert(home: Home) -> None:
    shutil.rmtree(home.expert)


def _file_for_folder(home: Home) -> None:
    shutil.rmtree(home.expert)
    home.expert.write_text("no folder")


def _cut_header(home: Home) -> None:
    path = home.expert / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])


def _cut_data(home: Home) -> None:
    path = home.expert / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def _lose_shard(home: Home) -> None:
    tensors = load_file(home.expert / WEIGHTS)
    (home.expert / WEIGHTS).unlink()
    write_checkpoint(home.expert, tensors, shards=3)
    (home.expert / "model-00002-of-00003.safetensors").unlink()


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if tensors[name].dim() == 2:
            tensors[name] = tensors[name][:-1].contiguous()


def _swap_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.extra.weight"] = tensors.pop(QUERY)


def _to_pickle(home: Home) -> None:
    (home.expert / WEIGHTS).rename(home.expert / "pytorch_model.bin")


def _to_quantised(home: Home) -> None:
    config = json.loads((home.expert / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (home.expert / "config.json").write_text(json.dumps(config))


def _escape_by_index(home: Home) -> None:
    (home.expert / INDEX_NAME).write_text(json.dumps({"weight_map": {QUERY: "../base/x"}}))


def _grow(home: Home) -> None:
    family = make_family(home.folder / "large", num_experts=2, hidden=256, layers=1, vocab=64)
    home.recipe |= {"merge_method": "wudi", "base_model": str(family.base)}
    home.recipe["models"] = [{"model": str(expert)} for expert in family.experts]


def _to_output(name: str) -> Callable[[Home], None]:
    def spoil(home: Home) -> None:
        home.output = home.folder / name

    return spoil


CASES = {
    "unknown method": Case(
        _set(merge_method="wudy"),
        ("/merge_method", "Unknown merge method 'wudy'", "Did you mean wudi", "Known methods:"),
        "unknown_method",
    ),
    "unknown parameter": Case(
        _set(parameters={"densty": 0.5}),
        ("/parameters/densty", "Unknown parameter", "Did you mean 'density'"),
        "bad_parameter",
    ),
    "value out of range": Case(
        _set(parameters={"density": 1.5}),
        ("/parameters/density", "should be less than or equal to 1, not 1.5", "Share of"),
        "bad_parameter",
    ),
    "several misspelt keys": Case(
        _misspell_keys,
        ("/parameter", "Did you mean 'parameters'?", "more in the recipe"),
        "invalid_recipe",
        faults=('/models/0/modle: Unknown key "modle". Did you mean',),
    ),
    "model missing": Case(
        _remove_expert,
        ("There is nothing at {home}/expert-1", "A checkpoint is a folder", "downloaded first"),
        "storage_not_found",
    ),
    "file in place of the folder": Case(
        _file_for_folder,
        ("{home}/expert-1 is a file", "A checkpoint is a folder"),
        "storage_not_found",
    ),
    "truncated header": Case(
        _cut_header,
        ("{home}/expert-1/model.safetensors", "but the file has 100", "cut short", "copy or save"),
        "header_invalid",
    ),
    "truncated data": Case(
        _cut_data,
        ("{home}/expert-1/model.safetensors", "Tensor ", "cut short", "copy or save it again"),
        "header_invalid",
    ),
    "header longer than the file": Case(
        lambda home: home.forge(length=10**12),
        ("{home}/expert-1/model.safetensors", "claims 1000000000000 bytes", "copy or save"),
        "header_invalid",
    ),
    "offsets beyond the file": Case(
        lambda home: home.forge(b"1234", a=("F32", [2], [0, 8])),
        ("Tensor 'a'", "{home}/expert-1/model.safetensors", "holds only 4 bytes"),
        "header_invalid",
    ),
    "overlapping tensors": Case(
        lambda home: home.forge(b"123456", a=("U8", [4], [0, 4]), b=("U8", [4], [2, 6])),
        ("Tensor 'b'", "{home}/expert-1/model.safetensors", "overlap tensor 'a' by 2 bytes"),
        "header_invalid",
    ),
    "unknown dtype": Case(
        lambda home: home.forge(b"1234", a=("F99", [1], [0, 4])),
        ("Tensor 'a'", "{home}/expert-1/model.safetensors", "'F99'", "Types that are read: "),
        "dtype_unsupported",
    ),
    "index that leads out of the folder": Case(
        _escape_by_index,
        ("{home}/expert-1/model.safetensors.index.json", "without folders"),
        "index_inconsistent",
    ),
    "missing weight file": Case(
        _lose_shard,
        ("{home}/expert-1 lacks 1 of the 3 weight files", "model-00002-of-00003", "Finish the"),
        "missing_file",
    ),
    "other shapes": Case(
        lambda home: home.change(_shrink),
        (
            "{home}/expert-1 has 16 tensors of another shape than {home}/base",
            "lm_head.weight [63, 32] instead of [64, 32]",
            "and 6 more",
            "must agree in architecture, and in vocabulary unless 'tokenizer_source'",
        ),
        "shape_mismatch",
    ),
    "missing and extra tensors": Case(
        lambda home: home.change(_swap_a_tensor),
        ("{home}/expert-1 lacks 1 tensor that {home}/base has: " + QUERY, "(1 more.)"),
        "missing_tensor",
        faults=("/models/1/model: {home}/expert-1 has 1 tensor that {home}/base does not have: ",),
    ),
    "pickle": Case(
        _to_pickle,
        ("{home}/expert-1", "pytorch_model.bin", "can run code", "safe_serialization=True"),
        "unsafe_format",
    ),
    "pickled adapter": Case(
        _adapter(_to_pickled_adapter),
        ("{home}/expert-1", "adapter_model.bin", "can run code", "weights_only=True"),
        "unsafe_format",
    ),
    "adapter that is none of a sum": Case(
        _adapter(use_dora=True, lora_bias=True),
        ("{home}/expert-1/adapter_config.json", "DoRA", "lora_bias", "merge_and_unload()"),
        "adapter_unsupported",
    ),
    "adapter of another kind": Case(
        _adapter(peft_type="IA3"),
        ("{home}/expert-1/adapter_config.json", "of type 'IA3'", "only LORA"),
        "adapter_unsupported",
    ),
    "adapter with an option that is not known": Case(
        _adapter(use_tensor_trains=True),
        ("not known here: ['use_tensor_trains']",),
        "adapter_unsupported",
    ),
    "adapter begun by changing the base": Case(
        _adapter(init_lora_weights="pissa"),
        ("init_lora_weights 'pissa'", "path_initial_model_for_weight_conversion"),
        "adapter_unsupported",
    ),
    "adapter of another model": Case(
        _adapter(lambda home: _write_factors(home, columns=48)),
        (
            "{home}/expert-1",
            f"lora_A F32 [4, 48] and lora_B F32 [32, 4] for {QUERY} [32, 32]",
            "Name the model that it was trained on (its config names 'models/base')",
        ),
        "shape_mismatch",
    ),
    "adapter of layers that are not there": Case(
        _adapter(lambda home: _write_factors(home, module="model.layers.9.self_attn.q_proj")),
        (
            "The adapter {home}/expert-1 is for 1 tensors that {home}/base does not have",
            "model.layers.9.self_attn.q_proj.weight",
        ),
        "missing_tensor",
    ),
    "adapter with half of its factors": Case(
        _adapter(lambda home: home.change_adapter(lambda tensors: tensors.popitem())),
        ("{home}/expert-1 has only one of the two factors of: model.layers.0.self_attn.q_proj",),
        "missing_tensor",
    ),
    "adapter whose config is another's": Case(
        _adapter(r=16),
        ("other ranks than its adapter_config.json says: model.layers.0.self_attn.q_proj has 4",),
        "config_invalid",
    ),
    "adapter with a costly pattern": Case(
        _adapter(rank_pattern={"(a+)+q": 4}),
        ("'(a+)+q' under rank_pattern", "Write out the names"),
        "config_invalid",
    ),
    "adapter without a model": Case(
        _adapter(_to_linear),
        ("{home}/expert-1 is an adapter", "'model+adapter'"),
        "incompatible_options",
    ),
    "adapter beside a whole model": Case(
        _adapter(lambda home: shutil.copy(home.base / WEIGHTS, home.expert)),
        ("{home}/expert-1 holds an adapter and a whole model", "a folder of its own"),
        "index_inconsistent",
    ),
    "whole model for an adapter": Case(
        _put_on_another,
        ("{home}/expert-1, behind the '+', is a whole model",),
        "incompatible_options",
    ),
    "quantised": Case(
        _to_quantised,
        ("{home}/expert-1 is quantised (gptq", "Convert it to bfloat16 first"),
        "dtype_unsupported",
    ),
    "memory budget too small": Case(
        _grow,
        ("Tensor 'model.layers.0.mlp.", "bytes of host memory", "1048576", "Set memory_budget to"),
        "does_not_fit",
        options={"memory_budget": "1MiB"},
    ),
    "output inside an input": Case(
        _to_output("base/merged"),
        ("The output {home}/base/merged is inside the input model {home}/base", "Choose another"),
        "incompatible_options",
    ),
    "output is an input": Case(
        _to_output("expert-0"),
        ("{home}/expert-0", "Choose another output"),
        "output_exists",
        status=409,
    ),
    "option out of range": Case(
        lambda _: None,
        ("seed", "should be greater than or equal to 0"),
        "invalid_request",
        options={"seed": -1},
    ),
}
