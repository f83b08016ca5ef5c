"""Compiled: 8-connected components of a list of pixels. Imports NumPy and Numba only.

Time and memory go with the pixels, not with the area they lie in.
"""

# Parts are compiled for whatever types they are called with.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.kernels.jit import kernel, part

__all__ = ["components", "pixels_of", "steps_of"]


@part
def _root(parent, label):
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


@part
def _label_row(position, magnitude, first, stop, limits, x_of_first, w, rows, over, here, count, label, parent, known):
    """Provisional labels of the weak pixels of one row; `rows` holds that of pixel x at over + x + 1 and here + x + 1.

    Hardly a branch: where edges go is nothing that a processor can guess. Whole arrays and unsigned places in them:
    Numba counts references to every slice, and checks signed numbers.
    """
    lo, hi = np.uint16(limits[0]), np.uint16(limits[1])
    one, none = np.uint64(1), np.uint32(0)
    for k in range(first, stop):
        x = np.uint64(position[k] - x_of_first)
        weak = magnitude[k] > lo
        # One of these, any: up touches all others, and the two on the left touch each other.
        up = rows[over + x + one]
        found = max(max(rows[over + x], rows[here + x]), up)
        right = rows[over + x + one + one] if up == none else none
        if weak & (found != none) & (right != none) & (found != right):
            a, b = _root(parent, found), _root(parent, right)
            parent[max(a, b)] = min(a, b)
        found = found if found != none else right
        parent[count] = count
        known[count] = 0
        fresh = weak & (found == none)
        found = np.uint32(count) if fresh else found
        found = found if weak else none
        count = np.uint32(count + np.uint32(fresh))
        known[found] |= np.uint8(magnitude[k] > hi) | np.uint8(2 * ((x == 0) | (x + one == w)))
        label[k] = found
        rows[here + x + one] = found
    return count


@part
def _label_pixels(position, magnitude, limits, size_wh, starts, label, parent, known):
    """Provisional labels of all weak pixels from 1 on; returns how many there are. Two rows of labels are enough.

    `parent` says which are one, `known` what is seen of each: 1 a strong pixel, 2 a pixel on a side, 3 both.
    """
    w, h = size_wh
    over, here = np.uint64(0), np.uint64(w + 2)
    rows = np.zeros(2 * (w + 2), np.uint32)
    count = np.uint32(1)
    for y in range(h):
        a, z = np.uint64(starts[y]), np.uint64(starts[y + 1])
        count = _label_row(
            position,
            magnitude,
            a,
            z,
            limits,
            np.uint32(y * w),
            np.uint64(w),
            rows,
            over,
            here,
            count,
            label,
            parent,
            known,
        )
        if y == 0 or y == h - 1:
            for k in range(a, z):
                known[label[k]] |= np.uint8(2)
        if y > 0:
            for k in range(np.uint64(starts[y - 1]), a):
                rows[over + np.uint64(position[k] - np.uint32((y - 1) * w)) + np.uint64(1)] = 0
        over, here = here, over
    return count


@part
def _row_starts(position, w, h):
    """(h + 1,), where the pixels of every row begin."""
    starts = np.zeros(h + 1, np.int64)
    y, stop = 0, np.uint32(0)
    for k in range(len(position)):
        while position[k] >= stop:
            starts[y] = k
            y += 1
            stop = np.uint32(stop + np.uint32(w))
    starts[y:] = len(position)
    return starts


@part
def _note_side(x, y, w, h, what, sides):
    """Write a pixel's code to the sides it lies on: the top and bottom row, the left and right column."""
    if y == 0:
        sides[x] = what
    if y == h - 1:
        sides[w + x] = what
    if x == 0:
        sides[2 * w + y] = what
    if x == w - 1:
        sides[2 * w + h + y] = what


