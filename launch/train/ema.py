"""The running average of a model's weights, on whatever this rank holds of them; imports torch and hpc_models only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from hpc_models.blocks.checkpointing import frozen_statistics


class Average:
    """Exponential moving average a <- decay * a + (1 - decay) * w of the parameters after every step.

    The running statistics of batch norms are averaged with them: those of the newest weights do not fit an average
    over thousands of steps. The first steps use the smaller decay (1 + t) / (10 + t), so that the average does not stay
    at the starting weights.

    Args:
        module: The wrapped model; sharded parameters are averaged shard by shard.
        decay: In (0, 1).

    Attributes:
        weights: The average, by the names of parameters and buffers.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.weights = {name: tensor.detach().clone() for name, tensor in self._own()}

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is averaged, as the module has it now."""
        yield from self.module.named_parameters()
        for name, norm in self._norms():
            if norm.running_mean is not None and norm.running_var is not None:
                yield f"{name}running_mean", norm.running_mean
                yield f"{name}running_var", norm.running_var

    def _norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        for name, part in self.module.named_modules():
            if isinstance(part, _BatchNorm):
                yield f"{name}." if name else "", part

    def statistics(self) -> list[torch.Tensor]:
        """The averaged running statistics, which differ between ranks until they are shared."""
        parameters = {name for name, _ in self.module.named_parameters()}
        return [value for name, value in self.weights.items() if name not in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self._own():
            self.weights[name].lerp_(tensor.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the context, its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def teacher(self, forward: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """`forward` of the averaged model. In training its batch norms see the batch, but do not count it."""

        def answer(inputs: Any) -> torch.Tensor:
            with self.applied(), frozen_statistics(self.module):
                return forward(inputs)

        return answer

    @torch.no_grad()
    def _swap(self) -> None:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):  # engine.reshard=false keeps the gathered weights of a forward pass
                part.reshard()
        for name, tensor in self._own():
            own = tensor.detach().clone()
            tensor.detach().copy_(self.weights[name])
            self.weights[name].copy_(own)


def share_statistics(module: nn.Module, average: Average | None) -> None:
    """Give batch norms, and their average, the mean of the ranks' running statistics: all ranks score the same model.

    Every rank must call it.
    """
    world = dist.get_world_size()
    if world == 1:
        return
    buffers = [] if average is None else average.statistics()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            buffers += [b for b in (part.running_mean, part.running_var) if b is not None]
    for buffer in buffers:
        dist.all_reduce(buffer)
        buffer /= world
