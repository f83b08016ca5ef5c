"""The running average of a model's weights, on whatever this rank holds of them; imports torch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Exponential moving average of the parameters: a <- decay * a + (1 - decay) * w after every step.

    The first steps use the smaller decay (1 + t) / (10 + t), so that the average does not stay at the starting weights.

    Args:
        module: The wrapped model; sharded parameters are averaged shard by shard.
        decay: In (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.module.named_parameters():
            self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the context, its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            own = parameter.detach().clone()
            parameter.detach().copy_(self.weights[name])
            self.weights[name].copy_(own)
