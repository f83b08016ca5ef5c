"""Canny's hysteresis, exact across tiles: local components first, then one union over tile borders. Imports cells only.

`Canny(lo, hi)` is the set of 8-connected components of `Canny(lo, lo)` (weak pixels) that hold a strong pixel. Inside
a tile a component with a strong pixel is decided (on), and one without that touches no border is decided too (off).
The others stay open: a tile hands over their labels along its four sides and how many of their pixels lie in which
cell. Neighbouring labels that touch, corners included, are united; an open component is on iff its union holds an
on component. `resolve_tile` is a pure function of one tile, `merge_tiles` needs the tiles' results only, so tiles may
come from anywhere in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.cells import counts_from_map

Labels = NDArray[np.int64]

_NONE, _ON, _OPEN = 0, 1, 2  # label along a side: no edge, decided edge, first open component


@dataclass(frozen=True)
class TileEdges:
    """What is known of the edges of one tile before its neighbours are.

    Attributes:
        x_px, y_px, w_px, h_px: rectangle of the tile in the frame.
        sides: labels of the top row, bottom row, left column and right column; 0 none, 1 on, 2 + i open component i.
        n_open: number of open components.
        cell_xy: first cell (x, y) that the tile touches.
        counts: (gh, gw) int32, decided edge pixels in each cell from `cell_xy` on.
        open_cells: (M, 3) int64, rows (open component, flat index into `counts`, pixels).
        bits: the decided edge map, packed; None unless asked for.
        open_pixels: (2, Q) int64, open component and flat pixel index in the tile; None unless asked for.
    """

    x_px: int
    y_px: int
    w_px: int
    h_px: int
    sides: tuple[Labels, Labels, Labels, Labels]
    n_open: int
    cell_xy: tuple[int, int]
    counts: NDArray[np.int32]
    open_cells: NDArray[np.int64]
    bits: NDArray[np.uint8] | None
    open_pixels: NDArray[np.int64] | None

    def edge_map(self, lit: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The final (h, w) map, given which open components are edges. Needs `bits` and `open_pixels`."""
        assert self.bits is not None and self.open_pixels is not None
        edges = np.unpackbits(self.bits, count=self.h_px * self.w_px).astype(np.bool_)
        edges[self.open_pixels[1][lit[self.open_pixels[0]]]] = True
        return edges.reshape(self.h_px, self.w_px)


