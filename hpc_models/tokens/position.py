"""Position codes of a token: a learned table of slots and Fourier features of the leaf."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.settings import DataShape


class LeafPosition(nn.Module):
    """Code of a leaf's centre and size, of width D: Fourier features through a small MLP.

    Features: sin and cos of 2^k pi x / R and 2^k pi y / R for k = 0..bands-1, the same of log2(size) over its range
    with 4 bands, and the three numbers themselves. The finest band has a period of two smallest leaves (side `patch`),
    so neighbours differ. The coarsest band tells the halves of the frame (side `size_px`) apart.
    """

    def __init__(self, size_px: int, patch: int, width: int) -> None:
        super().__init__()
        self.size_px = size_px
        self.log_range = max(1.0, math.log2(size_px))
        self.bands = max(4, int(math.log2(max(1, size_px // patch))) + 1)
        features = 3 + 2 * 2 * self.bands + 2 * 4
        hidden = min(width, 256)
        first, second = nn.Linear(features, hidden), nn.Linear(hidden, width)
        for layer, gain in ((first, 2.0), (second, 1.0)):
            # Codes are of order one from the start, so that place and scale are visible before training.
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.GELU(), second)

    def features(self, leaf_xy: Tensor, leaf_size: Tensor) -> Tensor:
        """(B, L, 2) and (B, L) int64 to (B, L, F) float32; finite for padding (size 0) too."""
        size = leaf_size.to(torch.float32)
        centre = (leaf_xy.to(torch.float32) + 0.5 * size[..., None]) / self.size_px
        log_size = torch.log2(size.clamp(min=1.0))[..., None] / self.log_range
        turns = math.pi * 2.0 ** torch.arange(self.bands, device=leaf_xy.device, dtype=torch.float32)
        xy_angle = (centre[..., None] * turns).flatten(-2)
        size_angle = log_size * turns[:4]
        return torch.cat((centre, log_size, xy_angle.sin(), xy_angle.cos(), size_angle.sin(), size_angle.cos()), dim=-1)

    def forward(self, leaf_xy: Tensor, leaf_size: Tensor) -> Tensor:
        """(B, L, 2) and (B, L) int64 to (B, L, D)."""
        # The angles are computed in float32; under sharded mixed precision the weights are bf16 from here on.
        return cast(Tensor, self.mlp(self.features(leaf_xy, leaf_size).to(next(self.mlp.parameters()).dtype)))


class Position(nn.Module):
    """Sum of the chosen codes, of width D.

    Kind "slot" is a learned table with one row per slot of the sequence, as ViT and the authors of APF have. "geom" is
    `LeafPosition`. The others are "both" and "none".
    """

    def __init__(self, kind: str, data: DataShape, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, data.length, width)) if kind in ("slot", "both") else None
        self.geom = LeafPosition(data.size_px, data.patch, width) if kind in ("geom", "both") else None
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, slot: Tensor | None, leaf_xy: Tensor, leaf_size: Tensor) -> Tensor:
        """Add the codes to x (B, L, D) of leaves at leaf_xy (B, L, 2) with sides leaf_size (B, L); see `table_rows`."""
        if self.table is not None:
            x = x + table_rows(self.table, x.shape[1], slot)
        if self.geom is not None:
            x = x + self.geom(leaf_xy, leaf_size)
        return x


def table_rows(table: Tensor, count: int, slot: Tensor | None) -> Tensor:
    """Rows of a learned table (1, L, D) for `count` tokens: `slot` (B, count) int64, or row i for token i.

    Raises:
        ValueError: the sequence is longer than the table.
    """
    if count > table.shape[1]:
        raise ValueError(f"sequence of {count} tokens, but the slot table has length={table.shape[1]}")
    return table[:, :count] if slot is None else table[0][slot]


def raster_slots(leaf_xy: Tensor, patch: int, cells: int) -> Tensor:
    """(B, L) int64: place of equal leaves of `patch` px in raster order, `cells` a side; padding gets some place."""
    place = leaf_xy.div(patch, rounding_mode="floor").clamp(0, cells - 1)
    return place[..., 1] * cells + place[..., 0]


def resize_table(table: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """A learned table (1, h * w, D) in raster order for another grid, by bicubic interpolation (as DeiT does)."""
    if old_hw == new_hw:
        return table
    picture = table.transpose(1, 2).unflatten(2, old_hw)
    return F.interpolate(picture, size=new_hw, mode="bicubic").flatten(2).transpose(1, 2)
