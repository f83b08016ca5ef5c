"""ViT encoder over a sequence of token vectors, returning the hidden states the decoder taps; imports torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.attention import Attention, AttentionOptions, Block, Exchange
from hpc_models.tokens.batch import pack, unpack


class ViTEncoder(nn.Module):
    """Transformer blocks and a final norm; kind "packed" runs norms and maps on the valid tokens alone, too.

    Args:
        width: D.
        depth: number of blocks.
        heads: heads per block.
        mlp_dim: hidden width of the MLPs.
        taps: 0-based blocks whose outputs are returned (un-normed), in the order given.
        spare_norm: see `Block`.
        **options: see `AttentionOptions`.
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
        """Run the blocks.

        Args:
            x: (B, L, D).
            valid: (B, L) bool key mask, None when every token is real.

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

        Trees have 3 n + 1 leaves and lengths are often other numbers: with the last one or two tokens gone, no mask is
        left, and attention may use its fastest kernel.
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
        if valid is not None:
            # An image without any token would have a softmax over nothing (NaN): let it attend to its zeros.
            valid = valid | ~valid.any(dim=1, keepdim=True)
        hidden = []
        for block in self.blocks:
            x = block(x, valid)
            hidden.append(x)
        return self.norm(x), [hidden[i] for i in self.taps]

    def spread(self, exchange: Exchange) -> None:
        """Share every sequence among ranks (kind="full"): each runs the blocks on its tokens (see `Exchange`)."""
        self.exchange = exchange
        for block in self.blocks:
            cast(Attention, cast(Block, block).attn).exchange = exchange

    def _shared(self, x: Tensor, valid: Tensor | None, exchange: Exchange) -> tuple[Tensor, list[Tensor]]:
        """The same with this rank's part of the tokens; what comes back is whole again."""
        length = x.shape[1]
        if valid is not None:
            valid = valid | ~valid.any(dim=1, keepdim=True)
        mask = exchange.whole_mask(valid, x.shape[0], length, x.device)
        x = exchange.split(x)
        hidden = []
        for block in self.blocks:
            x = block(x, mask)
            hidden.append(x)
        taps = [exchange.join(hidden[i], length) for i in self.taps]
        return exchange.join(self.norm(x), length), taps

    def _packed(self, x: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same on valid tokens only; zeros stand where padding was."""
        lengths = valid.sum(dim=1)
        rows = pack(x, valid)
        hidden = []
        for block in self.blocks:
            rows = block(rows, None, lengths)
            hidden.append(rows)
        return unpack(self.norm(rows), x, valid), [unpack(hidden[i], x, valid) for i in self.taps]
