"""Compiled: a piece of a picture to gray and to sums over squares, and ranges of gray. Imports NumPy and Numba only.

The luma is that of OpenCV's 8-bit `cvtColor`: weights in 2**-15, rounded half up.
"""

# Parts are compiled for whatever types they are called with.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.kernels.jit import kernel, part

__all__ = ["cell_ranges", "count_class", "take"]

WHITE = 255


@part
def _gray_row(rgb, at, gray, to, n):
    for x in range(n):
        i = at + np.uint64(3) * x
        total = (
            np.int32(rgb[i]) * np.int32(9798)
            + np.int32(rgb[i + np.uint64(1)]) * np.int32(19235)
            + np.int32(rgb[i + np.uint64(2)]) * np.int32(3735)
        )
        gray[to + x] = (total + np.int32(1 << 14)) >> np.int32(15)


@part
def _add_rows(rgb, at, stride, more, acc, n):
    r1, r2, r3 = at + stride, at + stride + stride, at + stride + stride + stride
    if more:
        for x in range(n):
            acc[x] += np.uint16(rgb[at + x]) + np.uint16(rgb[r1 + x]) + np.uint16(rgb[r2 + x]) + np.uint16(rgb[r3 + x])
    else:
        for x in range(n):
            acc[x] = np.uint16(rgb[at + x]) + np.uint16(rgb[r1 + x]) + np.uint16(rgb[r2 + x]) + np.uint16(rgb[r3 + x])


@part
def _sum_squares(acc, b, sums, row, i0, i1):
    i = np.uint64(0)
    for j in range(i0, i1):
        red = green = blue = np.uint32(0)
        for _ in range(b):
            red += np.uint32(acc[i])
            green += np.uint32(acc[i + np.uint64(1)])
            blue += np.uint32(acc[i + np.uint64(2)])
            i += np.uint64(3)
        sums[0, row, j], sums[1, row, j], sums[2, row, j] = red, green, blue


@part
def _sum_pixels(rgb, at, x0, x1, sums, row, b):
    """Some pixels of one row, each as what it takes off the white that `sums` starts from; `at` is that of column 0."""
    for x in range(x0, x1):
        for c in range(3):
            sums[c, row, x // b] -= np.uint16(WHITE) - np.uint16(rgb[at + 3 * x + c])


@kernel
def take(
    rgb: NDArray[np.uint8],
    corner_xy: tuple[int, int],
    rectangle: tuple[int, int, int, int],
    gray: NDArray[np.uint8],
    gray_xy: tuple[int, int],
    sums: NDArray[np.uint16],
    b: int,
) -> None:
    """Gray and square sums of a piece of a picture, in one look at it.

    Args:
        rgb: (h, 3 w) C-contiguous, rows of RGB pixels.
        corner_xy: where its first pixel lies, relative to the region; may be negative, like all that follows.
        rectangle: (x0, y0, x1, y1), the pixels that are wanted, inside the piece.
        gray: (h', w'), gets the luma of the wanted pixels; empty for none.
        gray_xy: where its first pixel lies.
        sums: (3, S / b, S / b), starts as those of white; gets the sums of the wanted pixels inside the region [0, S).
        b: side of the squares, a power of two up to 8.
    """
    left, top = corner_xy
    x0, y0, x1, y1 = rectangle
    side = sums.shape[1] * b
    begin, end = max(x0, 0), min(x1, side)  # columns that are summed; [a, z) in whole squares
    a, z = -(-begin // b) * b, end // b * b
    # Whole arrays and unsigned places in them: Numba counts references to every slice, and checks signed numbers.
    pixels, flat, stride = rgb.reshape(rgb.size), gray.reshape(gray.size), rgb.shape[1]
    acc = np.empty(max(0, 3 * (z - a)), np.uint16)
    y = y0
    while y < y1:
        whole = b >= 4 and z > a and y >= 0 and y % b == 0 and y + b <= min(y1, side)
        rows = b if whole else 1
        if gray.shape[0]:
            for r in range(y, y + rows):
                at, to = (r - top) * stride + 3 * (x0 - left), (r - gray_xy[1]) * gray.shape[1] + x0 - gray_xy[0]
                _gray_row(pixels, np.uint64(at), flat, np.uint64(to), np.uint64(x1 - x0))
        if 0 <= y < side:
            if whole:
                for k in range(y - top, y - top + b, 4):
                    at = k * stride + 3 * (a - left)
                    _add_rows(pixels, np.uint64(at), np.uint64(stride), k > y - top, acc, np.uint64(len(acc)))
                _sum_squares(acc, b, sums, np.uint64(y // b), np.uint64(a // b), np.uint64(z // b))
            for r in range(y, y + rows):
                at = (r - top) * stride - 3 * left
                _sum_pixels(pixels, at, begin, a if whole else end, sums, r // b, b)
                _sum_pixels(pixels, at, z if whole else end, end, sums, r // b, b)
        y += rows


@kernel
def cell_ranges(gray: NDArray[np.uint8], cell: int, low: NDArray[np.uint8], high: NDArray[np.uint8]) -> None:
    """Smallest and largest value in every cell of a picture.

    Args:
        gray: (h, w), rows contiguous.
        cell: side of the cells; those at the far ends may be smaller.
        low: (ceil(h / cell), ceil(w / cell)), gets the smallest values.
        high: the same, the largest.
    """
    h, w = gray.shape
    least, most = np.empty(w, np.uint8), np.empty(w, np.uint8)
    for i in range(low.shape[0]):
        least[:] = 255
        most[:] = 0
        for y in range(i * cell, min(h, (i + 1) * cell)):
            row = gray[y]
            for x in range(w):
                least[x] = min(least[x], row[x])
                most[x] = max(most[x], row[x])
        for j in range(low.shape[1]):
            low[i, j] = least[j * cell : (j + 1) * cell].min()
            high[i, j] = most[j * cell : (j + 1) * cell].max()


@part
def _count_rows(ids, at, stride, b, value, acc, n):
    for x in range(n):
        acc[x] = np.uint8(0)
    for _ in range(b):
        for x in range(n):
            acc[x] += np.uint8(ids[at + x] == value)
        at += stride


@kernel
def count_class(ids: NDArray[np.uint8], value: int, counts: NDArray[np.uint8]) -> None:
    """How many pixels of every square of b x b, b up to 8, have a class.

    Args:
        ids: (h, w) C-contiguous, both multiples of b.
        value: the class.
        counts: (h / b, w / b) C-contiguous, gets the counts.
    """
    n, across = np.uint64(ids.shape[1]), np.uint64(counts.shape[1])
    b = n // across
    flat, out, acc, wanted = ids.reshape(ids.size), counts.reshape(counts.size), np.empty(n, np.uint8), np.uint8(value)
    for row in range(np.uint64(counts.shape[0])):
        _count_rows(flat, row * b * n, n, b, wanted, acc, n)
        i = np.uint64(0)
        for j in range(across):
            total = np.uint8(0)
            for _ in range(b):
                total += acc[i]
                i += np.uint64(1)
            out[row * across + j] = total
