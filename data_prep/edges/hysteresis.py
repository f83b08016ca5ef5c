"""Canny's hysteresis, exact across blocks: local components first, then one union over borders.

Imports compiled loops only.

`Canny(lo, hi)` is the set of 8-connected components of `Canny(lo, lo)` (weak pixels) that hold a strong pixel. Inside
a block a component with a strong pixel is decided (on), and one without that touches no border is decided too (off).
The others stay open: a block hands over their labels along its four sides and how many of their pixels lie in which
cell. Neighbouring labels that touch, corners included, are united; an open component is on iff its union holds an
on component. `resolve_pixels` is a pure function of one block. `join_blocks` makes one block of the blocks of a region,
`light` looks at the sides of all regions. Both need results only, in any order. Work and memory go with the weak
pixels, not with the area.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.kernels.components import components

Labels = NDArray[np.int64]

_NONE, _ON, _OPEN = 0, 1, 2  # label along a side: no edge, decided edge, first open component


@dataclass(frozen=True)
class BlockEdges:
    """What is known of the edges of one block before its neighbours are.

    Attributes:
        x_px, y_px, w_px, h_px: rectangle of the block in the frame.
        sides: labels of the top row, bottom row, left column and right column; 0 none, 1 on, 2 + i open component i.
        n_open: number of open components.
        cell_xy: first cell (x, y) that the block touches.
        counts: (gh, gw) int32, decided edge pixels in each cell from `cell_xy` on.
        open_cells: (M, 3) int64, rows (open component, flat index into `counts`, pixels).
    """

    x_px: int
    y_px: int
    w_px: int
    h_px: int
    sides: tuple[NDArray[np.int32], ...]
    n_open: int
    cell_xy: tuple[int, int]
    counts: NDArray[np.int32]
    open_cells: Labels


def resolve_pixels(
    pixel: NDArray[np.uint32],
    magnitude: NDArray[np.uint16],
    limits: tuple[int, int],
    rectangle: tuple[int, int, int, int],
    p_min: int,
) -> BlockEdges:
    """Decide what one block can decide alone.

    Args:
        pixel: (n,) maxima of the gradient as y * w + x in the block, ascending.
        magnitude: (n,) how large each is.
        limits: (lo, hi): those above lo are weak, those above hi strong.
        rectangle: (x, y, w, h) of the block in the frame.
        p_min: side of a counting cell, a power of two; cells may straddle blocks.
    """
    x, y, w, h = rectangle
    left, top = x % p_min, y % p_min
    counts = np.zeros((-(-(top + h) // p_min), -(-(left + w) // p_min)), np.int32)
    code, sides = np.empty(len(pixel), np.int32), np.zeros(2 * (w + h), np.int32)
    n_open = components(pixel, magnitude, limits, (w, h), (p_min.bit_length() - 1, left, top), counts, code, sides)
    waiting = code >= _OPEN if n_open else np.zeros(len(code), np.bool_)
    late, owner = pixel.compress(waiting).astype(np.int64), code.compress(waiting).astype(np.int64) - _OPEN
    cell = (late // w + top) // p_min * counts.shape[1] + (late % w + left) // p_min
    key, number = np.unique(owner * counts.size + cell, return_counts=True)
    return BlockEdges(
        x,
        y,
        w,
        h,
        (sides[:w], sides[w : 2 * w], sides[2 * w : 2 * w + h], sides[2 * w + h :]),
        n_open,
        (x // p_min, y // p_min),
        counts,
        np.stack([key // counts.size, key % counts.size, number], 1),
    )


def join_blocks(blocks: Iterable[BlockEdges], rectangle: tuple[int, int, int, int], p_min: int) -> BlockEdges:
    """The blocks of a rectangle as one block: only components that reach the rectangle's border stay open.

    Args:
        blocks: blocks inside the rectangle, cut along one grid of rows and columns; a missing block has no edges.
        rectangle: (x, y, w, h) in the frame, multiples of p_min.
        p_min: side of a cell.

    Returns:
        What `resolve_pixels` of the whole rectangle would be but for the numbering of its open components; counts are
        int32.
    """
    x, y, w, h = rectangle
    shape = h // p_min, w // p_min
    counts = np.zeros(shape, np.int32)
    kept = []
    for block in blocks:
        column, row = block.cell_xy[0] - x // p_min, block.cell_xy[1] - y // p_min
        h_cells, w_cells = block.counts.shape
        counts[row : row + h_cells, column : column + w_cells] += block.counts
        # Counts that were added are replaced by zeros of their shape that take no memory.
        kept.append(dataclasses.replace(block, counts=np.broadcast_to(np.int32(0), block.counts.shape)))
    start = np.cumsum([0, *(block.n_open for block in kept)]).tolist()
    root = _roots(start[-1] + _OPEN, *_touching(kept, np.array(start), (x, y), (w, h)))
    sides = tuple(np.zeros(n, np.int64) for n in (w, w, h, h))
    for block, offset in zip(kept, start, strict=False):
        for which in range(4):
            _place_side(sides[which], which, block, offset, root, rectangle)
    inner = np.unique(np.concatenate(sides))
    inner = inner[inner >= _OPEN]
    code = np.full(len(root), _NONE, np.int32)
    code[_ON] = _ON
    code[inner] = _OPEN + np.arange(len(inner), dtype=np.int32)
    rows = []
    for block, offset in zip(kept, start, strict=False):
        if not len(block.open_cells):
            continue
        owner = code[root[block.open_cells[:, 0] + offset + _OPEN]]
        width = block.counts.shape[1]
        cell_y, cell_x = np.divmod(block.open_cells[:, 1], width)
        flat = (cell_y + block.cell_xy[1] - y // p_min) * shape[1] + cell_x + block.cell_xy[0] - x // p_min
        np.add.at(counts.reshape(-1), flat[owner == _ON], block.open_cells[owner == _ON, 2].astype(np.int32))
        late = owner >= _OPEN
        rows.append(np.stack([owner[late].astype(np.int64) - _OPEN, flat[late], block.open_cells[late, 2]], 1))
    open_cells = _sum_rows(np.concatenate([np.zeros((0, 3), np.int64), *rows]), shape[0] * shape[1])
    packed = tuple(code[side] for side in sides)
    return BlockEdges(x, y, w, h, packed, len(inner), (x // p_min, y // p_min), counts, open_cells)


def _place_side(
    side: Labels, which: int, block: BlockEdges, offset: int, root: Labels, rectangle: tuple[int, int, int, int]
) -> None:
    """Write the roots of a block's side into the side of the rectangle it lies on, if it lies on it."""
    x, y, w, h = rectangle
    place = (block.y_px == y, block.y_px + block.h_px == y + h, block.x_px == x, block.x_px + block.w_px == x + w)[
        which
    ]
    if place:
        label = block.sides[which]
        along = block.x_px - x if which < 2 else block.y_px - y
        side[along : along + len(label)] = np.where(label > _NONE, root[np.where(label >= _OPEN, label + offset, 1)], 0)