@kernel
def components(
    position: NDArray[np.uint32],
    magnitude: NDArray[np.uint16],
    limits: tuple[int, int],
    size_wh: tuple[int, int],
    cells: tuple[int, int, int],
    counts: NDArray[np.int32],
    code: NDArray[np.int32],
    sides: NDArray[np.int32],
) -> int:
    """Components of a block's pixels, and what is known of each: no edge (0), an edge (1), open (2, 3, ...).

    Args:
        position: (n,) numbers y * w + x of pixels, ascending.
        magnitude: (n,) their magnitudes.
        limits: (lo, hi): pixels above lo form components, one above hi makes its component an edge.
        size_wh: width and height of the block.
        cells: (log2 of a cell's side, column and row of the block's first pixel in its first cell).
        counts: (gh, gw) zeros; gets the pixels known to be edges.
        code: (n,), gets the code of every pixel's component; 0 for pixels not above lo.
        sides: (2 w + 2 h,) zeros; gets the codes along the top and bottom row and the left and right column.

    Returns:
        Number of open components: those without a strong pixel that reach a side.
    """
    w, h = size_wh
    n = len(position)
    label, parent, known = np.empty(n, np.uint32), np.empty(n + 2, np.uint32), np.empty(n + 2, np.uint8)
    starts = _row_starts(position, w, h)
    labels = _label_pixels(position, magnitude, limits, size_wh, starts, label, parent, known)
    for i in range(labels - 1, 0, -1):  # a root has the smallest label
        parent[i] = _root(parent, np.uint32(i))
        if parent[i] != i:
            known[parent[i]] |= known[i]
    what = np.zeros(labels, np.int32)
    opened = 0
    for i in range(1, labels):
        if parent[i] != i:
            what[i] = what[parent[i]]
        elif known[i] == 2:
            what[i] = 2 + opened
            opened += 1
        else:
            what[i] = known[i] & 1
    shift, left, top = cells
    cell = counts.reshape(counts.size)
    for y in range(h):
        row, first = np.uint64(((y + top) >> shift) * counts.shape[1]), np.uint32(y * w - left)
        for k in range(np.uint64(starts[y]), np.uint64(starts[y + 1])):
            code[k] = what[label[k]]
            cell[row + np.uint64(np.uint32(position[k] - first) >> np.uint32(shift))] += np.int32(code[k] == 1)
        # The first and the last pixel of a row may be on the sides, those of two rows are.
        for k in range(starts[y], starts[y + 1] if y in (0, h - 1) else min(starts[y] + 1, starts[y + 1])):
            _note_side(position[k] - y * w, y, w, h, code[k], sides)
        if starts[y] < starts[y + 1]:
            k = starts[y + 1] - 1
            _note_side(position[k] - y * w, y, w, h, code[k], sides)
    return opened


@kernel
def steps_of(pixel: NDArray[np.uint32], ahead: NDArray[np.uint8], far: NDArray[np.uint32]) -> int:
    """Numbers of pixels as the steps between them, most of which fit a byte.

    Args:
        pixel: (n,) ascending.
        ahead: (n,), gets the steps modulo 256, the first one from 0.
        far: (n + 1, 2), gets the others: index, and step in whole 256ths.

    Returns:
        Rows of `far` that are used.
    """
    last, used = np.uint32(0), np.uint64(0)
    for k in range(np.uint64(len(pixel))):
        step = np.uint32(pixel[k] - last)
        last = pixel[k]
        ahead[k] = np.uint8(step & np.uint32(255))
        far[used, 0], far[used, 1] = np.uint32(k), step >> np.uint32(8)
        used += np.uint64(step > np.uint32(255))
    return int(used)


@kernel
def pixels_of(ahead: NDArray[np.uint8], far: NDArray[np.uint32], pixel: NDArray[np.uint32]) -> None:
    """The inverse of `steps_of`.

    Args:
        ahead: (n,).
        far: (m, 2).
        pixel: (n,), gets the numbers.
    """
    last = np.uint32(0)
    for k in range(np.uint64(len(ahead))):
        pixel[k] = ahead[k]
    for k in range(np.uint64(len(far))):
        pixel[far[k, 0]] += far[k, 1] << np.uint32(8)
    for k in range(np.uint64(len(ahead))):
        last = np.uint32(last + pixel[k])
        pixel[k] = last
