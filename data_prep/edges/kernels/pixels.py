"""Compiled: what is looked at of every pixel. Imports NumPy and Numba only.

First a piece of a picture to gray and to sums over squares. Then gray to blur, gradient, histogram and suppressed
maxima. All arithmetic is OpenCV's, in integers, so results are equal bit for bit; tests compare them. That is the
luma of the 8-bit `cvtColor` (weights in 2**-15, rounded half up), the 8-bit `GaussianBlur` (weights in 256ths, one
rounding after both passes), the 3 x 3 Sobel, the L1 magnitude and the suppression of `Canny` (tangents in 2**-15).
The few rows that are looked at stay in the first-level cache.
"""

# Parts are compiled for whatever types they are called with.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.kernels.jit import kernel, part

__all__ = ["cell_ranges", "count_class", "maxima", "take"]

WHITE = 255
_SPARE = 8  # eight pixels are looked at together


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


@part
def _add_down(gray, a0, b0, a1, b1, a2, b2, a3, b3, w0, w1, w2, w3, acc, n):
    for x in range(n):
        acc[x] += np.uint16(
            w0 * (np.uint16(gray[a0 + x]) + np.uint16(gray[b0 + x]))
            + w1 * (np.uint16(gray[a1 + x]) + np.uint16(gray[b1 + x]))
            + w2 * (np.uint16(gray[a2 + x]) + np.uint16(gray[b2 + x]))
            + w3 * (np.uint16(gray[a3 + x]) + np.uint16(gray[b3 + x]))
        )


@part
def _blur_down(gray, at, stride, reach, weights, acc, n):
    """Weighted sum of the rows around one, in 256ths: at most 255 * 256."""
    w0 = weights[0]
    for x in range(n):
        acc[x] = w0 * np.uint16(gray[at + x])
    one, j = np.uint64(1), np.uint64(1)
    while j <= reach:  # weights beyond the reach are 0
        d0, d1 = j * stride, min(j + one, reach) * stride
        d2, d3 = min(j + one + one, reach) * stride, min(j + one + one + one, reach) * stride
        _add_down(
            gray,
            at - d0,
            at + d0,
            at - d1,
            at + d1,
            at - d2,
            at + d2,
            at - d3,
            at + d3,
            weights[j],
            weights[j + one],
            weights[j + one + one],
            weights[j + one + one + one],
            acc,
            n,
        )
        j += np.uint64(4)


@part
def _add_across(v, a0, b0, a1, b1, a2, b2, a3, b3, w0, w1, w2, w3, acc, n):
    for x in range(n):
        acc[x] += np.uint32(
            w0 * (np.uint32(v[a0 + x]) + np.uint32(v[b0 + x]))
            + w1 * (np.uint32(v[a1 + x]) + np.uint32(v[b1 + x]))
            + w2 * (np.uint32(v[a2 + x]) + np.uint32(v[b2 + x]))
            + w3 * (np.uint32(v[a3 + x]) + np.uint32(v[b3 + x]))
        )


@part
def _blur_across(v, reach, weights, acc, out, at, n):
    """The same along a row of such sums, and the one rounding."""
    w0 = np.uint32(weights[0])
    for x in range(n):
        acc[x] = w0 * np.uint32(v[reach + x]) + np.uint32(1 << 15)
    one, j = np.uint64(1), np.uint64(1)
    while j <= reach:
        j1, j2, j3 = min(j + one, reach), min(j + one + one, reach), min(j + one + one + one, reach)
        _add_across(
            v,
            reach - j,
            reach + j,
            reach - j1,
            reach + j1,
            reach - j2,
            reach + j2,
            reach - j3,
            reach + j3,
            np.uint32(weights[j]),
            np.uint32(weights[j + one]),
            np.uint32(weights[j + one + one]),
            np.uint32(weights[j + one + one + one]),
            acc,
            n,
        )
        j += np.uint64(4)
    for x in range(n):
        out[at + x] = np.uint8(acc[x] >> np.uint32(16))


@part
def _sobel_row(soft, r0, r1, r2, smooth, step, lead, n):
    """Sums and differences down three rows, and what is beyond the ends of the frame: the last value again."""
    for x in range(n):
        smooth[lead + x] = np.int16(soft[r0 + x]) + np.int16(soft[r1 + x]) * np.int16(2) + np.int16(soft[r2 + x])
        step[lead + x] = np.int16(soft[r2 + x]) - np.int16(soft[r0 + x])
    for x in range(lead):
        smooth[x], step[x] = smooth[lead], step[lead]
    end = lead + n
    for x in range(end, np.uint64(len(smooth))):
        smooth[x], step[x] = smooth[end - np.uint64(1)], step[end - np.uint64(1)]


@part
def _gradient_row(smooth, step, dx, dy, row, m, at, n):
    one, two = np.uint64(1), np.uint64(2)
    for x in range(n):
        dx[row + x] = smooth[x + two] - smooth[x]
        dy[row + x] = step[x] + step[x + one] * np.int16(2) + step[x + two]
    for x in range(n):
        m[at + x] = abs(dx[row + x]) + abs(dy[row + x])


