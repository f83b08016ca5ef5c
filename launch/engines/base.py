"""What the trainer asks of an engine; knows nothing of data, models or schedules.

An engine owns how one model is spread over the ranks. Gradients are always the mean over ranks, so when every rank
back-propagates the mean loss of its equal share of the global batch, the step is that of the whole batch.
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
    """What every engine is told besides its own section of the settings.

    Attributes:
        device: This rank's device.
        precision: fp32 or bf16.
        make_optimizer: Optimiser of the wrapped model; AdamW with its defaults by default.
        parts: Parts of a step (calls of `backward` per `step`).
        micro: Images per part on this rank.
        max_norm: Largest gradient norm, 0 for none.
        local: Index of this rank on its node.
        local_world: Ranks of this node; all when None.
    """

    device: torch.device
    precision: str
    make_optimizer: MakeOptimizer = _adamw
    parts: int = 1
    micro: int = 1
    max_norm: float = 0.0
    local: int = 0
    local_world: int | None = None


class Engine(Protocol):
    """One model and its optimiser, wrapped, on this rank.

    Attributes:
        name: As in the configuration.
        module: The model with its parameters as this rank holds them.
        data_rank: Which share of every batch this rank trains on.
        data_world: Number of shares. Ranks that share one sequence have the same share.
        first_of_share: Whether this rank speaks for its share, so that nothing is counted twice.
    """

    name: str
    module: nn.Module
    data_rank: int
    data_world: int
    first_of_share: bool

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """What the model makes of a batch (or of images) on this device, float32; every rank calls it equally often."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one part of a step; gradients cross ranks only in the `last` part."""

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate one part of a step, inside its `micro_step`."""

    def step(self, rate: float, max_norm: float) -> float:
        """One optimiser step at a learning rate, gradients scaled down to `max_norm` first (0: as they are).

        Returns:
            The gradient norm before that, over all ranks. When it is not finite no step was made that can be kept.
        """

    def state(self) -> dict[str, Any]:
        """Model and optimiser as a tree that torch.distributed.checkpoint saves and reshards; {} if `save` does it.

        The keys are the names of the bare model's parameters, the same for every engine and world size.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Put a loaded tree back, exactly."""

    def forget(self) -> None:
        """Undo what reading the state of a fresh optimiser left behind."""

    def save(self, folder: Path) -> None:
        """Write what is not in `state` into an empty folder, together with all ranks."""

    def load(self, folder: Path, notes: dict[str, Any]) -> None:
        """Read what `save` wrote, perhaps by another number of ranks (`notes["world"]`).

        Raises:
            EngineError: It cannot be read by this engine or this number of ranks; one line says why.
        """

    def destroy(self) -> None:
        """Let go of whatever must go before the process group ends."""


class EngineError(RuntimeError):
    """An engine cannot do what was asked; one line."""


class TorchEngine:
    """What the engines with a plain torch optimiser share."""

    name = ""
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
        # The optimiser first: setting it makes its moments by an empty step, which must not run on loaded weights.
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # how steps are computed is this program's affair, not the checkpoint's
        set_model_state_dict(self.module, state["model"])

    def forget(self) -> None:
        """See `Engine`."""
        # Reading the state of a fresh optimiser makes its moments by an empty step, which counts as a step: AdamW
        # would correct its bias as if it were one step further.
        self.optimizer.state.clear()

    def save(self, folder: Path) -> None:
        """See `Engine`; everything is in `state`."""

    def load(self, folder: Path, notes: dict[str, Any]) -> None:
        """See `Engine`; everything is in `state`."""

    def destroy(self) -> None:
        """See `Engine`."""


def grad_norm_and_clip(module: nn.Module, max_norm: float) -> float:
    """Global gradient norm of a module whose gradients are plain or sharded tensors; clips in place if max_norm > 0."""
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
    """The modules to compile one by one: the blocks of a model that names them, else `repeated` of its units."""
    named = model.blocks_to_compile() if hasattr(model, "blocks_to_compile") else []  # type: ignore[operator]
    return named or repeated(units_of(model))


def repeated(units: list[nn.Module]) -> list[nn.Module]:
    """Those of a class that occurs more than once: one compilation serves them all, the others are seldom worth one.

    Patch encoders and decoders among them see another number of patches at every step, which would compile them anew.
    """
    kinds = [type(unit) for unit in units]
    return [unit for unit in units if kinds.count(type(unit)) > 1] or units
