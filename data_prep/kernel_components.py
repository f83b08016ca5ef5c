"""Compiled: 8-connected components of a list of pixels. Imports NumPy and Numba only.

Time and memory go with the pixels, not with the area they lie in.
"""

# Parts are compiled for whatever types they are called with.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.compiled import kernel, part

__all__ = ["components"]


@part
def _root(parent, label):
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


@part
def _label_pixels(position, width, label, parent):
    """Provisional labels from 1 on, and which are one; returns how many there are. Two rows of labels are enough."""
    rows = np.zeros((2, width + 2), np.int32)
    count = 1
    row, begin, before = -2, 0, 0  # of the last row with pixels: number, its first pixel, the first of the one above
    for k in range(len(position)):
        y = np.int64(position[k]) // width
        if y != row:
            for i in range(before, begin):
                rows[(row + 1) & 1, 1 + np.int64(position[i]) - (row - 1) * width] = 0
            if y != row + 1:
                for i in range(begin, k):
                    rows[row & 1, 1 + np.int64(position[i]) - row * width] = 0
                begin = k
            before, begin, row = begin, k, y
        x = np.int64(position[k]) - y * width
        over, here = rows[(y + 1) & 1], rows[y & 1]
        found, left, right = over[x + 1], over[x], over[x + 2]
        if found == 0:
            beside = max(left, here[x])
            if left != 0 and here[x] != 0:  # both touch, so they are one already
                beside = left
            found = beside
            if right != 0:
                if beside == 0:
                    found = right
                else:
                    a, b = _root(parent, beside), _root(parent, right)
                    parent[max(a, b)] = min(a, b)
            if found == 0:
                found = count
                parent[count] = count
                count += 1
        label[k] = found
        here[x + 1] = found
    return count


@kernel
def components(
    position: NDArray[np.uint32],
    strong: NDArray[np.bool_],
    size_wh: tuple[int, int],
    cells: tuple[int, int, int],
    counts: NDArray[np.int32],
    code: NDArray[np.int32],
    sides: NDArray[np.int32],
) -> int:
    """Components of a block's pixels, and what is known of each: no edge (0), an edge (1), open (2, 3, ...).

    Args:
        position: (n,) numbers y * w + x of the pixels, ascending.
        strong: (n,) whether a pixel makes its component an edge.
        size_wh: width and height of the block.
        cells: (log2 of a cell's side, column and row of the block's first pixel in its first cell).
        counts: (gh, gw) zeros; gets the pixels known to be edges.
        code: (n,), gets the code of every pixel's component.
        sides: (2 w + 2 h,) zeros; gets the codes along the top and bottom row and the left and right column.

    Returns:
        Number of open components: those without a strong pixel that reach a side.
    """
    w, h = size_wh
    n = len(position)
    label, parent = np.empty(n, np.int32), np.zeros(n + 1, np.int32)
    labels = _label_pixels(position, w, label, parent)
    known = np.zeros(labels, np.int32)  # of roots: 1 holds a strong pixel, 2 reaches a side, 3 both
    for k in range(n):
        root = _root(parent, label[k])
        y = np.int64(position[k]) // w
        x = np.int64(position[k]) - y * w
        label[k] = root
        known[root] |= np.int32(strong[k])
        if x == 0 or y == 0 or x == w - 1 or y == h - 1:
            known[root] |= 2
    opened = 0
    for root in range(1, labels):
        if known[root] == 2:
            known[root] = 2 + opened
            opened += 1
        else:
            known[root] &= 1
    shift, left, top = cells
    for k in range(n):
        what = known[label[k]]
        code[k] = what
        y = np.int64(position[k]) // w
        x = np.int64(position[k]) - y * w
        if what == 1:
            counts[(y + top) >> shift, (x + left) >> shift] += 1
        if y == 0:
            sides[x] = what
        if y == h - 1:
            sides[w + x] = what
        if x == 0:
            sides[2 * w + y] = what
        if x == w - 1:
            sides[2 * w + h + y] = what
    return opened
