"""Starting values that several models share."""

from __future__ import annotations

import math

from torch import Tensor, nn


def set_prior(bias: Tensor | None, prior: float | None) -> None:
    """Fill the last layer's bias with logit(prior), so that training starts at the expected share of foreground.

    Without a prior the bias stays as it is.
    """
    if prior is not None and bias is not None:
        nn.init.constant_(bias, math.log(prior / (1 - prior)))


def set_norm_eps(module: nn.Module, eps: float) -> None:
    """Give all layer norms inside `module` this epsilon: torch has 1e-5, the authors of vision transformers 1e-6."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps


def init_linears(module: nn.Module, std: float = 0.02) -> None:
    """Start linear maps inside `module` as vision transformers do: truncated normal weights, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
