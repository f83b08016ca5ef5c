"""ViT encoder over a sequence of token vectors. It returns the hidden states that a decoder taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.attention import Attention, AttentionOptions, Block, Exchange
from hpc_models.tokens.batch import pack, unpack


class ViTEncoder(nn.Module):
    """Transformer blocks and a final norm; kind "packed" computes norms and maps on valid tokens only, too.

    `taps` names 0-based blocks whose outputs are returned without norm, in this order. See `Block` for `spare_norm`
    and `AttentionOptions` for the options.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        *,
        taps: Sequence[int] = (),
        spare_norm: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.kind = options.get("kind", "full")
        self.exchange: Exchange | None = None
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_dim, spare_norm=spare_norm, **options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks on x (B, L, D), with a key mask `valid` (B, L) bool where there is padding.

        Returns:
            The normed output (B, L, D) and the tapped hidden states, each (B, L, D).
        """
        if self.exchange is not None:
            return self._shared(x, valid, self.exchange)
        if self.kind == "packed" and valid is not None:
            return self._packed(x, valid)
        if valid is not None and x.shape[1] > 1:
            return self._trimmed(x, valid)
        return self._dense(x, valid)

    def _trimmed(self, x: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Without the padding that all sequences of the batch have at their end.

        Trees have 3 n + 1 leaves, and often one or two tokens of padding. Without them no mask is left, and attention
        may use its fastest kernel.
        """
        length = x.shape[1]
        longest = max(1, int(torch.where(valid, torch.arange(1, length + 1, device=x.device), 0).max()))
        kept = valid[:, :longest]
        last, taps = self._dense(x[:, :longest], None if bool(kept.all()) else kept)
        if longest == length:
            return last, taps
        return F.pad(last, (0, 0, 0, length - longest)), [F.pad(t, (0, 0, 0, length - longest)) for t in taps]

    def _dense(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Every token through every block, with a key mask where there is padding."""
        x, taps = self._run(x, None if valid is None else _attendable(valid))
        return self.norm(x), taps

    def _run(self, x: Tensor, *where: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """All blocks; `where` is the mask, and the lengths of packed sequences."""
        hidden = []
        for block in self.blocks:
            x = block(x, *where)
            hidden.append(x)
        return x, [hidden[i] for i in self.taps]

    def spread(self, exchange: Exchange) -> None:
        """Share every sequence among ranks (kind="full"): each rank runs the blocks on its tokens; see `Exchange`."""
        self.exchange = exchange
        for block in self.blocks:
            cast(Attention, cast(Block, block).attn).exchange = exchange

    def _shared(self, x: Tensor, valid: Tensor | None, exchange: Exchange) -> tuple[Tensor, list[Tensor]]:
        """The blocks on this rank's part of the tokens; the results are whole again."""
        length = x.shape[1]
        valid = None if valid is None else _attendable(valid)
        mask = exchange.whole_mask(valid, x.shape[0], length, x.device)
        x, parts = self._run(exchange.split(x), mask)
        taps = [exchange.join(part, length) for part in parts]
        return exchange.join(self.norm(x), length), taps

    def _packed(self, x: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The blocks on valid tokens only; padding gets zeros."""
        rows, taps = self._run(pack(x, valid), None, valid.sum(dim=1))
        return unpack(self.norm(rows), x, valid), [unpack(tap, x, valid) for tap in taps]


def _attendable(valid: Tensor) -> Tensor:
    """An image without any token would have a softmax over nothing (NaN), so it attends to its zeros."""
    return valid | ~valid.any(dim=1, keepdim=True)
