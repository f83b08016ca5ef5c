"""What the trainer asks of an engine, which spreads one model over the ranks.

Gradients are always the mean over ranks. When every rank back-propagates the mean loss of its equal share of the global
batch, the step is the whole batch's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

Batch = dict[str, torch.Tensor]
Forward = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters())


@dataclass(frozen=True)
class EngineSetup:
    """What every engine is told besides its own section of the settings."""

    device: torch.device
    precision: str  # fp32 or bf16
    make_optimizer: MakeOptimizer = _adamw  # of the wrapped model
    parts: int = 1  # parts of a step, each with a call of `backward`
    micro: int = 1  # images per part on this rank
    max_norm: float = 0.0  # largest gradient norm, 0 for none
    local: int = 0  # index of this rank on its node
    local_world: int | None = None  # ranks of this node, None for all


class Engine(Protocol):
    """One model and its optimiser, wrapped, on this rank."""

    module: nn.Module  # with its parameters as this rank holds them
    data_rank: int  # share of every batch that this rank trains on
    data_world: int  # number of shares; ranks that share one sequence have the same share
    first_of_share: bool  # whether this rank counts for its share

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """The model's answer to a batch or images on this device, float32; every rank calls it equally often."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one part of a step; only the `last` part sends gradients."""

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate one part of a step, inside its `micro_step`."""

    def step(self, rate: float, max_norm: float) -> float:
        """One optimiser step at a learning rate, after clipping the gradients to `max_norm` (0: no clipping).

        Returns:
            The gradient norm before clipping, over all ranks. If it is not finite, the step is lost.
        """

    def state(self) -> dict[str, Any]:
        """Model and optimiser as a tree for torch.distributed.checkpoint; {} if `save` writes them.

        The keys are the names of the bare model's parameters, the same for every engine and world size.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Put a loaded tree back, exactly."""

    def forget(self) -> None:
        """Undo what reading the state of a fresh optimiser left behind."""

    def save(self, folder: Path) -> None:
        """Write what `state` lacks into an empty folder, together with all ranks."""

    def load(self, folder: Path, notes: dict[str, Any]) -> None:
        """Read what `save` wrote, perhaps by another number of ranks (`notes["world"]`).

        Raises:
            EngineError: This engine or this number of ranks cannot read it; one line says why.
        """

    def destroy(self) -> None:
        """Free what must go before the process group ends."""


class EngineError(RuntimeError):
    """An engine cannot do what was asked; the message is one line."""


class TorchEngine:
    """What the engines with a plain torch optimiser share; all they save is in `state`."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, sequence: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_world = rank // sequence, world // sequence
        self.first_of_share = rank % sequence == 0

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float, max_norm: float) -> float:
        """See `Engine`."""
        norm = grad_norm_and_clip(self.module, max_norm)
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """See `Engine`."""
        model, optimizer = self.module, self.optimizer
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        # The optimiser goes first: it makes its moments by an empty step, which must not run on loaded weights.
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # not the checkpoint's to decide
        set_model_state_dict(self.module, state["model"])

    def forget(self) -> None:
        """See `Engine`."""
        # Reading a fresh optimiser's state makes its moments by an empty step, and AdamW would count that step.
        self.optimizer.state.clear()

    def save(self, folder: Path) -> None:
        """See `Engine`."""

    def load(self, folder: Path, notes: dict[str, Any]) -> None:
        """See `Engine`."""

    def destroy(self) -> None:
        """See `Engine`."""


def grad_norm_and_clip(module: nn.Module, max_norm: float) -> float:
    """Global gradient norm of a module with plain or sharded gradients; clips them in place if max_norm > 0."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # a DTensor holds only this rank's part of the sum
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The modules that a model wants sharded or compiled one by one, in forward order."""
    return model.fsdp_units() if hasattr(model, "fsdp_units") else []  # type: ignore[operator,no-any-return]


def compiled_units(model: nn.Module) -> list[nn.Module]:
    """The modules to compile one by one: the blocks that a model names, else `repeated` of its units."""
    named = model.blocks_to_compile() if hasattr(model, "blocks_to_compile") else []  # type: ignore[operator]
    return named or repeated(units_of(model))


def repeated(units: list[nn.Module]) -> list[nn.Module]:
    """The units whose class occurs more than once, which share one compilation; all units where none does.

    Patch encoders and decoders see another number of patches at every step, which would compile them anew.
    """
    kinds = [type(unit) for unit in units]
    return [unit for unit in units if kinds.count(type(unit)) > 1] or units
