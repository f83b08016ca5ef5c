"""The running average of a model's weights, over whatever this rank holds of them."""

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
    """Exponential moving average a <- decay * a + (1 - decay) * w of the parameters, shard by shard.

    The running statistics of batch norms are averaged too: the newest ones do not fit an average over thousands of
    steps. The first steps use the smaller decay (1 + t) / (10 + t), so that the starting weights fade soon.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        # The average, by the names of parameters and buffers.
        self.weights = {name: tensor.detach().clone() for name, tensor in self._own()}

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is averaged, as the module has it now."""
        yield from self.module.named_parameters()
        for name, norm in self.module.named_modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
                prefix = f"{name}." if name else ""
                yield f"{prefix}running_mean", norm.running_mean
                yield f"{prefix}running_var", norm.running_var

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
        """The model has the averaged weights inside the context, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def teacher(self, forward: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """`forward` of the averaged model; its batch norms use the batch but do not update their statistics."""

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
    """Give batch norms and their average the mean of all ranks' running statistics; every rank must call it."""
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
