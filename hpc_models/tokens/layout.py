"""How a sequence of tokens becomes the square picture a convolutional decoder needs, and back.

`SequenceLayout` writes the tokens row by row in sequence order, as the authors of APF did; the picture then has little
to do with the image. `GeometricLayout` puts each token where its leaf lies. `leaves_to_strip` mixes leaves as the
authors' packing does.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, cut_patches, join_patches
from hpc_models.tokens.geometry import is_power_of_two, owner_map, paint, raster_to_cells, tokens_to_grid


def cells_of(data: DataShape) -> int:
    """Smallest leaves per side of the frame, R / p.

    Raises:
        ValueError: no tree has these sizes, or there is no token.
    """
    if data.length < 1:
        raise ValueError(f"length must be at least 1, got {data.length}")
    if data.size_px % data.patch or not is_power_of_two(data.size_px // data.patch):
        raise ValueError(f"size_px must be patch * 2^k, got {data.size_px} with patch {data.patch}")
    return data.size_px // data.patch


def grid_side(length: int, cells: int, grid: int | None = None) -> int:
    """Side of the picture in tokens that `GeometricLayout` paints: `grid`, or chosen.

    The choice is the smallest power of two with at least L cells, and at most `cells` = R / p.

    Raises:
        ValueError: not a power of two, or finer than the smallest leaf.
    """
    if grid is None:
        return min(1 << max(0, math.ceil(math.log2(length) / 2)), cells)
    if not is_power_of_two(grid) or grid > cells:
        raise ValueError(f"grid must be a power of two of at most size_px / patch = {cells}, got {grid}")
    return grid


class SequenceLayout:
    """sqrt(L) x sqrt(L) blocks in sequence order; output block i belongs to token i.

    Raises:
        ValueError: L is not a perfect square.
    """

    def __init__(self, length: int, patch: int) -> None:
        self.side = math.isqrt(length)
        self.patch = patch
        if self.side**2 != length:
            raise ValueError(f"sequence order needs a perfect square of tokens, got {length}; use {self.side**2}")

    def image(self, tokens: Tensor) -> Tensor:
        """(B, L, p, p, C) to (B, C, g*p, g*p): the patches side by side."""
        return join_patches(tokens, self.side, self.side)

    def to_grid(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, D, g, g)."""
        return cast(Tensor, x.transpose(1, 2).unflatten(2, (self.side, self.side)))

    def to_cells(self, logits: Tensor) -> Tensor:
        """(B, K, g*p, g*p) to (B, L, p, p, K)."""
        return cut_patches(logits, self.patch)


class GeometricLayout:
    """g x g cells over the frame of side R; each takes the token of the leaf that covers its centre, or zero.

    The picture has p pixels per grid cell and side. With uniform leaves and g = R / p it is the image itself.
    """

    def __init__(self, batch: Batch, size_px: int, patch: int, grid: int) -> None:
        self.xy, self.size, self.valid = batch["leaf_xy"], batch["leaf_size"], batch["valid"]
        self.size_px, self.patch, self.grid = size_px, patch, grid
        self.owner = owner_map(self.xy, self.size, self.valid, size_px, grid)

    def image(self, tokens: Tensor) -> Tensor:
        """(B, L, p, p, C) to (B, C, g*p, g*p): the picture painted from the tokens."""
        return paint(tokens, self.xy, self.size, self.valid, self.size_px, self.grid * self.patch)

    def to_grid(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, D, g, g)."""
        return tokens_to_grid(x, self.owner)

    def to_cells(self, logits: Tensor) -> Tensor:
        """(B, K, g*p, g*p) to (B, L, p, p, K): means over large cells, the nearest pixel for small ones."""
        return raster_to_cells(logits, self.xy, self.size, self.size_px, self.patch)


def leaves_to_strip(x: Tensor, valid: Tensor) -> Tensor:
    """Mix the leaves of each image, (B, L, p, p, K), as `pack_strip` of `data_prep`: a token gets rows of p leaves.

    Of n leaves, row r of leaf i, the row i * p + r of all, becomes row (i * p + r) // n of token (i * p + r) % n.
    The leaves come first in `valid` (B, L); rows of padding stay where they are.
    """
    return _transpose_rows(x, valid, x.shape[2])


def strip_to_leaves(x: Tensor, valid: Tensor) -> Tensor:
    """The inverse of `leaves_to_strip`."""
    return _transpose_rows(x, valid, _leaves(valid))


def _leaves(valid: Tensor) -> Tensor:
    return valid.sum(1, keepdim=True).clamp(min=1)


def _transpose_rows(x: Tensor, valid: Tensor, height: Tensor | int) -> Tensor:
    """The n * p rows of each image's leaves as a table of `height` rows, read down its columns.

    Packing transposes a table of p rows, unpacking a table of n rows.
    """
    length, p = x.shape[1:3]
    rows = _leaves(valid) * p
    row = torch.arange(length * p, device=x.device)
    source = torch.where(row < rows, row % height * (rows // height) + row // height, row)
    return cast(Tensor, x.flatten(1, 2).take_along_dim(source[..., None, None], 1).unflatten(1, (length, p)))
