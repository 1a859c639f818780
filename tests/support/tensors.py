"""Small random models of one tensor, and a call of a method on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from merging.method import Task, get_method

RMS = 2.7e-4
"""Root mean square of task vectors of fine-tuned CLIP models."""


def make_models(
    shape: Sequence[int],
    num_experts: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rms: float = RMS,
    base_rms: float = 0.02,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base tensor and experts whose task vectors have that root mean square."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(list(shape), generator=generator, dtype=torch.float64)

    base = (base_rms * normal()).to(dtype)
    experts = [(base.double() + rms * normal()).to(dtype) for _ in range(num_experts)]
    return base, experts


def merge(
    method_name: str,
    base: torch.Tensor | None,
    experts: Iterable[torch.Tensor],
    parameters: Mapping[str, Any] | None = None,
    expert_parameters: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    *,
    figures: dict[str, Any] | None = None,
    **task: Any,
) -> torch.Tensor:
    """Run a method with parameters as a recipe would give them (one mapping holds for all)."""
    method = get_method(method_name)
    tensors = list(experts)
    if expert_parameters is None or isinstance(expert_parameters, Mapping):
        expert_parameters = [expert_parameters or {}] * len(tensors)
    return method.merge(
        base,
        iter(tensors),
        Task(
            tensor_name=task.pop("tensor_name", "model.layers.0.mlp.up_proj.weight"),
            parameters=method.parameters.model_validate(parameters or {}),
            expert_parameters=[
                method.expert_parameters.model_validate(one) for one in expert_parameters
            ],
            figures={} if figures is None else figures,
            **task,
        ),
    )


def relative_difference(actual: torch.Tensor | np.ndarray, expected: np.ndarray) -> float:
    """‖actual − expected‖_F / ‖expected‖_F."""
    found = actual.double().numpy() if isinstance(actual, torch.Tensor) else actual
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
