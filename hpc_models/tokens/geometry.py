"""Where a leaf lies: Morton codes, owner maps, painting tokens to a raster and back.

Coordinates: frame pixels (x right, y down). A raster of side G over a frame of side R = size_px has pixels of R / G
frame pixels. R, G, leaf sides and p are powers of two, and so are their ratios. Places are int64, since 65,536 squared
does not fit 32 bits.

Shapes: leaf_xy (B, L, 2) int64 in any order, leaf_size (B, L) int64, valid (B, L) bool, False for padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FAR = 2**62  # larger than any Morton code of 31-bit coordinates: padding sorts behind every leaf


def morton_code(xy: Tensor) -> Tensor:
    """(..., 2) int64 below 2^31 to (...,) int64: the bits of both coordinates interleaved, x in the even bits."""
    code = torch.zeros_like(xy[..., 0])
    for axis in (0, 1):
        v = xy[..., axis].to(torch.int64)
        for shift, mask in (
            (16, 0x0000FFFF0000FFFF),
            (8, 0x00FF00FF00FF00FF),
            (4, 0x0F0F0F0F0F0F0F0F),
            (2, 0x3333333333333333),
            (1, 0x5555555555555555),
        ):
            v = (v | (v << shift)) & mask
        code = code | (v << axis)
    return code


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def centres_xy(size_px: int, side: int, device: torch.device) -> Tensor:
    """Frame pixel at, or right and below of, the centre of each raster pixel: (side*side, 2) int64 in raster order."""
    i = torch.arange(side, device=device)
    centre = (2 * i + 1) * size_px // (2 * side)
    return torch.stack((centre.repeat(side), centre.repeat_interleave(side)), dim=-1)


def owner_of(points_xy: Tensor, leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor) -> Tensor:
    """Which leaf covers each of the points (P, 2) or (B, P, 2): its row, (B, P) int64, or -1.

    A leaf is an aligned square, so its pixels are one interval of Morton codes. With leaves sorted by their first code,
    a point needs one binary search.
    """
    b = leaf_xy.shape[0]
    start = torch.where(valid, morton_code(leaf_xy), FAR)
    start, order = torch.sort(start, dim=1, stable=True)
    points = points_xy.expand(b, *points_xy.shape[-2:])
    code = morton_code(points)
    slot = torch.searchsorted(start, code, right=True) - 1
    row = torch.gather(order, 1, slot.clamp(min=0))
    xy = torch.gather(leaf_xy, 1, row[..., None].expand(-1, -1, 2))
    side = torch.gather(leaf_size, 1, row)
    offset = points - xy
    covered = ((offset >= 0) & (offset < side[..., None])).all(-1) & torch.gather(valid, 1, row) & (slot >= 0)
    return torch.where(covered, row, -1)


def owner_map(leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor, size_px: int, side: int) -> Tensor:
    """(B, side, side) int64: row of the leaf that covers each cell's centre in a grid over the frame, or -1."""
    points = centres_xy(size_px, side, leaf_xy.device)
    return cast(Tensor, owner_of(points, leaf_xy, leaf_size, valid).unflatten(1, (side, side)))


