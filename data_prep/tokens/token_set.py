"""Leaves to tokens and back: exact box means, mask and content counts per cell, and exact Dice from cells.

Imports the tree and the exact sums only; reading is a callable, so slides, frames and files stay outside. Every tile
is read once. Tiles are aligned powers of two, as leaves are: a leaf lies inside a tile or covers whole tiles, the
leaves of a tile are one run of the Morton order, and cells either lie inside a tile or (only if the leaf is more than
p tiles wide) are summed over tiles in a small accumulator. Box means come from integer sums, rounded half up, hence
do not depend on the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.system.powers_of_two import is_power_of_two
from data_prep.tree.box_sums import Sums, sum_pyramid
from data_prep.tree.quadtree import Leaves, check_tiling, morton

# read(x_px, y_px, w_px, h_px) -> (h, w, 3) uint8 colours, or (h, w) uint8 class ids
Reader = Callable[[int, int, int, int], NDArray[np.uint8]]

WHITE = 255  # what a frame shows outside the content


@dataclass(frozen=True)
class TokenSet:
    """What a model sees of one slide, and what a metric needs. Row i of everything is leaf i.

    Attributes:
        tokens: (N, p, p, 3) uint8, the leaf's pixels as box means (or, with `--resample cubic`, interpolated).
        leaf_xy: (N, 2) int32, top-left corner in frame pixels.
        leaf_size: (N,) int32, side in frame pixels.
        content_counts: (N, p, p) uint32, pixels of the cell that are content: no padding, inside the field of view.
        mask_counts: (N, p, p, K) uint32, content pixels of the cell that belong to class k + 1; None without a mask.
        size_px: side R of the frame.
        content_wh: width and height of the content at the frame's top left.
    """

    tokens: NDArray[np.uint8]
    leaf_xy: NDArray[np.int32]
    leaf_size: NDArray[np.int32]
    content_counts: NDArray[np.uint32]
    mask_counts: NDArray[np.uint32] | None
    size_px: int
    content_wh: tuple[int, int]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.leaf_size)

    # Training draws parts of one set thousands of times: what needs a look at every cell is looked up once.
    @cached_property
    def has_content(self) -> NDArray[np.bool_]:
        """(N,) which leaves have content."""
        return np.asarray(self.content_counts.any(axis=(1, 2)))

    @cached_property
    def foreground_cells(self) -> NDArray[np.integer[Any]]:
        """Flat indices into (N, p, p) of the cells with foreground of any class; there must be a mask."""
        assert self.mask_counts is not None
        return positions(self.mask_counts.any(axis=-1))


def positions(flags: Any) -> NDArray[np.integer[Any]]:
    """Flat indices of what is set in an array of bool, in four bytes each where those suffice."""
    found = np.flatnonzero(flags)
    return found.astype(np.int32) if flags.size <= 2**31 else found


@dataclass(frozen=True)
class _Layer:
    """One picture to be summed over cells: colours (three planes) or one class of the mask (one plane)."""

    planes: Sums  # (C, T, T)
    top: int  # largest value of a pixel
    out: NDArray[Any]  # (N, p, p, C), written in place
    big: NDArray[np.uint64]  # (B, p, p, C) sums of the cells larger than a tile
    mean: bool  # box mean rounded half up, or the plain sum


def cut(
    read_rgb: Reader,
    leaves: Leaves,
    p: int,
    size_px: int,
    content_wh: tuple[int, int],
    read_mask: Reader | None = None,
    classes: int = 1,
    tile_px: int = 2048,
) -> TokenSet:
    """Make one token per leaf in one pass over the frame.

    Args:
        read_rgb: colours of a rectangle of the frame, (h, w, 3) uint8; white in the padding.
        leaves: tiling of the frame in Morton order, every side a power of two times p.
        p: side of a patch, a power of two.
        size_px: side R of the frame.
        content_wh: width and height of the content; the rest is padding and is not read.
        read_mask: class ids of a rectangle of the frame, (h, w) uint8; None without annotation.
        classes: K, number of foreground classes 1..K.
        tile_px: largest side of what is read at once; the next power of two below is used. The result is the same
            for any value.

    Returns:
        The token set; tokens are exact box means of their leaf, rounded half up.

    Raises:
        ValueError: leaves that do not tile the frame or are smaller than p, p no power of two, or a mask with a class
            id above `classes`.
    """
    check_leaves(leaves, p, size_px)
    if tile_px < 1:
        raise ValueError(f"the tile must have at least one pixel, got {tile_px}")
    n, side = len(leaves), min(1 << (tile_px.bit_length() - 1), size_px)
    tokens = np.full((n, p, p, 3), WHITE, np.uint8)
    masks = None if read_mask is None else np.zeros((n, p, p, classes), np.uint32)
    cell = leaves.size // p
    row_of_big = np.cumsum(cell > side) - 1
    big = np.flatnonzero(cell > side)
    big_rgb, big_mask = np.zeros((len(big), p, p, 3), np.uint64), np.zeros((len(big), p, p, classes), np.uint64)
    codes = morton(leaves.xy[:, 0], leaves.xy[:, 1])
    planes = np.empty((3, side, side), np.uint8)
    for y in range(0, size_px, side):
        for x in range(0, size_px, side):
            code = morton(np.array(x), np.array(y))
            first = int(np.searchsorted(codes, code, side="right")) - 1
            stop = int(np.searchsorted(codes, code + np.uint64(side * side)))
            where = _Where(leaves, p, x, y, side, first, stop, row_of_big)
            if x >= content_wh[0] or y >= content_wh[1]:  # padding: tokens are white already
                where.add_padding(big_rgb)
                continue
            rgb = np.ascontiguousarray(read_rgb(x, y, side, side))
            cv2.split(rgb, [planes[0], planes[1], planes[2]])
            where.sum_into(_Layer(planes, WHITE, tokens, big_rgb, mean=True))
            if read_mask is not None and masks is not None:
                ids = mask_tile(read_mask, x, y, side, content_wh, classes)
                for k in range(classes):
                    plane = (ids == k + 1).view(np.uint8)
                    if plane.any():
                        where.sum_into(
                            _Layer(plane[None], 1, masks[..., k : k + 1], big_mask[..., k : k + 1], mean=False)
                        )
    if len(big):
        area = (cell[big].astype(np.uint64) ** 2)[:, None, None, None]
        tokens[big] = ((big_rgb + area // 2) // area).astype(np.uint8)
        if masks is not None:
            masks[big] = big_mask.astype(np.uint32)
    content = content_counts(leaves.xy, leaves.size, p, content_wh)
    return TokenSet(tokens, leaves.xy, leaves.size, content, masks, size_px, content_wh)


def check_leaves(leaves: Leaves, p: int, size_px: int) -> None:
    """Raise ValueError unless leaves tile the frame in Morton order and can be cut into p x p cells."""
    if not is_power_of_two(p):
        raise ValueError(f"the patch must be a power of two, got {p}")
    check_tiling(leaves, size_px)
    if int(leaves.size.min()) < p:
        raise ValueError(f"a leaf of {int(leaves.size.min())} px is smaller than the patch of {p} px")
    if int(leaves.size.max()) // p > 65535:  # 65536 squared does not fit the file's uint32 counts
        raise ValueError(f"a cell of {int(leaves.size.max()) // p} px is too large, use a patch of at least 2")


def mask_tile(
    read_mask: Reader, x: int, y: int, side: int, content_wh: tuple[int, int], classes: int
) -> NDArray[np.uint8]:
    """Class ids of a tile, 0 outside the content whatever the reader says there."""
    ids = np.zeros((side, side), np.uint8)
    w, h = min(side, content_wh[0] - x), min(side, content_wh[1] - y)
    ids[:h, :w] = read_mask(x, y, w, h)
    top = int(ids.max())
    if top > classes:
        raise ValueError(f"the mask has class {top}, but only classes 1 to {classes} are expected")
    return ids


@dataclass(frozen=True)
class _Where:
    """One tile and the leaves it touches: a run [first, stop) inside it, or the one leaf that covers it."""

    leaves: Leaves
    p: int
    x: int
    y: int
    side: int
    first: int
    stop: int
    row_of_big: NDArray[np.int64]

    def add_padding(self, big_rgb: NDArray[np.uint64]) -> None:
        """Count a white tile in the accumulator of the leaf that covers it, if that has one."""
        cell = int(self.leaves.size[self.first]) // self.p
        if cell > self.side:
            cy, cx = self._cell_of_tile(cell)
            big_rgb[self.row_of_big[self.first], cy, cx] += np.uint64(WHITE * self.side * self.side)

    def sum_into(self, layer: _Layer) -> None:
        """Add one picture of the tile to the cells of its leaves."""
        size = int(self.leaves.size[self.first])
        if size > self.side:
            self._covered(layer, size // self.p)
            return
        local = self.leaves.xy[self.first : self.stop] - np.array([self.x, self.y], np.int32)
        for rows, level, squares in leaf_sums(
            layer.planes, layer.top, 1, local, self.leaves.size[self.first : self.stop], self.p
        ):
            layer.out[self.first + rows] = _finish(squares, level, layer.mean).transpose(0, 2, 3, 1)

    def _covered(self, layer: _Layer, cell: int) -> None:
        """The tile is part of one larger leaf."""
        c, t = layer.planes.shape[0], self.side
        flat = layer.planes.reshape(c * t, t)
        if cell > t:
            cy, cx = self._cell_of_tile(cell)
            total = sum_pyramid(flat, layer.top, t.bit_length() - 1)[-1].reshape(c)
            layer.big[self.row_of_big[self.first], cy, cx] += total.astype(np.uint64)
            return
        level, n = cell.bit_length() - 1, t // cell
        sums = sum_pyramid(flat, layer.top, level)[-1].reshape(c, n, n)
        cy, cx = self._cell_of_tile(cell)
        layer.out[self.first, cy : cy + n, cx : cx + n] = _finish(sums, level, layer.mean).transpose(1, 2, 0)

    def _cell_of_tile(self, cell: int) -> tuple[int, int]:
        x, y = self.leaves.xy[self.first].tolist()
        return (self.y - y) // cell, (self.x - x) // cell


def leaf_sums(
    planes: Sums, top: int, base: int, local_xy: NDArray[Any], sizes: NDArray[Any], p: int
) -> Iterator[tuple[NDArray[np.int64], int, Sums]]:
    """Sums over the cells of leaves that lie inside one square of the frame.

    Args:
        planes: (C, T, T) sums over base x base pixels; base = 1 for the pixels themselves.
        top: largest possible value in `planes`.
        base: side of the squares that `planes` holds, in pixels, at most the smallest cell.
        local_xy: (M, 2) corners of the leaves relative to the square, pixels.
        sizes: (M,) sides of the leaves in pixels.
        p: cells per side of a leaf.

    Yields:
        For every size: rows (indices into the leaves), log2 of the cell's side in pixels, and (rows, C, p, p) sums.
    """
    c, t = planes.shape[:2]
    deepest = (int(sizes.max()) // p // base).bit_length() - 1
    sums = sum_pyramid(planes.reshape(c * t, t), top, deepest)
    for s in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == s)
        step, n = (s // p // base).bit_length() - 1, t * base // s
        ix, iy = local_xy[rows, 0] // s, local_xy[rows, 1] // s
        yield rows, (s // p).bit_length() - 1, sums[step].reshape(c, n, p, n, p)[:, iy, :, ix, :]


def box_means(sums: Sums, level: int) -> NDArray[np.uint8]:
    """Sums over cells of 4**level pixels to means, rounded half up."""
    if level == 0:
        return sums.astype(np.uint8, copy=False)
    shift = 2 * level
    wide = sums.astype(np.uint64)
    return ((wide + np.uint64(1 << (shift - 1))) >> np.uint64(shift)).astype(np.uint8)


def _finish(sums: Sums, level: int, mean: bool) -> Sums:
    """Sums over cells of 4**level pixels to what is stored."""
    return box_means(sums, level) if mean else sums


def content_counts(
    leaf_xy: NDArray[np.int32], leaf_size: NDArray[np.int32], p: int, content_wh: tuple[int, int]
) -> NDArray[np.uint32]:
    """Pixels of every cell inside the content, (N, p, p) uint32; a rectangle against a rectangle, so no pixel is read.

    Args:
        leaf_xy: (N, 2) top-left corners in frame pixels.
        leaf_size: (N,) sides in frame pixels.
        p: cells per side.
        content_wh: width and height of the content.
    """
    cell = (leaf_size // p).astype(np.int64)[:, None]
    start = np.arange(p) * cell
    across = np.clip(content_wh[0] - leaf_xy[:, 0:1] - start, 0, cell).astype(np.uint32)
    down = np.clip(content_wh[1] - leaf_xy[:, 1:2] - start, 0, cell).astype(np.uint32)
    return down[:, :, None] * across[:, None, :]  # below 2**32, see `check_leaves`


def in_view(token_set: TokenSet) -> TokenSet:
    """A token set whose last class counts pixels outside the field of view, with those taken out of the content."""
    assert token_set.mask_counts is not None
    outside = token_set.mask_counts[..., -1]
    return replace(
        token_set,
        content_counts=token_set.content_counts - outside,
        mask_counts=np.ascontiguousarray(token_set.mask_counts[..., :-1]),
    )


def rebuild(
    values: NDArray[Any], leaf_xy: NDArray[np.int32], leaf_size: NDArray[np.int32], size_px: int
) -> NDArray[Any]:
    """Paint per-cell values back over the pixels of their cells: the inverse of `cut`.

    Args:
        values: (N, p, p, ...) any type.
        leaf_xy: (N, 2) top-left corners in frame pixels.
        leaf_size: (N,) sides in frame pixels, multiples of p that divide size_px.
        size_px: side R of the frame.

    Returns:
        (R, R, ...) of the values' type; zero where no leaf lies.
    """
    p, rest = values.shape[1], values.shape[3:]
    raster = np.zeros((size_px, size_px, *rest), values.dtype)
    for s in np.unique(leaf_size).tolist():
        rows = np.flatnonzero(leaf_size == s)
        n, cell = size_px // s, s // p
        squares = raster.reshape(n, p, cell, n, p, cell, *rest)
        ix, iy = leaf_xy[rows, 0] // s, leaf_xy[rows, 1] // s
        squares[iy, :, :, ix] = values[rows][:, :, None, :, None]
    return raster
