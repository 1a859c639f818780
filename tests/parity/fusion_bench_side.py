"""What runs in FusionBench's own environment: its merges of tiny models.

    python fusion_bench_side.py JOBS.json    # [{"call": {…}, "output": "…"}, …]

A call names a function below, the models, and its arguments. What FusionBench has a function for is
called as it is; where it has pieces or a program over models only, these are put together here.
Prints one line a call: ``ok``, or what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
Merge = Callable[..., State]


def is_layer(name: str) -> bool:
    """Whether a tensor of the tiny models is the weight of a linear layer."""
    return "self_attn" in name or "mlp" in name


def others(vector: State) -> list[str]:
    """Names that methods for layers leave alone."""
    return [name for name in vector if not is_layer(name)]


def wudi(vectors: list[State], iter_num: int) -> State:
    """WUDI-Merging with 1e-5 for a learning rate; the mean of other tensors."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    found = wudi_merging(vectors, "cpu", iter_num, others(vectors[0]))
    return {name: tensor.detach() for name, tensor in found.items()}


def tsv_m(vectors: list[State]) -> State:
    """Task singular vectors; the mean of other tensors."""
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
        compute_and_sum_svd_mem_reduction,
    )

    found: State = compute_and_sum_svd_mem_reduction(vectors, others(vectors[0]), "cpu")
    return found


def iso_c(vectors: list[State]) -> State:
    """Iso-C before it is scaled."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    found: State = iso_c(vectors, "cpu", others(vectors[0]))
    return found


def iso_cts(vectors: list[State], common_space_fraction: float) -> State:
    """Iso-CTS before it is scaled."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    found: State = iso_cts(vectors, common_space_fraction, "cpu", others(vectors[0]))
    return found


def _flat(vectors: list[State]) -> Tensor:
    names = sorted(vectors[0])
    return torch.stack([torch.cat([v[name].reshape(-1) for name in names]) for v in vectors])


def _unflat(flat: Tensor, like: State) -> State:
    names = sorted(like)
    parts = flat.split([like[name].numel() for name in names])
    return {n: part.view(like[n].shape) for n, part in zip(names, parts, strict=True)}


def ties(vectors: list[State], percent: float, merge_func: str) -> State:
    """TIES over whole models."""
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    return _unflat(ties_merging(_flat(vectors), percent, merge_func), vectors[0])


def consensus(
    vectors: list[State], base: State, tall_mask_lambda: float, min_tasks: int, percent: float = 0
) -> State:
    """Consensus merging of the sum, or of TIES: TALL masks, counted."""
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    flat, start = _flat(vectors), _flat([base])[0]
    merged = ties_merging(flat, percent, "sum") if percent else flat.sum(dim=0)
    masks = generate_task_masks(flat, flat + start, start, merged, tall_mask_lambda)
    return _unflat(merged * (masks.sum(dim=0) >= min_tasks), vectors[0])


def knots_ties(vectors: list[State], percent: float) -> State:
    """Alignment of every layer, then TIES over all of them."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment

    bases: State = {}
    aligned: list[State] = [{} for _ in vectors]
    for name in filter(is_layer, vectors[0]):
        U, S, parts = subspace_alignment([vector[name] for vector in vectors], eps=1e-6)
        bases[name] = U
        for number, part in enumerate(parts):
            aligned[number][name] = S[:, None] * part
    merged = ties(aligned, percent, "mean")
    mean = {name: sum(v[name] for v in vectors) / len(vectors) for name in others(vectors[0])}
    return mean | {name: bases[name] @ part for name, part in merged.items()}


def svc(vectors: list[State], base: State, merged_by: dict[str, Any], alpha: float) -> State:
    """Another merge with calibrated singular values; of two-dimensional layers only."""
    from fusion_bench.method.singular_value_calibration.utils import (
        subspace_consistency_spectral_calibration_accelerated,
    )

    found = call(vectors, base, merged_by)
    for name in filter(is_layer, found):
        found[name] = subspace_consistency_spectral_calibration_accelerated(
            torch.zeros_like(base[name]),
            [vector[name] for vector in vectors],
            found[name],
            alpha,
            torch.device("cpu"),
        )
    return found


def task_sum(vectors: list[State]) -> State:
    """Task arithmetic with 1 for a factor."""
    return {name: sum(vector[name] for vector in vectors) for name in vectors[0]}


def emr(vectors: list[State], task: int | None) -> State:
    """The update of the shared model, or what one task's mask leaves of it."""
    from fusion_bench.method.emr_merging.utils import emr_merge

    unified, masks, _ = emr_merge(vectors)
    return {n: u if task is None else u * masks[n][task] for n, u in unified.items()}


class _Holder(nn.Module):
    """A module that has a tensor and is no linear layer."""


def _model(state: State, rename: Callable[[str], str] = str) -> nn.Module:
    """A tree of modules with these tensors, layers as linear modules."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = rename(name).split(".")
        parent = root
        for part in path[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        module: nn.Module = _Holder()
        if is_layer(name):
            module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
        parent.add_module(path[-1], module)
    return root


def _run(
    algorithm: Any, vectors: list[State], base: State, rename: Callable[[str], str] = str
) -> State:
    """The update that a program over models makes."""
    from fusion_bench import BaseModelPool

    experts = [{name: base[name] + vector[name] for name in base} for vector in vectors]
    models = {"_pretrained_": _model(base, rename)}
    models |= {f"expert{number}": _model(state, rename) for number, state in enumerate(experts)}
    found = algorithm.run(BaseModelPool(models)).state_dict()
    return {name: found[rename(name)] - base[name] for name in base}


def opcm(vectors: list[State], base: State, alpha: float) -> State:
    """OPCM in the models' order."""
    from fusion_bench.method.opcm.opcm_general import OPCM

    quiet = {"save_on_every_step": False, "evaluate_on_every_step": False}
    return _run(OPCM(alpha=alpha, shuffle_order=False, **quiet), vectors, base)


def doge(vectors: list[State], base: State, subspace: int, percent: float, eta: float) -> State:
    """DOGE with task arithmetic; its layers are those with "encoder" in their names."""
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    def rename(name: str) -> str:
        return f"encoder.{name}" if is_layer(name) else name

    return _run(DOGE_TA_Algorithm(subspace, percent, eta), vectors, base, rename)


CALLS: dict[str, Merge] = {
    one.__name__: one
    for one in (
        wudi, tsv_m, iso_c, iso_cts, ties, consensus, knots_ties, svc, task_sum, emr, opcm, doge,
    )
}  # fmt: skip


def call(vectors: list[State], base: State, described: dict[str, Any]) -> State:
    """The update that a call describes."""
    function = CALLS[described["function"]]
    arguments = {k: v for k, v in described.items() if k not in ("function", "models")}
    if "base" in function.__annotations__:
        arguments["base"] = base
    return function([dict(vector) for vector in vectors], **arguments)


def main() -> None:
    """Make them all."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            base, *experts = (
                load_file(Path(folder) / "model.safetensors") for folder in job["call"]["models"]
            )
            vectors = [{name: one[name] - base[name] for name in base} for one in experts]
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
                update = call(vectors, base, job["call"])
            merged = {name: (base[name] + update[name]).contiguous() for name in base}
            Path(job["output"]).mkdir()
            save_file(merged, Path(job["output"]) / "model.safetensors")
            told = "ok"
        except Exception as error:  # noqa: BLE001 - one line a call, whatever happens
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
