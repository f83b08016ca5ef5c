"""Compiled: gray to blur, gradient, histogram and Canny's suppressed maxima, row by row. Imports NumPy and Numba only.

All arithmetic is OpenCV's, in integers: the 8-bit `GaussianBlur` (weights in 256ths, one rounding after both passes),
the 3 x 3 Sobel, the L1 magnitude and the suppression of `Canny` (tangents in 2**-15), so results are equal bit for bit;
tests compare them. The few rows that are looked at stay in the first-level cache from gray to maxima.
"""

# Parts are compiled for whatever types they are called with.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.compiled import kernel, part

__all__ = ["is_maximum", "maxima"]

_SPARE = 8  # eight pixels are looked at together
# Canny's tangent of 22.5 degrees in 2**-15, as OpenCV rounds it.
_TANGENT = 13573
_SHIFT = 15


@part
def _add_down(a0, b0, a1, b1, a2, b2, a3, b3, weights, acc):
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(acc)):
        acc[x] += np.uint16(
            w0 * (np.uint16(a0[x]) + np.uint16(b0[x])) + w1 * (np.uint16(a1[x]) + np.uint16(b1[x]))
            + w2 * (np.uint16(a2[x]) + np.uint16(b2[x])) + w3 * (np.uint16(a3[x]) + np.uint16(b3[x]))
        )  # fmt: skip


@part
def _blur_down(gray, y, first, stop, reach, weights, acc):
    """Weighted sum of the rows around one, in 256ths: at most 255 * 256."""
    row = gray[y][first:stop]
    for x in range(len(acc)):
        acc[x] = weights[0] * np.uint16(row[x])
    for j in range(1, reach + 1, 4):  # weights beyond the reach are 0
        j1, j2, j3 = min(j + 1, reach), min(j + 2, reach), min(j + 3, reach)
        _add_down(gray[y - j][first:stop], gray[y + j][first:stop], gray[y - j1][first:stop], gray[y + j1][first:stop],
                  gray[y - j2][first:stop], gray[y + j2][first:stop], gray[y - j3][first:stop],
                  gray[y + j3][first:stop], weights[j : j + 4], acc)


@part
def _add_across(a0, b0, a1, b1, a2, b2, a3, b3, weights, acc):
    w0, w1, w2, w3 = np.uint32(weights[0]), np.uint32(weights[1]), np.uint32(weights[2]), np.uint32(weights[3])
    for x in range(len(acc)):
        acc[x] += np.uint32(
            w0 * (np.uint32(a0[x]) + np.uint32(b0[x])) + w1 * (np.uint32(a1[x]) + np.uint32(b1[x]))
            + w2 * (np.uint32(a2[x]) + np.uint32(b2[x])) + w3 * (np.uint32(a3[x]) + np.uint32(b3[x]))
        )  # fmt: skip


@part
def _blur_across(v, reach, weights, acc, out):
    """The same along a row of such sums, and the one rounding."""
    n = len(out)
    row = v[reach : reach + n]
    for x in range(n):
        acc[x] = np.uint32(weights[0]) * np.uint32(row[x]) + np.uint32(1 << 15)
    for j in range(1, reach + 1, 4):
        j1, j2, j3 = min(j + 1, reach), min(j + 2, reach), min(j + 3, reach)
        before, after = reach - j, reach + j
        _add_across(v[before : before + n], v[after : after + n],
                    v[reach - j1 : reach - j1 + n], v[reach + j1 : reach + j1 + n],
                    v[reach - j2 : reach - j2 + n], v[reach + j2 : reach + j2 + n],
                    v[reach - j3 : reach - j3 + n], v[reach + j3 : reach + j3 + n], weights[j : j + 4], acc)
    for x in range(n):
        out[x] = np.uint8(acc[x] >> np.uint32(16))


@part
def _sobel_row(r0, r1, r2, smooth, step):
    for x in range(len(r0)):
        smooth[x] = np.int16(r0[x]) + np.int16(r1[x]) * np.int16(2) + np.int16(r2[x])
        step[x] = np.int16(r2[x]) - np.int16(r0[x])


@part
def _gradient_row(smooth, step, dx, dy, m):
    n = len(m)
    smooth2, step1, step2 = smooth[2:], step[1:], step[2:]
    for x in range(n):
        dx[x] = smooth2[x] - smooth[x]
        dy[x] = step[x] + step1[x] * np.int16(2) + step2[x]
    for x in range(n):
        m[x] = abs(dx[x]) + abs(dy[x])


