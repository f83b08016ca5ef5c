"""ASAM: gradients at the worst weights nearby, near being measured relative to each weight.

Kwon et al.: ASAM (ICML 2021), equation 6 with element-wise normalisation. A step is: gradients at w, `perturb`,
gradients at w + eps (in place of the first), `restore`, optimiser step. `neighbourhood` does all but the passes and the
optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RHO = 0.05  # HCT's; ASAM's own default is 0.5
Saved = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def perturb(parameters: Iterable[Tensor], rho: float = RHO) -> Saved:
    """Move every parameter by eps = rho w^2 g / || |w| g ||, the norm over all parameters; so || eps / |w| || = rho.

    The gradients are means over the whole batch. Parameters without gradient stay. Sharded parameters (DTensor) need
    the call on all ranks.

    Returns:
        The parameters with copies of their values, for `restore`.

    Raises:
        ValueError: rho is not positive.
    """
    if rho <= 0:
        raise ValueError(f"rho must be positive, got {rho}")
    moved = [(p, p.grad) for p in parameters if p.grad is not None]
    if not moved:
        return []
    norm = torch.nn.utils.get_total_norm([p.abs() * g for p, g in moved])
    if hasattr(norm, "full_tensor"):  # a DTensor holds only this rank's part of the sum
        norm = norm.full_tensor()
    # A tensor, so that nobody waits for the device. Where all |w| g are zero, so is every eps.
    scale = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    saved: Saved = []
    for p, g in moved:
        saved.append((p, p.detach().clone()))
        p.add_(p.square() * g * scale.to(p.dtype))
    return saved


@torch.no_grad()
def restore(saved: Saved) -> None:
    """Put the parameters back, bit for bit; their gradients stay."""
    for p, value in saved:
        p.copy_(value)


@contextmanager
def neighbourhood(parameters: Iterable[Tensor], rho: float = RHO) -> Iterator[None]:
    """Hold parameters at w + eps, without their first gradients, for the second pass; then put them back to w.

    Batch norm would count the batch twice: see `hpc_models.blocks.checkpointing.frozen_statistics`.
    """
    saved = perturb(parameters, rho)
    for p, _ in saved:
        p.grad = None
    try:
        yield
    finally:
        restore(saved)