def resolve_tile(
    weak: NDArray[np.uint8], strong: NDArray[np.bool_], x_px: int, y_px: int, p_min: int, keep_map: bool = False
) -> TileEdges:
    """Decide what one tile can decide alone.

    Args:
        weak: (h, w) uint8, non-zero where the whole frame's Canny(lo, lo) is.
        strong: (h, w) bool, where the whole frame's Canny(hi, hi) is; a subset of weak.
        x_px: left column of the tile in the frame.
        y_px: top row of the tile in the frame.
        p_min: side of a counting cell, a power of two; cells may straddle tiles.
        keep_map: keep what `TileEdges.edge_map` needs.
    """
    h, w = weak.shape
    label: Any
    n, label = cv2.connectedComponentsWithAlgorithm(weak, 8, cv2.CV_32S, cv2.CCL_WU)
    on = np.zeros(n, np.bool_)
    on[label[strong]] = True
    edges = on[label]
    sides = (label[0], label[-1], label[:, 0], label[:, -1])
    border = np.unique(np.concatenate(sides))
    border = border[(border > 0) & ~on[border]]
    code = np.full(n, _NONE, np.int64)
    code[on] = _ON
    code[border] = _OPEN + np.arange(len(border))
    cell_xy = (x_px // p_min, y_px // p_min)
    counts = counts_from_map(_aligned(edges, x_px % p_min, y_px % p_min, p_min), p_min)
    pixels = _open_pixels(weak, edges, label, code) if len(border) else np.zeros((2, 0), np.int64)
    cx = (pixels[1] % w + x_px % p_min) // p_min
    cy = (pixels[1] // w + y_px % p_min) // p_min
    key, number = np.unique(pixels[0] * counts.size + cy * counts.shape[1] + cx, return_counts=True)
    return TileEdges(
        x_px,
        y_px,
        w,
        h,
        (code[sides[0]], code[sides[1]], code[sides[2]], code[sides[3]]),
        len(border),
        cell_xy,
        counts,
        np.stack([key // counts.size, key % counts.size, number], 1),
        np.packbits(edges) if keep_map else None,
        pixels if keep_map else None,
    )


def _open_pixels(
    weak: NDArray[np.uint8], edges: NDArray[np.bool_], label: NDArray[np.int32], code: Labels
) -> NDArray[np.int64]:
    index = np.flatnonzero((weak != 0) & ~edges)
    owner = code[label.ravel()[index]]
    keep = owner >= _OPEN
    return np.stack([owner[keep] - _OPEN, index[keep]])


def _aligned(edges: NDArray[np.bool_], left: int, top: int, p: int) -> NDArray[np.bool_]:
    """Pad the map with empty pixels to whole cells; the same array where it fits already."""
    h, w = edges.shape
    right, bottom = -(left + w) % p, -(top + h) % p
    if not (left or top or right or bottom):
        return edges
    return np.pad(edges, ((top, bottom), (left, right)))


@dataclass(frozen=True)
class Merged:
    """Edges of the whole frame.

    Attributes:
        counts: (G, G) int32 edge pixels per cell.
        tiles: the tiles, as they came.
        lit: for every tile, (n_open,) bool, which open components are edges.
    """

    counts: NDArray[np.int32]
    tiles: list[TileEdges]
    lit: list[NDArray[np.bool_]]

    def maps(self) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        """(x_px, y_px, edge map) of every tile; needs tiles resolved with `keep_map`."""
        for tile, lit in zip(self.tiles, self.lit, strict=True):
            yield tile.x_px, tile.y_px, tile.edge_map(lit)


def merge_tiles(tiles: Iterable[TileEdges], size_px: int, p_min: int) -> Merged:
    """Unite open components over the borders of tiles and count edge pixels per cell.

    Args:
        tiles: tiles cut along one grid of rows and columns; a missing tile has no edges. Their decided counts are
            added one by one as they come, only their small remains are kept.
        size_px: side R of the frame.
        p_min: side of a cell.
    """
    counts = np.zeros((size_px // p_min, size_px // p_min), np.int32)
    kept = []
    for tile in tiles:
        _add(counts, tile, tile.counts)
        kept.append(_without_counts(tile))
    start = np.cumsum([0, *(tile.n_open for tile in kept)])
    first, second = _touching(kept, start, size_px)
    root = _roots(int(start[-1]) + _OPEN, first, second)
    lit = [root[a + _OPEN : b + _OPEN] == _ON for a, b in itertools.pairwise(start.tolist())]
    for tile, flags in zip(kept, lit, strict=True):
        if flags.any():
            rows = tile.open_cells[flags[tile.open_cells[:, 0]]]
            late = np.bincount(rows[:, 1], rows[:, 2], tile.counts.size).astype(np.int32)
            _add(counts, tile, late.reshape(tile.counts.shape))
    return Merged(counts, kept, lit)


def _add(counts: NDArray[np.int32], tile: TileEdges, more: NDArray[np.int32]) -> None:
    x, y = tile.cell_xy
    counts[y : y + more.shape[0], x : x + more.shape[1]] += more


def _without_counts(tile: TileEdges) -> TileEdges:
    """The tile with its counts (already added) replaced by a zero of the same shape that takes no memory."""
    shape_only = np.broadcast_to(np.int32(0), tile.counts.shape)
    return TileEdges(**{**tile.__dict__, "counts": shape_only})


def _touching(tiles: list[TileEdges], start: NDArray[Any], size_px: int) -> tuple[Labels, Labels]:
    """Pairs of labels in 8-neighbourhood across tile borders. Labels: 0 none, 1 on, then all open components."""
    pairs = []
    for axis in (0, 1):  # borders between rows of tiles, then between columns
        lines: dict[int, tuple[Labels, Labels]] = {}
        for tile, offset in zip(tiles, start[:-1].tolist(), strict=True):
            begin, along = (tile.y_px, tile.x_px) if axis == 0 else (tile.x_px, tile.y_px)
            end = begin + (tile.h_px if axis == 0 else tile.w_px)
            for position, side, which in ((begin, 1, 2 * axis), (end, 0, 2 * axis + 1)):
                if position in (0, size_px):
                    continue
                if position not in lines:
                    lines[position] = (np.zeros(size_px, np.int64), np.zeros(size_px, np.int64))
                label = tile.sides[which]
                lines[position][side][along : along + len(label)] = np.where(label >= _OPEN, label + offset, label)
        for before, after in lines.values():
            pairs += [(before, after), (before[1:], after[:-1]), (before[:-1], after[1:])]
    found = [np.stack([a, b])[:, (a > 0) & (b > 0) & (a != b)] for a, b in pairs]
    both = np.concatenate([np.zeros((2, 0), np.int64), *found], 1)
    return both[0], both[1]


def _roots(n: int, first: Labels, second: Labels) -> Labels:
    """Smallest label of every component of the graph on 0..n-1 with edges first[i] - second[i].

    Hook every root to the smallest root it touches, flatten, drop edges inside one component, until none is left.
    """
    parent = np.arange(n)
    while len(first):
        a, b = parent[first], parent[second]
        apart = a != b
        first, second, a, b = first[apart], second[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                break
            parent = above
    return parent
