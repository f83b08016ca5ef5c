"""Sequence parallelism after Ulysses: a sequence spread over ranks becomes heads spread over ranks, and back.

Jacobs et al., DeepSpeed Ulysses (2023). Each rank of a group holds L / P tokens through norms and MLPs. Around the
attention one all-to-all gives it all L tokens of H / P heads. Before and after the encoder every rank of the group has
the whole sequence. Gradients need no care. Every rank uses the joined tokens for the same loss, so the group's sum is P
times a rank's share. The mean over all ranks divides P away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import nn

from launch.config.config import ConfigError


class Ulysses:
    """The exchange of one group of neighbouring ranks (`hpc_models.blocks.attention.Exchange`)."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, L / P, d) of this rank's tokens to (B, H / P, L, d) of all tokens."""
        b, h, n, d = x.shape
        x = x.reshape(b, self.size, h // self.size, n, d).transpose(0, 1).contiguous()
        x = fc.all_to_all_single_autograd(x, None, None, self.group)  # first axis: whose tokens
        return x.permute(1, 2, 0, 3, 4).reshape(b, h // self.size, self.size * n, d)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H / P, L, d) of all tokens to (B, H, L / P, d) of this rank's."""
        b, h, n, d = x.shape
        x = x.reshape(b, h, self.size, n // self.size, d).permute(2, 0, 1, 3, 4).contiguous()
        x = fc.all_to_all_single_autograd(x, None, None, self.group)  # first axis: whose heads
        return x.transpose(0, 1).reshape(b, h * self.size, n // self.size, d)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) on every rank to this rank's (B, ceil(L / P), ...), zeros behind the end."""
        short = -x.shape[1] % self.size
        if short:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
        return x.chunk(self.size, dim=1)[self.rank].contiguous()

    def join(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """Inverse of `split`: all ranks' tokens on every rank, (B, length, D)."""
        whole: torch.Tensor = _Join.apply(x, self.group)  # type: ignore[no-untyped-call]
        return whole[:, :length]

    def whole_mask(self, valid: torch.Tensor | None, b: int, length: int, device: torch.device) -> torch.Tensor | None:
        """The key mask (B, P * ceil(L / P)) of the whole padded sequence; None when nothing is masked."""
        short = -length % self.size
        if valid is None and not short:
            return None
        if valid is None:
            valid = torch.ones(b, length, dtype=torch.bool, device=device)
        return F.pad(valid, (0, short))


class _Join(torch.autograd.Function):
    """All-gather along the sequence; the backward pass sums all ranks' gradients of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        """(B, n, D) to (B, P * n, D)."""
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, P * n, D) to (B, n, D)."""
        parts = [part.contiguous() for part in gradients[0].chunk(dist.get_world_size(ctx.group), dim=1)]
        summed = torch.empty_like(parts[0])
        if gradients[0].is_cuda:
            dist.reduce_scatter(summed, parts, group=ctx.group)
        else:  # gloo has no reduce_scatter of lists
            whole = torch.stack(parts)
            dist.all_reduce(whole, group=ctx.group)
            summed = whole[dist.get_rank(ctx.group)]
        return summed, None


def spread_sequences(model: nn.Module, ranks: int) -> None:
    """Make the transformer encoders of a model share every sequence among `ranks` neighbouring ranks.

    Raises:
        ConfigError: The model has no such encoder, packs its sequences, or its heads cannot be shared equally.
    """
    from hpc_models.blocks.vit_encoder import ViTEncoder

    world = dist.get_world_size()
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
    exchange = Ulysses(groups[dist.get_rank() // ranks])
    encoders = [module for module in model.modules() if isinstance(module, ViTEncoder)]
    if not encoders:
        raise ConfigError(f"engine.sequence={ranks}: the model has no transformer over a sequence of tokens")
    for encoder in encoders:
        if encoder.kind != "full":
            raise ConfigError(f"engine.sequence={ranks} needs model.attention=full, got {encoder.kind}")
        heads = encoder.blocks[0].attn.heads  # type: ignore[union-attr]
        if heads % ranks:  # type: ignore[operator]
            raise ConfigError(f"engine.sequence={ranks} does not divide the {heads} attention heads")
        encoder.spread(exchange)
