"""Pre-norm transformer block with a key mask; imports torch only, knows nothing of images or ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head self-attention on `F.scaled_dot_product_attention`, so that the fastest kernel at hand is used.

    Args:
        width: D, a multiple of `heads`.
        heads: number of heads.
        qkv_bias: whether q, k and v have a bias (MONAI's ViT: no).
        dropout: on the attention weights and on the output.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); key_mask (B, L) bool, False keys are not attended to, None attends to all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Linear, GELU, Linear with dropout after each, as in ViT."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        x = F.dropout(F.gelu(self.linear1(x)), self.dropout, self.training)
        return F.dropout(self.linear2(x), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (ViT, Dosovitskiy et al. 2021).

    Args:
        width: D.
        heads: number of heads.
        mlp_dim: hidden width of the MLP.
        qkv_bias: see `Attention`.
        dropout: see `Attention`.
        spare_norm: keep the cross-attention norm that MONAI's ViT block owns and never uses. It is frozen, and here so
            that MONAI's weights load one to one and parameter counts agree.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        spare_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_dim, dropout)
        self.norm_cross_attn = nn.LayerNorm(width).requires_grad_(False) if spare_norm else None
        self.checkpoint = False

    def _forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), key_mask)
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); see `Attention` for the mask."""
        if self.checkpoint and self.training:
            # Inside the block, not around it: a sharding hook on the block then stays outside the recomputation.
            return checkpoint(self._forward, x, key_mask, use_reentrant=False)
        return self._forward(x, key_mask)
