"""A model of transformers without weights, of which one part at a time gets some."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from merging.errors import CheckpointError, WorkerError
from merging.execute.places import Place, Places
from merging.plan.statistics_work import StatisticsWork

_BUILDING = threading.Lock()
"""Held while accelerate has changed how torch registers parameters, and where that must not be so:
shards may run in threads of one process."""


class Done(Exception):  # noqa: N818 - an end, not an error
    """Raised inside a model's ``forward`` once there is nothing left to learn from it."""


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
        name: Of its module in the model.
        module: It.
        weight: The layer's slice of a parameter, if the module holds all experts of a mixture.
    """

    name: str
    module: nn.Module
    weight: torch.Tensor | None = None


class Skeleton:
    """The model of an expert: built from its config by transformers, without remote code.

    Parameters without weights are NaN in one entry's memory: the model's own ``forward`` can run
    through embeddings and masks whatever part has its weights, and nothing that it makes of others
    passes for a result.

    Args:
        work: Names the architecture and the part.
        device: Where it runs.

    Raises:
        WorkerError: ``wrong_version``: transformers or accelerate is missing, or another version
            than where the merge was planned.
        CheckpointError: ``config_invalid``: transformers refuses the config.
    """

    def __init__(self, work: StatisticsWork, device: str) -> None:
        self._work = work
        self._device = device
        self.model = _build(work)
        self._parameters = dict(self.model.named_parameters())
        self._places = Places(self.model)
        self._stacked: dict[str, torch.Tensor] = {}
        self._loaded: set[str] = set()
        for name, parameter in self._parameters.items():
            self._set(name, torch.full((1,), torch.nan, device=device).expand(parameter.shape))
        self.model.to(device)
        stack = self._places.stack(work.stack)
        self._stack = stack or ""
        blocks = None if stack is None else self.model.get_submodule(stack)
        if not isinstance(blocks, nn.ModuleList):
            raise self._broken(f"{work.stack} is no list of blocks in {work.architecture}")
        self.blocks = blocks

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Put a stored tensor in its place, in float32.

        Raises:
            CheckpointError: ``index_inconsistent``: the model has no place for it.
        """
        place = self._places.find(name)
        if place is None:
            if self._is_buffer(name):
                return
            raise self._broken(f"{self._work.architecture} has no parameter {name!r}")
        whole = tuple(self._parameters[place.parameter].shape)
        expected = place.shape(whole)
        if expected != tuple(tensor.shape) or (place.expert or 0) >= whole[0]:
            raise self._broken(
                f"{name!r} is {list(tensor.shape)} where {self._work.architecture} has"
                f" {list(expected)}"
            )
        self._loaded.add(place.parameter)
        if place.expert is None:
            self._set(place.parameter, tensor.to(self._device, torch.float32))
            return
        if place.parameter not in self._stacked:
            self._stacked[place.parameter] = torch.zeros(whole, device=self._device)
            self._set(place.parameter, self._stacked[place.parameter])
        place.of(self._stacked[place.parameter]).copy_(tensor)

    def place(self, name: str) -> Place | None:
        """Where the tensor is that a checkpoint calls so; None of what the model computes anew."""
        return self._places.find(name)

    def tie_head(self) -> None:
        """Give the head the embedding's weight.

        Raises:
            CheckpointError: ``index_inconsistent``: the model has no such head.
        """
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None:
            raise self._broken(f"{self._work.architecture} has no head of the embedding's shape")
        with _BUILDING:
            head.weight = embedding.weight

    def check_block(self) -> None:
        """After all weights of a block.

        Raises:
            CheckpointError: ``index_inconsistent``: one that the model needs is missing.
        """
        if self._work.block >= 0:
            block = f"{self._stack}.{self._work.block}."
            own = {name for name in self._parameters if name.startswith(block)}
            if missing := own - self._loaded:
                raise self._broken(
                    f"the checkpoint has no tensor for the parameter {min(missing)!r}"
                )

    def find(self, name: str) -> nn.Module:
        """The module that a checkpoint calls so.

        Raises:
            CheckpointError: ``index_inconsistent``: there is none.
        """
        return self.find_layer(name).module

    def find_layer(self, name: str) -> Layer:
        """The same, which may be one expert of a mixture that the model has as one module."""
        known = self._places.among(name, dict(self.model.named_modules()))
        if known is not None:
            return Layer(known, self.model.get_submodule(known))
        place = self._places.find(f"{name}.weight")
        if place is None:
            raise self._broken(f"{self._work.architecture} has no module {name!r}")
        module = self.model.get_submodule(place.module)
        weight = None
        if place.expert is not None:
            weight = self.model.get_parameter(place.parameter)[place.expert]
        return Layer(place.module, module, weight)

    def find_experts(self, name: str) -> list[Layer]:
        """The layers of all experts of a mixture, which a checkpoint has as one tensor.

        Raises:
            CheckpointError: ``index_inconsistent``: there are none.
        """
        place = self._places.find(name)
        if place is None or place.expert is not None:
            raise self._broken(f"{self._work.architecture} has no parameter {name!r}")
        module = self.model.get_submodule(place.module)
        return [Layer(place.module, module, w) for w in self.model.get_parameter(place.parameter)]

    def run(self, **inputs: torch.Tensor) -> Any:
        """What the model's ``forward`` gives of a batch, unless :class:`Done` is raised in it.

        Args:
            inputs: Its arguments.

        Raises:
            CheckpointError: ``config_invalid``: the model cannot be run like this.
        """
        try:
            return self.model(**inputs)
        except (Done, CheckpointError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):
                raise
            raise CheckpointError(
                f"{self._work.uri} ({self._work.architecture}) cannot be run block by block:"
                f" {type(error).__name__}: {str(error)[:300]}. Merge it with a method that needs no"
                " samples.",
                code="config_invalid",
                context={"uri": self._work.uri},
            ) from error

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        with _BUILDING:
            setattr(module, own, nn.Parameter(tensor, requires_grad=False))

    def _is_buffer(self, name: str) -> bool:
        """Whether transformers computes a stored tensor anew, or leaves it out."""
        if self._places.among(name, dict(self.model.named_buffers())) is not None:
            return True
        left_out = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in left_out)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._work.uri} cannot be run on samples: {what} in the installed transformers.",
            code="index_inconsistent",
            context={"uri": self._work.uri},
        )


class Passing(nn.Module):
    """In place of a block that is not run.

    Args:
        hidden: Gives what stands for its output.
    """

    def __init__(self, hidden: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Whatever goes in."""
        return self._hidden()


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block, with these hidden states in place of its own."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _build(work: StatisticsWork) -> Any:
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise WorkerError(
            f"{work.uri} is to be run on samples, and this worker lacks {error.name}. Install"
            " mergeyard[calibration] on all workers.",
            code="wrong_version",
        ) from None
    architecture: Callable[[Any], Any] | None = getattr(transformers, work.architecture, None)
    if architecture is None:
        raise WorkerError(
            f"This worker's transformers {transformers.__version__} has no {work.architecture}."
            " Install the version of the service on all workers.",
            code="wrong_version",
        )
    values = json.loads(json.dumps(work.config))
    for key in ("auto_map", "architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
    try:
        config = transformers.AutoConfig.for_model(
            **values, attn_implementation="eager", experts_implementation="eager"
        )
        config.use_cache = False
        with _BUILDING, init_empty_weights(include_buffers=False):
            model = architecture(config)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build {work.architecture} from the config.json of {work.uri}:"
            f" {type(error).__name__}: {str(error)[:300]}.",
            code="config_invalid",
            context={"uri": work.uri},
        ) from error
    return model.float().eval()