def _sum_rows(rows: Labels, area: int) -> Labels:
    """Rows (component, cell, pixels) with one row per component and cell."""
    key, inverse = np.unique(rows[:, 0] * area + rows[:, 1], return_inverse=True)
    total = np.bincount(inverse, rows[:, 2], len(key)).astype(np.int64)
    return np.stack([key // area, key % area, total], 1)


def light(blocks: list[BlockEdges], size_px: int) -> list[NDArray[np.bool_]]:
    """Which open components are edges, (n_open,) bool for every block; only the sides of the blocks are looked at.

    Args:
        blocks: blocks cut along one grid of rows and columns; a missing block has no edges.
        size_px: side of the frame.
    """
    start = np.cumsum([0, *(block.n_open for block in blocks)])
    root = _roots(int(start[-1]) + _OPEN, *_touching(blocks, start, (0, 0), (size_px, size_px)))
    return [root[a + _OPEN : b + _OPEN] == _ON for a, b in itertools.pairwise(start.tolist())]


def final_counts(block: BlockEdges, lit: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Edge pixels per cell of a block, (gh, gw) int32, once it is known which of its open components are edges."""
    counts = block.counts.astype(np.int32)
    if lit.any():
        rows = block.open_cells[lit[block.open_cells[:, 0]]]
        counts += np.bincount(rows[:, 1], rows[:, 2], counts.size).astype(np.int32).reshape(counts.shape)
    return counts


def pack_edges(edges: BlockEdges) -> dict[str, NDArray[Any]]:
    """A region's edges as plain arrays, counts in the narrowest type that holds a full cell."""
    top = int(edges.counts.max(initial=0))
    return {
        "rectangle": np.array([edges.x_px, edges.y_px, edges.w_px, edges.h_px], np.int64),
        "sides": np.concatenate(edges.sides).astype(np.int32),
        "n_open": np.array(edges.n_open, np.int64),
        "cell_xy": np.array(edges.cell_xy, np.int64),
        "counts": edges.counts.astype(np.min_scalar_type(top)),
        "open_cells": edges.open_cells,
    }


def unpack_edges(arrays: dict[str, NDArray[Any]], counts: bool = True) -> BlockEdges:
    """The inverse of `pack_edges`.

    Args:
        arrays: from `pack_edges`, or a mapping that loads them one by one.
        counts: False to leave counts and the cells of open components out, which `light` does not need.
    """
    x, y, w, h = arrays["rectangle"].tolist()
    cell_x, cell_y = arrays["cell_xy"].tolist()
    split = np.split(arrays["sides"], np.cumsum([w, w, h]))
    none = np.zeros((0, 3), np.int64)
    numbers = arrays["counts"].astype(np.int32) if counts else np.zeros((0, 0), np.int32)
    cells = arrays["open_cells"] if counts else none
    return BlockEdges(x, y, w, h, tuple(split), int(arrays["n_open"]), (cell_x, cell_y), numbers, cells)


def _touching(
    blocks: list[BlockEdges], start: NDArray[Any], origin_xy: tuple[int, int], size_wh: tuple[int, int]
) -> tuple[Labels, Labels]:
    """Pairs of labels in 8-neighbourhood across block borders. Labels: 0 none, 1 on, then all open components."""
    pairs = []
    for axis in (0, 1):  # borders between rows of blocks, then between columns
        lines: dict[int, tuple[Labels, Labels]] = {}
        last, length = size_wh[1 - axis], size_wh[axis]
        for block, offset in zip(blocks, start[:-1].tolist(), strict=True):
            x, y = block.x_px - origin_xy[0], block.y_px - origin_xy[1]
            begin, along = (y, x) if axis == 0 else (x, y)
            end = begin + (block.h_px if axis == 0 else block.w_px)
            for position, side, which in ((begin, 1, 2 * axis), (end, 0, 2 * axis + 1)):
                label = block.sides[which]
                if position in (0, last) or not label.any():
                    continue
                if position not in lines:
                    lines[position] = (np.zeros(length, np.int64), np.zeros(length, np.int64))
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
