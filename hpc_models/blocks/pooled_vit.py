"""Transformer blocks that turn a sequence into one vector."""

from __future__ import annotations

from typing import Unpack, cast

import torch
from torch import Tensor, nn

from hpc_models.blocks.attention import AttentionOptions
from hpc_models.blocks.init import init_linears, set_norm_eps
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.tokens.batch import clear_padding
from hpc_models.tokens.position import resize_table, table_rows


class PooledViT(nn.Module):
    """A learned table of positions, transformer blocks, and one vector per sequence.

    Args:
        width: D.
        depth: transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the MLPs; None: 4 * width.
        pool: "cls" (an extra token with its own row of the table) or "mean" of the valid tokens.
        table_hw: grid of the table; (1, L) for plain sequences, None: no table.
        **options: see `AttentionOptions`; q, k and v have a bias.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        mlp_dim: int | None = None,
        pool: str = "cls",
        table_hw: tuple[int, int] | None = None,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        self.table_hw = table_hw
        self.cls = nn.Parameter(torch.zeros(1, 1, width)) if pool == "cls" else None
        rows = 0 if table_hw is None else table_hw[0] * table_hw[1] + (pool == "cls")
        self.table = nn.Parameter(torch.zeros(1, rows, width)) if rows else None
        options["qkv_bias"] = True
        self.vit = ViTEncoder(width, depth, heads, mlp_dim or 4 * width, **options)
        init_linears(self.vit)
        set_norm_eps(self.vit, 1e-6)
        for parameter in (self.cls, self.table):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def _rows(self, count: int, slot: Tensor | None, grid_hw: tuple[int, int] | None) -> Tensor:
        """Rows of the table for the tokens, (1 or B, count, D)."""
        assert self.table is not None and self.table_hw is not None
        table = self.table if self.cls is None else self.table[:, 1:]
        if slot is None and grid_hw is not None:
            return resize_table(table, self.table_hw, grid_hw)
        return table_rows(table, count, slot)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        slot: Tensor | None = None,
        grid_hw: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, L, D) token vectors to (B, D).

        Args:
            x: token vectors.
            valid: (B, L) bool; None: every token is real.
            slot: (B, L) int64 rows of the table; None: row i for token i.
            grid_hw: grid of the tokens in raster order. The table is interpolated to it.
        """
        if self.table is not None:
            x = x + self._rows(x.shape[1], slot, grid_hw)
        x = clear_padding(x, valid)
        if self.cls is not None:
            first = self.cls if self.table is None else self.cls + self.table[:, :1]
            x = torch.cat((first.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
            mask = None if valid is None else torch.cat((valid.new_ones(len(valid), 1), valid), dim=1)
            return cast(Tensor, self.vit(x, mask)[0][:, 0])
        x, _ = self.vit(x, valid)
        if valid is None:
            return x.mean(dim=1)
        return clear_padding(x, valid).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
