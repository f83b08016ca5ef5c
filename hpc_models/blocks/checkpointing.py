"""Activation checkpointing that leaves batch norm's running statistics alone; imports torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics inside `module` do not move within the context: a batch must not be counted twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    momenta = [m.momentum for m in norms]
    counts = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum, count in zip(norms, momenta, counts, strict=True):
            m.momentum = momentum
            if count is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(count)


def maybe_recompute(owner: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args); its activations are computed again in the backward pass where `owner` trains with checkpointing.

    For functions without batch norm, whose running statistics `recompute` looks after.

    Args:
        owner: has the switch `checkpoint`.
        function: of tensors, and of what needs no gradient.
    """
    if owner.checkpoint and owner.training:
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def recompute(owner: nn.Module, module: nn.Module, *args: Any) -> Tensor:
    """As `maybe_recompute`, for a module that may have batch norm: running statistics count a batch once."""
    y: Tensor
    if owner.checkpoint and owner.training:
        y = checkpoint(
            module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(module))
        )
    else:
        y = module(*args)
    return y