def tokens_to_grid(x: Tensor, owner: Tensor) -> Tensor:
    """Give each grid cell the vector of its leaf: (B, L, D) and (B, g, g) to (B, D, g, g); zero for owner -1."""
    b, g, _ = owner.shape
    flat = owner.reshape(b, -1)
    rows = torch.gather(x, 1, flat.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    rows = rows.masked_fill((flat < 0)[..., None], 0)
    return cast(Tensor, rows.transpose(1, 2).unflatten(2, (g, g)))


def paint(values: Tensor, leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor, size_px: int, side: int) -> Tensor:
    """Paint values of cells (B, L, p, p, C) to a raster (B, C, side, side), the inverse of cutting leaves to patches.

    A raster pixel inside a cell takes the cell's value. A pixel that spans several cells takes their mean by area. A
    pixel without leaf is zero. With side = size_px this is the full-size picture of the tokens.
    """
    b, n, p, _, c = values.shape
    device = values.device
    points = centres_xy(size_px, side, device)
    row = owner_of(points, leaf_xy, leaf_size, valid)
    safe = row.clamp(min=0)
    cell = _cell_at(points, safe, leaf_xy, leaf_size, p)
    index = (safe * p + cell[..., 1]) * p + cell[..., 0]
    flat = values.reshape(b, n * p * p, c)
    painted = torch.gather(flat, 1, index[..., None].expand(-1, -1, c))
    painted = painted.masked_fill((row < 0)[..., None], 0)

    if side < size_px:
        painted = _add_small_cells(painted, flat, leaf_xy, leaf_size * valid, size_px, side, p)
    return cast(Tensor, painted.transpose(1, 2).unflatten(2, (side, side)))


def _add_small_cells(
    painted: Tensor, flat: Tensor, leaf_xy: Tensor, leaf_size: Tensor, size_px: int, side: int, p: int
) -> Tensor:
    """Replace raster pixels that span several cells by their mean by area; leaf_size is 0 for padding."""
    b, _, c = flat.shape
    small = (leaf_size > 0) & (leaf_size * side < size_px * p)
    area = (leaf_size.to(torch.float32) * side / (size_px * p)) ** 2 * small
    at = torch.arange(p, device=flat.device)
    xy = leaf_xy[:, :, None] * p + at[:, None] * leaf_size[..., None, None]  # (B, L, p, 2) in 1/p frame pixels
    pixel = (xy * side).div(size_px * p, rounding_mode="floor").clamp(0, side - 1)
    target = (pixel[:, :, :, None, 1] * side + pixel[:, :, None, :, 0]).reshape(b, -1, 1)
    weight = area[:, :, None, None].expand(-1, -1, p, p).reshape(b, -1, 1)
    contribution = torch.where(weight > 0, flat.to(torch.float32) * weight, 0)
    total = contribution.new_zeros(b, side * side, c).scatter_add(1, target.expand(-1, -1, c), contribution)
    covered = weight.new_zeros(b, side * side, 1).scatter_add(1, target, weight)
    return torch.where(covered > 0, (total / covered.clamp(min=1e-12)).to(painted.dtype), painted)


def raster_to_cells(raster: Tensor, leaf_xy: Tensor, leaf_size: Tensor, size_px: int, p: int) -> Tensor:
    """Read (B, L, p, p, K) from a raster (B, K, G, G): the mean over a cell, or the raster pixel around a smaller cell.

    A cell is an aligned square of 2^j raster pixels, so the means come from a pyramid of 2x2 means. Padding, of size 0,
    gets the top-left value.
    """
    # The pyramid.
    b, k, side, _ = raster.shape
    n = leaf_xy.shape[1]
    level_raster, levels, offsets, total = raster, [], [], 0
    while True:
        levels.append(level_raster.flatten(2))
        offsets.append(total)
        total += level_raster.shape[-1] ** 2
        if level_raster.shape[-1] == 1:
            break
        level_raster = F.avg_pool2d(level_raster, 2)
    pyramid = torch.cat(levels, dim=2).transpose(1, 2)  # (B, 4/3 G^2, K)

    device = raster.device
    # Its level for each leaf. At j, cells have 2^j raster pixels: leaf_size * G = 2^j * R * p, in exact integers.
    ratio = leaf_size * side
    level = torch.zeros_like(leaf_size)
    for j in range(1, len(levels)):
        level += ratio >= (size_px * p) << j
    at = torch.arange(p, device=device)
    xy = leaf_xy[:, :, None] * p + at[:, None] * leaf_size[..., None, None]  # (B, L, p, 2) in 1/p frame pixels
    pixel_size = (size_px * p) * torch.bitwise_left_shift(torch.ones_like(level), level)
    pixel = (xy * side).div(pixel_size[..., None, None], rounding_mode="floor")
    width = torch.bitwise_right_shift(torch.full_like(level, side), level)[:, :, None, None]
    base = torch.tensor(offsets, device=device)[level][:, :, None, None]
    index = base + pixel[:, :, :, None, 1] * width + pixel[:, :, None, :, 0]
    cells = torch.gather(pyramid, 1, index.reshape(b, -1, 1).expand(-1, -1, k))
    return cells.reshape(b, n, p, p, k)


def halo_patches(tokens: Tensor, leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor, size_px: int, halo: int) -> Tensor:
    """Widen patches (B, L, p, p, C) on each side by `halo` cells of their own size, read from the leaves around.

    A halo cell takes the neighbour's cell that covers its centre: exact where the neighbour is as fine or coarser, a
    sample where it is finer. Outside the frame, and around padding, it is zero.
    """
    b, n, p, _, c = tokens.shape
    q = p + 2 * halo
    row, cell, inside, _ = _around(leaf_xy, leaf_size, valid, size_px, [p], halo)
    index = (row * p + cell[..., 1]) * p + cell[..., 0]
    values = torch.gather(tokens.reshape(b, n * p * p, c), 1, index[..., None].expand(-1, -1, c))
    wide = tokens.new_zeros(b, n, q, q, c)
    wide[:, :, halo : halo + p, halo : halo + p] = tokens
    slots = ring_steps(p, halo)[1].to(tokens.device)
    wide.flatten(2, 3)[:, :, slots] = values.masked_fill(~inside[..., None], 0).unflatten(1, (n, -1))
    return wide


def ring_steps(side: int, halo: int = 1) -> tuple[Tensor, Tensor]:
    """The cells around a square of side x side cells, up to `halo` away, on the CPU.

    Returns:
        (Q, 2) int64 (x, y) from the square's first cell, and (Q,) int64 place of each in raster order in the square of
        side + 2 halo cells. Q = 4 side + 4 for a halo of 1.
    """
    steps, slots = _ring_steps(side, halo)
    return torch.from_numpy(steps.copy()), torch.from_numpy(slots.copy())


@lru_cache(maxsize=64)
def _ring_steps(side: int, halo: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`ring_steps` as arrays: a kept tensor would stay fake if the first caller works with fake tensors."""
    at = np.arange(-halo, side + halo)
    cells = np.stack((np.tile(at, len(at)), np.repeat(at, len(at))), axis=-1)
    edge = ((cells < 0) | (cells >= side)).any(axis=-1)
    return cells[edge], np.flatnonzero(edge)


@lru_cache(maxsize=64)
def _all_steps(sides: tuple[int, ...], halo: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The steps of all sides one after the other, (Q, 2), and the side of each, (Q,)."""
    rings = [_ring_steps(side, halo)[0] for side in sides]
    return np.concatenate(rings), np.repeat(np.array(sides, np.int64), [len(ring) for ring in rings])


def _around(
    leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor, size_px: int, sides: Sequence[int], halo: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What covers the centres of every leaf's `ring_steps` for all sides one after the other, Q in all.

    Returns:
        Row (B, L * Q), cell (B, L * Q, 2), whether there is one (B, L * Q), and the side of each step (L * Q,).
    """
    steps, side = (torch.from_numpy(values).to(leaf_xy.device) for values in _all_steps(tuple(sides), halo))
    centre = torch.div((2 * steps + 1) * leaf_size[..., None, None], 2 * side[:, None], rounding_mode="floor")
    points = (leaf_xy[:, :, None] + centre).flatten(1, 2)
    inside = ((points >= 0) & (points < size_px)).all(-1)
    row = owner_of(points.clamp(0, size_px - 1), leaf_xy, leaf_size, valid)
    inside &= row >= 0
    row = row.clamp(min=0)
    side = side.repeat(leaf_size.shape[1])
    return row, _cell_at(points, row, leaf_xy, leaf_size, side[:, None]), inside, side


def _cell_at(points_xy: Tensor, row: Tensor, leaf_xy: Tensor, leaf_size: Tensor, side: int | Tensor) -> Tensor:
    """Cell (x, y) of each point, (B, P, 2), in the leaf of the given row (B, P), which has side x side cells."""
    offset = points_xy - torch.gather(leaf_xy, 1, row[..., None].expand(-1, -1, 2))
    size = torch.gather(leaf_size, 1, row).clamp(min=1)
    return (offset * side).div(size[..., None], rounding_mode="floor").clamp(min=0).clamp(max=side - 1)


def ring_cells(
    leaf_xy: Tensor, leaf_size: Tensor, valid: Tensor | None, size_px: int, sides: Sequence[int]
) -> list[Tensor]:
    """Which cells cover the ring around every leaf, when leaves have side x side cells; valid None: no padding.

    All sides are done together, since most of the work does not depend on the number of points.

    Returns:
        Per side (M, 4 side + 4) int64 in the order of `ring_steps`: index of a cell among all M * side * side cells of
        the batch's M leaves, or -1.
    """
    b, n = leaf_size.shape
    everyone = torch.ones_like(leaf_size, dtype=torch.bool) if valid is None else valid
    row, cell, inside, side = _around(leaf_xy, leaf_size, everyone, size_px, sides)
    place = (everyone.flatten().cumsum(0) - 1).unflatten(0, (b, n))  # of each row among the leaves of the batch
    leaf = torch.gather(place, 1, row)
    index = torch.where(inside, (leaf * side + cell[..., 1]) * side + cell[..., 0], -1).unflatten(1, (n, -1))
    rows = index.flatten(0, 1) if valid is None else index[valid]
    return list(rows.split([4 * side + 4 for side in sides], dim=1))
