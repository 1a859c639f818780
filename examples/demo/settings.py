"""Sizes of the demo's models and lengths of their training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Chosen so that two cores make everything in some minutes.

    Attributes:
        max_chars_per_kind: Text to read of each kind.
        vocabulary: Tokens.
        hidden: Width of the models; ``layers``, ``heads``, ``key_value_heads`` and
            ``intermediate`` are Llama's words too.
        context: Tokens in a window of text, at training and at judging.
        batch: Windows in a training step.
        base_steps: Training steps of the base.
        base_rate: Its highest learning rate.
        base_share: Share of each expert's kind in what the base reads; the rest is English.
        expert_steps: Training steps of each expert.
        expert_rate: Its highest learning rate.
        replay: Share of the base's English in what an expert reads, so that it forgets less.
        held_out_windows: Windows of each kind that losses are measured on.
        weight_file_size: Largest weight file of a checkpoint.
        seed: Of first weights and of the order of the text.
    """

    max_chars_per_kind: int = 4_000_000
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    intermediate: int = 512
    context: int = 256
    batch: int = 4
    base_steps: int = 1200
    base_rate: float = 2e-3
    base_share: float = 0.01
    expert_steps: int = 300
    expert_rate: float = 1e-3
    replay: float = 0.25
    held_out_windows: int = 24
    weight_file_size: str = "1MB"
    seed: int = 0


TINY = Settings(
    max_chars_per_kind=300_000,
    vocabulary=512,
    hidden=64,
    layers=2,
    heads=2,
    key_value_heads=1,
    intermediate=128,
    context=64,
    base_steps=40,
    expert_steps=20,
    held_out_windows=4,
    weight_file_size="100KB",
)
"""For tests: everything happens, and little is learned."""
