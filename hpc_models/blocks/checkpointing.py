"""Activation checkpointing that leaves batch norm's running statistics alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics inside `module` still, so that a batch is not counted twice."""
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
    """function(*args), recomputed in the backward pass where `owner.checkpoint` is on in training.

    Functions with batch norm need `recompute`, which looks after the running statistics.
    """
    if owner.checkpoint and owner.training:
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def recompute(owner: nn.Module, module: nn.Module, *args: Any) -> Tensor:
    """`maybe_recompute` for a module that may have batch norm."""
    if not (owner.checkpoint and owner.training):
        return cast(Tensor, module(*args))
    contexts = partial(_contexts, module)
    return cast(Tensor, checkpoint(module, *args, use_reentrant=False, context_fn=contexts))


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), frozen_statistics(module)