@part
def _count_row(m, at, n, h0, h1):
    one = np.uint64(1)  # two tables in turn: one would wait for its own last write
    for x in range(n // np.uint64(2)):
        h0[np.uint64(m[at + x + x])] += np.uint32(1)
        h1[np.uint64(m[at + x + x + one])] += np.uint32(1)
    if n & one:
        h0[np.uint64(m[at + n - one])] += np.uint32(1)


@part
def _largest(m, at, n):
    top = np.int16(0)
    for x in range(n):
        top = max(top, m[at + x])
    return top


@part
def _maxima_row(m, above, here, below, dx, dy, row, limit, flag, n):
    """Canny's rule for one row: larger than the pixel before along the gradient, not smaller than the one after.

    OpenCV compares |dy| * 2**15 with |dx| * 13573 (the tangent of 22.5 degrees) and |dx| * (13573 + 2**16) (of 67.5).
    |dy| is an integer and 13573 odd, so that is |dy| <= t and |dy| > t + 2 |dx| with t = |dx| * 13573 >> 15.
    13573 = 53 * 256 + 5, so t = (53 |dx| + (5 |dx| >> 8)) >> 7, which 16 bits hold: twice as many pixels at a time.
    """
    one, two = np.uint64(1), np.uint64(2)
    for x in range(n):
        i, up, down = here + x, above + x, below + x
        g = m[i + one]
        across, along = np.uint16(abs(dx[row + x])), np.uint16(abs(dy[row + x]))
        t = np.uint16(np.uint16(np.uint16(5) * across) >> np.uint16(8))
        t = np.uint16(np.uint16(t + np.uint16(np.uint16(53) * across)) >> np.uint16(7))
        level = along <= t
        steep = along > np.uint16(np.uint16(t + across) + across)
        falls = (dx[row + x] ^ dy[row + x]) < 0
        found = level & (g > m[i]) & (g >= m[i + two])
        found |= steep & (g > m[up + one]) & (g >= m[down + one])
        slanted = falls & (g > m[up + two]) & (g > m[down])
        slanted |= (not falls) & (g > m[up]) & (g > m[down + two])
        found |= (not level) & (not steep) & slanted
        flag[x] = found & (g > limit)


@part
def _emit_row(words, flag, m, at, base, n, position, magnitude):
    for k in range(np.uint64(len(words))):
        if words[k] != 0:
            first = np.uint64(8) * k
            for i in range(first, first + np.uint64(8)):
                position[n] = base + np.uint32(i)
                magnitude[n] = m[at + i]
                n += np.uint64(flag[i])
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
    # Whole arrays and unsigned places in them: Numba counts references to every slice, and checks signed numbers.
    fx0, fy0, fx1, fy1 = frame
    x0, y0, x1, y1 = box
    reach, stride, n = np.uint64(len(weights) - 4), np.uint64(gray.shape[1]), np.uint64(x1 - x0)
    first, stop = max(x0 - 2, fx0), min(x1 + 2, fx1)
    lead, wide, begin = np.uint64(first - x0 + 2), np.uint64(stop - first), np.uint64(first) - reach
    one, two = np.uint64(1), np.uint64(2)
    pixels, h0, h1 = gray.reshape(gray.size), hist[0], hist[1]
    v, acc = np.empty(wide + two * reach, np.uint16), np.empty(wide, np.uint32)
    soft = np.empty(np.uint64(3) * wide, np.uint8)
    smooth, step = np.zeros(n + np.uint64(4), np.int16), np.zeros(n + np.uint64(4), np.int16)
    row = n + two + np.uint64(_SPARE)
    m = np.zeros(np.uint64(3) * row, np.int16)
    dx, dy = np.zeros(two * row, np.int16), np.zeros(two * row, np.int16)
    words = np.zeros((n + np.uint64(7)) // np.uint64(8), np.uint64)
    flag = words.view(np.uint8)
    counted_n = np.uint64(max(0, min(x1, counted[0]) - x0))
    found, limit16, next_soft = np.uint64(0), np.int16(limit), max(y0 - 2, fy0)
    for r in range(y0 - 1, y1 + 1):
        size, slope = np.uint64((r + 3) % 3) * row, np.uint64(r & 1) * row
        if r < fy0 or r >= fy1:
            for x in range(size, size + row):
                m[x] = 0
        else:
            while next_soft <= min(r + 1, fy1 - 1):
                _blur_down(pixels, np.uint64(next_soft) * stride + begin, stride, reach, weights, v, wide + two * reach)
                _blur_across(v, reach, weights, acc, soft, np.uint64(next_soft % 3) * wide, wide)
                next_soft += 1
            _sobel_row(
                soft,
                np.uint64(max(r - 1, fy0) % 3) * wide,
                np.uint64(r % 3) * wide,
                np.uint64(min(r + 1, fy1 - 1) % 3) * wide,
                smooth,
                step,
                lead,
                wide,
            )
            _gradient_row(smooth, step, dx, dy, slope, m, size, n + two)
            if x0 == fx0:
                m[size] = 0
            if x1 == fx1:
                m[size + n + one] = 0
        y = r - 1
        if y < y0:
            continue
        here, slope = np.uint64(y % 3) * row, np.uint64(y & 1) * row
        if y < counted[1]:
            _count_row(m, here + one, counted_n, h0, h1)
        if _largest(m, here + one, n) > limit16:
            above, below = np.uint64((y + 2) % 3) * row, np.uint64((y + 1) % 3) * row
            _maxima_row(m, above, here, below, dx, dy, slope + one, limit16, flag, n)
            base = np.uint32(at[0] + (y - y0) * at[1])
            found = _emit_row(words, flag, m, here + one, base, found, position, magnitude)
    return int(found)
