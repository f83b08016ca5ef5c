"""Pre-norm transformer block with a key mask. It knows nothing of images or ranks."""

from __future__ import annotations

from typing import Protocol, TypedDict, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import maybe_recompute
from hpc_models.blocks.linear_attention import Nystrom, Performer
from hpc_models.blocks.sdpa import KINDS, attend, attend_packed, attend_window, merge_heads, split_heads

LINEAR = ("performer_relu", "performer_softmax", "nystrom")
ALL_KINDS = (*KINDS, *LINEAR)


class AttentionOptions(TypedDict, total=False):
    """Options of a block's attention; see `make_attention`.

    qkv_bias: q, k and v have a bias; not by default, as in MONAI's ViT. Linear kinds have the biases of their papers.
    dropout: on the attention weights and the output, and after both maps of the MLP; 0 by default.
    kind: full (each token attends to all valid ones, the default), packed (the same, computed on valid tokens only),
    window (within `window` consecutive tokens), performer_relu, performer_softmax (random features) or nystrom.
    window: tokens per window, 256 by default; for nystrom the number of landmarks.
    """

    qkv_bias: bool
    dropout: float
    kind: str
    window: int


class Exchange(Protocol):
    """Turns a sequence spread over ranks into heads spread over ranks, and back (Ulysses). The launcher provides it."""

    def to_heads(self, x: Tensor) -> Tensor:
        """(B, H, L / P, d) of this rank's tokens to (B, H / P, L, d) of all tokens."""

    def to_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `to_heads`: (B, H / P, L, d) to (B, H, L / P, d)."""

    def split(self, x: Tensor) -> Tensor:
        """(B, L, ...) on every rank to this rank's (B, ceil(L / P), ...), zeros behind the end."""

    def join(self, x: Tensor, length: int) -> Tensor:
        """Inverse of `split`: all ranks' tokens on every rank."""

    def whole_mask(self, valid: Tensor | None, b: int, length: int, device: torch.device) -> Tensor | None:
        """The key mask of the whole padded sequence, (B, P * ceil(L / P)), or None."""


class Attention(nn.Module):
    """Multi-head self-attention on the fastest kernel at hand (`hpc_models.blocks.sdpa`); see `AttentionOptions`.

    Attributes:
        exchange: how this rank's tokens meet the tokens of other ranks, set by the launcher; None on one rank.
    """

    def __init__(self, width: int, heads: int, **options: Unpack[AttentionOptions]) -> None:
        super().__init__()
        kind, window = options.get("kind", "full"), options.get("window", 256)
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if kind not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(ALL_KINDS)}, got {kind!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.heads, self.kind, self.window = heads, kind, window
        self.dropout = options.get("dropout", 0.0)
        self.exchange: Exchange | None = None
        self.qkv = nn.Linear(width, 3 * width, bias=options.get("qkv_bias", False))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """(B, L, D), or packed sequences (T, D) one after another, to the same shape.

        Args:
            x: token vectors.
            key_mask: (B, L) bool, False keys are not attended to. An exchange needs the mask of the whole sequence.
            lengths: (N,) int64, tokens of each packed sequence.
        """
        p = self.dropout if self.training else 0.0
        if lengths is not None:
            if self.exchange is not None:
                raise ValueError("packed sequences cannot be spread over ranks; use attention=full")
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
            x = attend_packed(q, k, v, lengths, p).flatten(1)
        else:
            x = merge_heads(self._attend(*split_heads(self.qkv(x), self.heads), key_mask, p))
        return F.dropout(self.out_proj(x), self.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
        if self.exchange is not None:
            q, k, v = (self.exchange.to_heads(part) for part in (q, k, v))
        if self.kind == "window":
            x = attend_window(q, k, v, self.window, key_mask, dropout)
        else:
            x = attend(q, k, v, key_mask, dropout)
        return x if self.exchange is None else self.exchange.to_tokens(x)


def make_attention(width: int, heads: int, **options: Unpack[AttentionOptions]) -> nn.Module:
    """The attention of a block: softmax attention, or a kind that is linear in the tokens.

    Raises:
        ValueError: unknown kind, or a width that the heads do not divide.
    """
    kind, dropout = options.get("kind", "full"), options.get("dropout", 0.0)
    if kind not in LINEAR:
        return Attention(width, heads, **options)

    if kind != "nystrom":
        return Performer(width, heads, kind.removeprefix("performer_"), dropout=dropout)
    return Nystrom(width, heads, options.get("window", 256), dropout)


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

    `spare_norm` adds the frozen norm that MONAI's ViT block owns and never uses. MONAI's weights then load one to one.
    """

    def __init__(
        self, width: int, heads: int, mlp_dim: int, *, spare_norm: bool = False, **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = make_attention(width, heads, **options)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_dim, options.get("dropout", 0.0))
        self.norm_cross_attn = nn.LayerNorm(width).requires_grad_(False) if spare_norm else None
        self.checkpoint = False

    def _forward(self, x: Tensor, key_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        more = () if lengths is None else (lengths,)  # only softmax attention packs
        x = x + self.attn(self.norm1(x), key_mask, *more)
        return cast(Tensor, x + self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """(B, L, D) or packed (T, D) to the same; see `Attention` for mask and lengths."""
        # The recomputation lies inside the block, so that a sharding hook on the block stays outside of it.
        y: Tensor = maybe_recompute(self, self._forward, x, key_mask, lengths)
        return y
