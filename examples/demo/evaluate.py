"""How good a model is at each kind of text, and how much of the experts' gains a merge keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table
from transformers import LlamaForCausalLM

from examples.demo.corpus import BASE_KIND, EXPERT_KINDS

_WINDOWS_AT_ONCE = 8

Losses = Mapping[str, float]
"""Nats per token, by kind of text."""


def load_model(folder: Path) -> LlamaForCausalLM:
    """A checkpoint in float32: CPUs without bfloat16 arithmetic are very slow in it."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def measure_losses(folder: Path, held_out: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss of the checkpoint in ``folder`` on each kind's windows (windows×context ids)."""
    model = load_model(folder).eval()
    losses = {}
    with torch.inference_mode():
        for kind, windows in held_out.items():
            total = 0.0
            for batch in windows.split(_WINDOWS_AT_ONCE):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                total += loss.item() * len(batch)
            losses[kind] = total / len(windows)
    return losses


def gain_kept(base: Losses, experts: Mapping[str, Losses], merged: Losses) -> float:
    """Mean over kinds of (base − merged) / (base − own expert), in losses on that kind.

    1 means as good as every expert at its own kind, 0 as good as the base, and less is possible.
    """
    return mean(
        (base[kind] - merged[kind]) / (base[kind] - experts[kind][kind]) for kind in EXPERT_KINDS
    )


def results_table(
    base: Losses, experts: Mapping[str, Losses], merges: Mapping[str, Losses]
) -> Table:
    """All losses, the best merge of each column in bold, and the gain that each merge kept."""
    kinds = (*EXPERT_KINDS, BASE_KIND)
    best = {kind: min((losses[kind] for losses in merges.values()), default=None) for kind in kinds}
    table = Table(
        title="Loss on held-out text (nats per token; lower is better)",
        caption="gain kept: of what each expert gained on its own kind, the share that the merged"
        " model still has (mean over kinds)",
    )
    table.add_column("model")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("gain kept", justify="right")
    table.add_row("base", *(f"{base[kind]:.3f}" for kind in kinds), "0 %")
    for name, losses in experts.items():
        cells = (f"[green]{losses[k]:.3f}[/]" if k == name else f"{losses[k]:.3f}" for k in kinds)
        table.add_row(f"{name} expert", *cells, "")
    table.add_section()
    for title, losses in merges.items():
        cells = (
            f"[bold]{losses[k]:.3f}[/]" if losses[k] == best[k] else f"{losses[k]:.3f}"
            for k in kinds
        )
        table.add_row(title, *cells, f"{100 * gain_kept(base, experts, losses):.0f} %")
    return table
