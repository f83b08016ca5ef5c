"""Cuts the leaves of a frame into tokens, region by region; a frame in memory is a frame of one region.

Cells of at least `base_px` pixels are made of the sums that the scan of a region left, so only the smallest leaves have
their pixels read again. Regions are aligned powers of two, as leaves are: a leaf lies inside a region, or covers whole
regions, and the leaves of a region are one run of the Morton order. Box means come from integer sums, rounded half up
once, hence do not depend on the regions. Imports no files or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges.scan import WHITE, Reader, RegionSpec, base_px
from data_prep.tokens.token_set import TokenSet, check_leaves, content_counts
from data_prep.tree.box_sums import Sums, sum_pyramid
from data_prep.tree.quadtree import Leaves, morton

_AGAIN_PX = 512  # pixels of a large region are read again, here and there, in aligned squares of this side
_ALL_PX = 2048  # side of the squares where no sums are at hand, so that all pixels are read
Rows = dict[str, NDArray[Any]]


def region_rows(
    sums: Rows,
    leaves: Leaves,
    spec: RegionSpec,
    corner_xy: tuple[int, int],
    read_rgb: Reader,
    read_mask: Reader | None,
) -> Rows:
    """The part of the tokens that lies in one region.

    Args:
        sums: `sums` and, with a mask, `mask_sums` of the region's scan. Empty without a scan: every leaf must lie
            inside the region then, and is made from its pixels.
        leaves: all leaves of the frame in Morton order.
        spec: the frame.
        corner_xy: top left of the region.
        read_rgb: colours of a rectangle (x, y, w, h) of the frame's content, (h, w, 3) uint8.
        read_mask: class ids of a rectangle, (h, w) uint8, or None.

    Returns:
        Either `rows` (first, stop), `tokens` (n, p, p, 3) and `masks` (n, p, p, K) of the leaves inside the region. Or,
        if one leaf covers it, `leaf` (row), `at` (row, column of a cell) and either `tokens` (m, m, 3) and `masks`
        (m, m, K), the cells from `at` on, or `total` (3 + K,), the region's share of the one cell that covers it.

    Raises:
        ValueError: the mask has a class id above `spec.classes`.
    """
    x, y = corner_xy
    side, p = spec.side_px, spec.patch
    codes = morton(leaves.xy[:, 0], leaves.xy[:, 1])
    code = morton(np.array(x), np.array(y))
    first = int(np.searchsorted(codes, code, side="right")) - 1
    stop = int(np.searchsorted(codes, code + np.uint64(side * side)))
    region = _Region(sums, spec, corner_xy, read_rgb, read_mask)
    size = int(leaves.size[first])
    if size > side:
        return region.covered(first, leaves.xy[first].tolist(), size // p)
    sizes = leaves.size[first:stop]
    local = leaves.xy[first:stop] - np.array([x, y], np.int32)
    tokens = np.full((stop - first, p, p, 3), WHITE, np.uint8)
    masks = np.zeros((stop - first, p, p, spec.classes), np.uint32)
    large = (sizes // p >= region.base) & bool(sums)
    if large.any():
        region.from_sums(np.flatnonzero(large), local, sizes, tokens, masks)
    if not large.all():
        region.from_pixels(np.flatnonzero(~large), local, sizes, tokens, masks)
    return {"rows": np.array([first, stop], np.int64), "tokens": tokens, "masks": masks}


class _Region:
    """Colours and mask of one region, as sums or as pixels read again."""

    def __init__(
        self,
        sums: Rows,
        spec: RegionSpec,
        corner_xy: tuple[int, int],
        read_rgb: Reader,
        read_mask: Reader | None,
    ) -> None:
        self.sums, self.spec, self.base, self.corner_xy = sums, spec, base_px(spec), corner_xy
        self.read_rgb, self.read_mask = read_rgb, read_mask

    def from_sums(
        self,
        rows: NDArray[Any],
        local: NDArray[Any],
        sizes: NDArray[Any],
        tokens: NDArray[np.uint8],
        masks: NDArray[np.uint32],
    ) -> None:
        """Make those `rows` of the leaves whose cells are no smaller than the squares of the scan."""
        spec, b = self.spec, self.base
        local, sizes = local[rows], sizes[rows]
        for which, level, squares in _leaf_sums(self.sums["sums"], WHITE * b * b, b, local, sizes, spec.patch):
            tokens[rows[which]] = _box_means(squares, level).transpose(0, 2, 3, 1)
        for k in range(spec.classes):
            plane = self.sums["mask_sums"][k : k + 1]
            if plane.any():
                for which, _, squares in _leaf_sums(plane, b * b, b, local, sizes, spec.patch):
                    masks[rows[which], :, :, k] = squares[:, 0]

    def from_pixels(
        self,
        rows: NDArray[Any],
        local: NDArray[Any],
        sizes: NDArray[Any],
        tokens: NDArray[np.uint8],
        masks: NDArray[np.uint32],
    ) -> None:
        """Make those `rows` from pixels, square by square, each read once; what lies in padding stays white."""
        spec = self.spec
        local, sizes = local[rows], sizes[rows]
        least_px = _AGAIN_PX if self.sums and spec.side_px > 2 * _AGAIN_PX else _ALL_PX
        side = min(spec.side_px, max(least_px, int(sizes.max())))
        column, row = (local // side).astype(np.int64).T
        number = row * (spec.side_px // side) + column
        # Leaves in Morton order: those of a square stand together.
        starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(number)], strict=True):
            corner = np.array([column[start], row[start]], np.int32) * side
            x, y = (int(a) for a in self.corner_xy + corner)
            if x >= spec.content_wh[0] or y >= spec.content_wh[1]:
                continue
            here, inside, sides = rows[start:stop], local[start:stop] - corner, sizes[start:stop]
            for which, level, cells in _leaf_sums(self._planes(x, y, side), WHITE, 1, inside, sides, spec.patch):
                tokens[here[which]] = _box_means(cells, level).transpose(0, 2, 3, 1)
            for k, plane in self._classes(x, y, side):
                for which, _, cells in _leaf_sums(plane, 1, 1, inside, sides, spec.patch):
                    masks[here[which], :, :, k] = cells[:, 0]

    def covered(self, leaf: int, leaf_xy: list[int], cell: int) -> Rows:
        """The region is a part of one larger leaf."""
        spec, b = self.spec, self.base
        side = spec.side_px
        at = np.array([(self.corner_xy[1 - i] - leaf_xy[1 - i]) // cell for i in (0, 1)], np.int64)
        found: Rows = {"leaf": np.array(leaf, np.int64), "at": at}
        if cell > side:
            total = _squares(self.sums["sums"], WHITE * b * b, side // b)[:, 0, 0]
            if spec.classes:
                total = np.concatenate([total, _squares(self.sums["mask_sums"], b * b, side // b)[:, 0, 0]])
            return {**found, "total": total.astype(np.uint64)}
        m = side // cell
        masks = np.zeros((m, m, spec.classes), np.uint32)
        level = cell.bit_length() - 1
        if cell >= b:
            colours = _squares(self.sums["sums"], WHITE * b * b, cell // b)
            for k in range(spec.classes):
                masks[:, :, k] = _squares(self.sums["mask_sums"][k : k + 1], b * b, cell // b)[0]
        else:
            colours = _squares(self._planes(*self.corner_xy, side), WHITE, cell)
            for k, plane in self._classes(*self.corner_xy, side):
                masks[:, :, k] = _squares(plane, 1, cell)[0]
        return {**found, "tokens": _box_means(colours, level).transpose(1, 2, 0), "masks": masks}

    def _planes(self, x: int, y: int, side: int) -> NDArray[np.uint8]:
        """Red, green and blue of a square, (3, side, side)."""
        planes = np.empty((3, side, side), np.uint8)
        rgb = padded(self.read_rgb, (x, y), side, self.spec.content_wh)
        cv2.split(np.ascontiguousarray(rgb), [planes[0], planes[1], planes[2]])
        return planes

    def _classes(self, x: int, y: int, side: int) -> Iterator[tuple[int, Sums]]:
        """Where each class is in a square, (1, side, side) uint8; classes that are not there are left out."""
        if self.read_mask is None:
            return
        ids = padded(self.read_mask, (x, y), side, self.spec.content_wh, mask=True)
        top = int(ids.max())
        if top > self.spec.classes:
            raise ValueError(f"the mask has class {top}, but only classes 1 to {self.spec.classes} are expected")
        for k in range(top):
            plane = (ids == k + 1).view(np.uint8)
            if plane.any():
                yield k, plane[None]


def padded(
    read: Reader, corner_xy: tuple[int, int], side: int, content_wh: tuple[int, int], *, mask: bool = False
) -> NDArray[np.uint8]:
    """A square of the frame, (side, side, 3) or (side, side) uint8, of which only the content is read."""
    x, y = corner_xy
    w, h = (min(side, length - at) for length, at in zip(content_wh, corner_xy, strict=True))
    if w == h == side:
        return read(x, y, side, side)
    square = np.zeros((side, side), np.uint8) if mask else np.full((side, side, 3), WHITE, np.uint8)
    if w > 0 and h > 0:
        square[:h, :w] = read(x, y, w, h)
    return square


def held(read: Reader, content_wh: tuple[int, int]) -> Reader:
    """`read` from a copy of the content."""
    whole = read(0, 0, *content_wh)
    return lambda x_px, y_px, w_px, h_px: whole[y_px : y_px + h_px, x_px : x_px + w_px]


def _squares(planes: Sums, top: int, step: int) -> Sums:
    """Sums of (C, T, T) over step x step entries, (C, T / step, T / step)."""
    c, t = planes.shape[:2]
    return sum_pyramid(planes.reshape(c * t, t), top, step.bit_length() - 1)[-1].reshape(c, t // step, t // step)


def _leaf_sums(
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


def _box_means(sums: Sums, level: int) -> NDArray[np.uint8]:
    """Sums over cells of 4**level pixels to means, rounded half up."""
    if level == 0:
        return sums.astype(np.uint8, copy=False)
    shift = 2 * level
    wide = sums.astype(np.uint64)
    return ((wide + np.uint64(1 << (shift - 1))) >> np.uint64(shift)).astype(np.uint8)


def assemble(leaves: Leaves, parts: Iterable[Rows], spec: RegionSpec) -> TokenSet:
    """All regions' rows as one token set.

    Args:
        leaves: tiling of the frame in Morton order, every side a power of two times p.
        parts: what `region_rows` gave for every region that has content, in any order.
        spec: the frame.

    Returns:
        One token per leaf, the exact box means of its pixels, rounded half up; a region without content is white.

    Raises:
        ValueError: leaves that do not tile the frame, or are smaller than p; p no power of two.
    """
    n, p, side, kinds = len(leaves.size), spec.patch, spec.side_px, spec.classes
    check_leaves(leaves, p, spec.size_px)
    cell = (leaves.size // p).astype(np.uint64)
    # Cells larger than a region: white until a region says otherwise.
    big = {int(row): np.full((p, p, 3), WHITE * cell[row] ** 2, np.uint64) for row in np.flatnonzero(cell > side)}
    tokens, masks = np.zeros((0, p, p, 3), np.uint8), np.zeros((0, p, p, kinds), np.uint32)
    for part in parts:
        if "rows" in part and len(part["tokens"]) == n:  # the frame is one region: no copy
            tokens, masks = part["tokens"], part["masks"]
            continue
        if not len(tokens):
            tokens, masks = np.full((n, p, p, 3), WHITE, np.uint8), np.zeros((n, p, p, kinds), np.uint32)
        if "rows" in part:
            first, stop = part["rows"].tolist()
            tokens[first:stop] = part["tokens"]
            masks[first:stop] = part["masks"]
            continue
        leaf, (i, j) = int(part["leaf"]), part["at"].tolist()
        if "total" in part:
            big[leaf][i, j] -= np.uint64(WHITE * side * side)
            big[leaf][i, j] += part["total"][:3]
            masks[leaf, i, j] += part["total"][3:].astype(np.uint32)
            continue
        m = len(part["tokens"])
        tokens[leaf, i : i + m, j : j + m] = part["tokens"]
        masks[leaf, i : i + m, j : j + m] = part["masks"]
    for row, total in big.items():
        area = cell[row] ** 2
        tokens[row] = ((total + area // np.uint64(2)) // area).astype(np.uint8)
    content = content_counts(leaves.xy, leaves.size, p, spec.content_wh)
    return TokenSet(tokens, leaves.xy, leaves.size, content, masks if kinds else None, spec.size_px, spec.content_wh)


def interpolated(read_rgb: Reader, leaves: Leaves, spec: RegionSpec) -> NDArray[np.uint8]:
    """(N, p, p, 3) uint8: every leaf shrunk by OpenCV's bicubic interpolation, which does not look over its border."""
    squares = zip(leaves.xy.tolist(), leaves.size.tolist(), strict=True)
    shrunk = [
        cv2.resize(padded(read_rgb, (x, y), side, spec.content_wh), (spec.patch,) * 2, interpolation=cv2.INTER_CUBIC)
        for (x, y), side in squares
    ]
    return np.stack(shrunk).astype(np.uint8, copy=False)
