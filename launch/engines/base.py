"""What the trainer asks of an engine; knows nothing of data, models or schedules.

An engine owns how one model is spread over the ranks. Gradients are always the mean over ranks, so when every rank
back-propagates the mean loss of its equal share of the global batch, the step is that of the whole batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

Batch = dict[str, torch.Tensor]


class Engine(Protocol):
    """One model, wrapped, on this rank."""

    name: str
    module: nn.Module  # parameters as this rank holds them; what the optimiser is made from

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """What the model makes of a batch (or of images) on this device, float32; every rank calls it equally often."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one part of a step; gradients cross ranks only in the `last` part."""

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to `max_norm` (0: leave them); returns the norm before that, over all ranks."""


def read_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimiser as a tree that torch.distributed.checkpoint can save and reshard.

    The keys are the names of the bare model's parameters, the same for every engine and world size.
    """
    return {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer)}


def write_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a loaded tree back, exactly."""
    # The optimiser first: setting it makes its moments by an empty step, which must not run on loaded weights.
    set_optimizer_state_dict(module, optimizer, state["optimizer"])
    set_model_state_dict(module, state["model"])


def grad_norm_and_clip(module: nn.Module, max_norm: float) -> float:
    """Global gradient norm of a module whose gradients are plain or sharded tensors; clips in place if max_norm > 0."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # a DTensor holds only this rank's part of the sum
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