@part
def _count_row(m, hist):
    h0, h1 = hist[0], hist[1]  # in turn: one table would wait for its own last write
    for x in range(len(m) // 2):
        h0[np.uint64(m[2 * x])] += np.uint32(1)
        h1[np.uint64(m[2 * x + 1])] += np.uint32(1)
    if len(m) & 1:
        h0[np.uint64(m[len(m) - 1])] += np.uint32(1)


@part
def _largest(m):
    top = np.int16(0)
    for x in range(len(m)):
        top = max(top, m[x])
    return top


@part
def _maxima_row(above, here, below, dx, dy, limit, flag):
    """Canny's rule for one row: larger than the pixel before along the gradient, not smaller than the one after."""
    g, right = here[1:], here[2:]
    up, up_right, down, down_right = above[1:], above[2:], below[1:], below[2:]
    for i in range(len(dx)):
        across, along = np.int32(abs(dx[i])), np.int32(abs(dy[i]))
        t = (across * np.int32(_TANGENT)) >> np.int32(_SHIFT)
        level = along <= t
        steep = along > t + np.int32(2) * across
        falls = (dx[i] ^ dy[i]) < 0
        found = level & (g[i] > here[i]) & (g[i] >= right[i])
        found |= steep & (g[i] > up[i]) & (g[i] >= down[i])
        one = falls & (g[i] > up_right[i]) & (g[i] > below[i])
        other = (not falls) & (g[i] > above[i]) & (g[i] > down_right[i])
        found |= (not level) & (not steep) & (one | other)
        flag[i] = found & (g[i] > limit)


@kernel
def is_maximum(
    above: NDArray[np.int16], here: NDArray[np.int16], below: NDArray[np.int16],
    dx: NDArray[np.int16], dy: NDArray[np.int16], limit: int, flag: NDArray[np.uint8],
) -> None:  # fmt: skip
    """Canny's suppression for one row, `cv2.Canny(dx, dy, limit, limit)`, given derivatives.

    OpenCV compares |dy| * 2**15 with |dx| * 13573 (the tangent of 22.5 degrees) and |dx| * (13573 + 2**16) (of 67.5).
    |dy| is an integer and 13573 odd, so that is |dy| <= t and |dy| > t + 2 |dx| with t = |dx| * 13573 >> 15.

    Args:
        above: (w + 2,) L1 magnitudes of the row above, one pixel more on either side.
        here: those of the row.
        below: those of the row below.
        dx: (w,) of the row.
        dy: (w,).
        limit: only magnitudes above it count.
        flag: (w,), gets 1 where the magnitude is a maximum, else 0.
    """
    _maxima_row(above, here, below, dx, dy, np.int16(limit), flag)


@part
def _emit_row(words, flag, m, base, n, position, magnitude):
    for k in range(len(words)):
        if words[k] != 0:
            for i in range(8 * k, 8 * k + 8):
                position[n] = base + i
                magnitude[n] = m[i]
                n += flag[i]
    return n


@kernel
def maxima(
    gray: NDArray[np.uint8],
    frame: tuple[int, int, int, int],
    box: tuple[int, int, int, int],
    weights: NDArray[np.uint16],
    limit: int,
    counted: tuple[int, int],
    hist: NDArray[np.uint32],
    at: tuple[int, int],
    position: NDArray[np.uint32],
    magnitude: NDArray[np.uint16],
) -> int:
    """Blur a box, and find the pixels that Canny keeps above a lower threshold.

    Args:
        gray: (h, w) C-contiguous, with all pixels that the box depends on; beyond the frame's end as OpenCV's blur
            sees it (mirrored without the last pixel).
        frame: (x0, y0, x1, y1) of the whole frame, relative to `gray`.
        box: the same of the box.
        weights: (reach + 4,) half of the Gaussian in 256ths from the centre on, then zeros; reach = side // 2.
        limit: lower threshold.
        counted: (x1, y1); the magnitudes of pixels before it are counted.
        hist: (2, 2048); gets the counts, which are the sum of both rows.
        at: (first, width): a pixel (x, y) of the box gets the number first + (y - y0) * width + x - x0.
        position: room for all pixels of the box and 8 more; gets the numbers, ascending.
        magnitude: the same, gets the L1 magnitudes.

    Returns:
        How many were found.
    """
    fx0, fy0, fx1, fy1 = frame
    x0, y0, x1, y1 = box
    reach = len(weights) - 4
    n = x1 - x0
    first, stop = max(x0 - 2, fx0), min(x1 + 2, fx1)
    lead, filled = first - x0 + 2, stop - x0 + 2
    v, acc = np.empty(stop - first + 2 * reach, np.uint16), np.empty(stop - first, np.uint32)
    smooth, step = np.zeros(n + 4, np.int16), np.zeros(n + 4, np.int16)
    soft = np.empty((3, stop - first), np.uint8)
    m = np.zeros((3, n + 2 + _SPARE), np.int16)
    dx, dy = np.zeros((2, n + 2), np.int16), np.zeros((2, n + 2), np.int16)
    words = np.zeros((n + 7) // 8, np.uint64)
    flag = words.view(np.uint8)
    found, limit16 = 0, np.int16(limit)
    next_soft = max(y0 - 2, fy0)
    for r in range(y0 - 1, y1 + 1):
        size = m[(r + 3) % 3]
        if r < fy0 or r >= fy1:
            size[:] = 0
        else:
            while next_soft <= min(r + 1, fy1 - 1):
                _blur_down(gray, next_soft, first - reach, stop + reach, reach, weights, v)
                _blur_across(v, reach, weights, acc, soft[next_soft % 3])
                next_soft += 1
            _sobel_row(soft[max(r - 1, fy0) % 3], soft[r % 3], soft[min(r + 1, fy1 - 1) % 3],
                       smooth[lead:filled], step[lead:filled])  # fmt: skip
            smooth[:lead], step[:lead] = smooth[lead], step[lead]
            smooth[filled:], step[filled:] = smooth[filled - 1], step[filled - 1]
            _gradient_row(smooth, step, dx[r & 1], dy[r & 1], size[: n + 2])
            if x0 == fx0:
                size[0] = 0
            if x1 == fx1:
                size[n + 1] = 0
        y = r - 1
        if y < y0:
            continue
        here = m[y % 3]
        if y < counted[1] and x0 < counted[0]:
            _count_row(here[1 : 1 + min(n, counted[0] - x0)], hist)
        if _largest(here[1 : n + 1]) > limit16:
            _maxima_row(m[(y + 2) % 3], here, m[(y + 1) % 3], dx[y & 1][1 : n + 1], dy[y & 1][1 : n + 1], limit16, flag)
            found = _emit_row(words, flag, here[1:], at[0] + (y - y0) * at[1], found, position, magnitude)
    return found
