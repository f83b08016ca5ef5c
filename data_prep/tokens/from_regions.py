"""Tokens of a frame from its regions: what one region knows of the leaves, and all regions put together.

The counterpart of `tokens.cut` for frames that no one holds. Cells of at least `base_px` pixels are made of the sums
that the scan of the region left, so only the smallest leaves have their pixels read again. Imports no files or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges.region_spec import WHITE, RegionSpec, base_px
from data_prep.tokens.token_set import Reader, TokenSet, box_means, check_leaves, content_counts, leaf_sums, mask_tile
from data_prep.tree.box_sums import Sums, sum_pyramid
from data_prep.tree.quadtree import Leaves, morton

_SQUARE_PX = 512  # pixels are read again in aligned squares of this side
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
        sums: `sums` and, with a mask, `mask_sums` of the region's scan.
        leaves: all leaves of the frame in Morton order.
        spec: the frame.
        corner_xy: top left of the region.
        read_rgb: colours of a rectangle of the frame.
        read_mask: class ids of a rectangle, or None.

    Returns:
        Either `rows` (first, stop), `tokens` (n, p, p, 3) and `masks` (n, p, p, K) of the leaves inside the region. Or,
        if one leaf covers it, `leaf` (row), `at` (row, column of a cell) and either `tokens` (m, m, 3) and `masks`
        (m, m, K), the cells from `at` on, or `total` (3 + K,), the region's share of the one cell that covers it.
    """
    x, y = corner_xy
    side, p = spec.side_px, spec.patch
    codes = morton(leaves.xy[:, 0], leaves.xy[:, 1])
    code = morton(np.array(x), np.array(y))
    first = int(np.searchsorted(codes, code, side="right")) - 1
    stop = int(np.searchsorted(codes, code + np.uint64(side * side)))
    layers = _Layers(sums, spec, corner_xy, read_rgb, read_mask)
    size = int(leaves.size[first])
    if size > side:
        return layers.covered(first, leaves.xy[first].tolist(), size // p)
    sizes = leaves.size[first:stop]
    local = leaves.xy[first:stop] - np.array([x, y], np.int32)
    tokens = np.empty((stop - first, p, p, 3), np.uint8)
    masks = np.zeros((stop - first, p, p, spec.classes), np.uint32)
    large = np.flatnonzero(sizes // p >= base_px(spec))
    if len(large):
        layers.from_sums(large, local[large], sizes[large], tokens, masks)
    small = np.flatnonzero(sizes // p < base_px(spec))
    if len(small):
        layers.from_pixels(small, local[small], sizes[small], tokens, masks)
    return {"rows": np.array([first, stop], np.int64), "tokens": tokens, "masks": masks}


class _Layers:
    """Colours and mask of one region, as sums or as pixels read again."""

    def __init__(
        self,
        sums: Rows,
        spec: RegionSpec,
        corner_xy: tuple[int, int],
        read_rgb: Reader,
        read_mask: Reader | None,
    ) -> None:
        self.sums, self.spec, self.corner_xy = sums, spec, corner_xy
        self.read_rgb, self.read_mask = read_rgb, read_mask

    def from_sums(
        self,
        rows: NDArray[Any],
        local: NDArray[Any],
        sizes: NDArray[Any],
        tokens: NDArray[np.uint8],
        masks: NDArray[np.uint32],
    ) -> None:
        """Leaves whose cells are no smaller than the squares of the scan."""
        spec, b = self.spec, base_px(self.spec)
        for which, level, squares in leaf_sums(self.sums["sums"], WHITE * b * b, b, local, sizes, spec.patch):
            tokens[rows[which]] = box_means(squares, level).transpose(0, 2, 3, 1)
        for k in range(spec.classes):
            plane = self.sums["mask_sums"][k : k + 1]
            if plane.any():
                for which, _, squares in leaf_sums(plane, b * b, b, local, sizes, spec.patch):
                    masks[rows[which], :, :, k] = squares[:, 0]

    def from_pixels(
        self,
        rows: NDArray[Any],
        local: NDArray[Any],
        sizes: NDArray[Any],
        tokens: NDArray[np.uint8],
        masks: NDArray[np.uint32],
    ) -> None:
        """Leaves with smaller cells: their pixels again, square by square, each once."""
        spec = self.spec
        side = min(spec.side_px, max(_SQUARE_PX, int(sizes.max())))
        squares = local // side
        number = squares[:, 1].astype(np.int64) * (spec.side_px // side) + squares[:, 0]
        for n in np.unique(number).tolist():
            here = np.flatnonzero(number == n)
            row, column = divmod(n, spec.side_px // side)
            x, y = self.corner_xy[0] + column * side, self.corner_xy[1] + row * side
            inside = local[here] - np.array([column * side, row * side], np.int32)
            for which, level, cells in leaf_sums(self._planes(x, y, side), WHITE, 1, inside, sizes[here], spec.patch):
                tokens[rows[here[which]]] = box_means(cells, level).transpose(0, 2, 3, 1)
            for k, plane in self._classes(x, y, side):
                for which, _, cells in leaf_sums(plane, 1, 1, inside, sizes[here], spec.patch):
                    masks[rows[here[which]], :, :, k] = cells[:, 0]

    def covered(self, leaf: int, leaf_xy: list[int], cell: int) -> Rows:
        """The region is a part of one larger leaf."""
        spec, b = self.spec, base_px(self.spec)
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
        return {**found, "tokens": box_means(colours, level).transpose(1, 2, 0), "masks": masks}

    def _planes(self, x: int, y: int, side: int) -> NDArray[np.uint8]:
        """Red, green and blue of a square, (3, side, side)."""
        planes = np.empty((3, side, side), np.uint8)
        cv2.split(np.ascontiguousarray(self.read_rgb(x, y, side, side)), [planes[0], planes[1], planes[2]])
        return planes

    def _classes(self, x: int, y: int, side: int) -> Iterable[tuple[int, Sums]]:
        """Where each class is in a square, (1, side, side) uint8; classes that are not there are left out."""
        spec = self.spec
        if self.read_mask is None or x >= spec.content_wh[0] or y >= spec.content_wh[1]:
            return
        ids = mask_tile(self.read_mask, x, y, side, spec.content_wh, spec.classes)
        for k in range(int(ids.max())):
            plane = (ids == k + 1).view(np.uint8)
            if plane.any():
                yield k, plane[None]


def _squares(planes: Sums, top: int, step: int) -> Sums:
    """Sums of (C, T, T) over step x step entries, (C, T / step, T / step)."""
    c, t = planes.shape[:2]
    return sum_pyramid(planes.reshape(c * t, t), top, step.bit_length() - 1)[-1].reshape(c, t // step, t // step)


def assemble(leaves: Leaves, parts: Iterable[Rows], spec: RegionSpec) -> TokenSet:
    """All regions' rows as one token set.

    Args:
        leaves: all leaves.
        parts: what `region_rows` gave for every region that has content, in any order.
        spec: the frame.

    Returns:
        What `tokens.cut` gives; a region without content is white.

    Raises:
        ValueError: leaves that do not tile the frame.
    """
    n, p, side, kinds = len(leaves), spec.patch, spec.side_px, spec.classes
    check_leaves(leaves, p, spec.size_px)
    tokens = np.full((n, p, p, 3), WHITE, np.uint8)
    masks = np.zeros((n, p, p, kinds), np.uint32)
    cell = (leaves.size // p).astype(np.uint64)
    # Cells larger than a region: white until a region says otherwise.
    big = {int(row): np.full((p, p, 3), WHITE * cell[row] ** 2, np.uint64) for row in np.flatnonzero(cell > side)}
    for part in parts:
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
