"""The frame: the R x R pixel square a slide is placed in, and exact readers of its pixels and of its mask.

A frame pixel is the box mean of the source pixels under it, worked out in integers and rounded half up, so its value
does not depend on which tile asked for it. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.masks.masks import Mask
from data_prep.slides.base import Slide

Aspect = Literal["keep", "squash"]
ASPECTS: tuple[str, ...] = ("keep", "squash")

_BLOCK_PX = 2048  # side of a source block; 2048 x 2048 x RGBA is 16 MiB
_ACC_BYTES = 64 * 2**20  # accumulator of one band of frame rows
_ROWS_AT_ONCE = 256
_MASK_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Frame:
    """Where a slide lies in its frame.

    Attributes:
        size_px: side R of the frame.
        scale_xy: frame pixels per level-0 pixel, exact, along x and y.
        content_wh: frame pixels that show the slide, from the top left; the rest is padding.
        aspect: "keep" (one scale for both axes) or "squash" (the slide fills the square).
    """

    size_px: int
    scale_xy: tuple[Fraction, Fraction]
    content_wh: tuple[int, int]
    aspect: Aspect


def make_frame(size0_wh: tuple[int, int], resolution: int, aspect: str = "keep") -> Frame:
    """Place a slide of `size0_wh` level-0 pixels in a frame of `resolution` x `resolution` pixels.

    "keep": scale = min(1, R / longer side), so a slide is never enlarged; content = floor(size * scale), at least 1.
    "squash": each axis gets its own scale R / size, so the content is the whole frame.

    Raises:
        ValueError: sizes below 1 or an unknown aspect.
    """
    width0, height0 = size0_wh
    if resolution < 1 or width0 < 1 or height0 < 1:
        raise ValueError(f"a frame needs positive sizes, not resolution {resolution} and slide {width0} x {height0}")
    if aspect == "squash":
        scale_xy = (Fraction(resolution, width0), Fraction(resolution, height0))
        return Frame(resolution, scale_xy, (resolution, resolution), "squash")
    if aspect != "keep":
        raise ValueError(f"unknown aspect {aspect!r}; choose from {', '.join(ASPECTS)}")
    scale = min(Fraction(1), Fraction(resolution, max(width0, height0)))
    content_wh = (max(1, math.floor(width0 * scale)), max(1, math.floor(height0 * scale)))
    return Frame(resolution, (scale, scale), content_wh, "keep")


def choose_level(level_sizes_wh: list[tuple[int, int]], frame: Frame) -> int:
    """Return the coarsest level that is still at least as fine as the frame along both axes.

    Level 0 if there is none (the frame enlarges the slide) or if the exact arithmetic of a coarser level would not fit
    64 bits (odd pyramid factors on slides of more than about 400,000 pixels).
    """
    best = 0
    for level, size_wh in enumerate(level_sizes_wh):
        axes = [_Axis.make(level_sizes_wh[0][i], size_wh[i], frame.scale_xy[i]) for i in (0, 1)]
        fine_enough = all(axis.num >= axis.den for axis in axes)
        fits = 511 * axes[0].num * axes[1].num < 2**63
        if fine_enough and fits and math.prod(size_wh) < math.prod(level_sizes_wh[best]):
            best = level
    return best


@dataclass(frozen=True)
class _Axis:
    """One axis of the resampling: frame pixel i covers source pixels [i * num/den, (i + 1) * num/den)."""

    num: int
    den: int
    source_px: int

    @staticmethod
    def make(size0: int, size_level: int, scale: Fraction) -> _Axis:
        ratio = Fraction(size_level, size0) / scale
        return _Axis(ratio.numerator, ratio.denominator, size_level)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Source pixels [lo, hi) touched by frame pixels [start, stop)."""
        return start * self.num // self.den, min(self.source_px, -(-stop * self.num // self.den))

    def coverage(self, start: int, stop: int) -> int | npt.NDArray[np.int64]:
        """Source length under each frame pixel in units of 1/den: `num`, less only where the slide ends earlier."""
        end = self.source_px * self.den
        if stop * self.num <= end:
            return self.num
        return np.array([min(end, (i + 1) * self.num) - i * self.num for i in range(start, stop)], np.int64)

    def touched(self, start: int, stop: int, lo: int, hi: int) -> tuple[int, int]:
        """Those of the frame pixels [start, stop) that overlap the source pixels [lo, hi)."""
        return max(start, lo * self.den // self.num), min(stop, -(-hi * self.den // self.num))

    def step(self, tile_px: int) -> int:
        """Block side near `_BLOCK_PX`: whole file tiles, and whole frame pixels too where the ratio is an integer."""
        tile_px = min(max(1, tile_px), _BLOCK_PX)
        unit = math.lcm(tile_px, self.num) if self.den == 1 else tile_px
        if unit > 2 * _BLOCK_PX:
            unit = self.num if self.den == 1 and self.num <= _BLOCK_PX else tile_px
        return unit * max(1, _BLOCK_PX // unit)


def _fold_rows(block: npt.NDArray[Any], row0: int, axis: _Axis, start: int, stop: int, peak: int) -> npt.NDArray[Any]:
    """Sum, for each frame row in [start, stop), the source rows under it, weighted by their overlap in 1/den pixels.

    Args:
        block: (rows, m) unsigned integers, source rows row0, row0 + 1, ...
        row0: source row of block[0].
        axis: the resampling along this axis.
        start: first frame row.
        stop: frame row after the last.
        peak: largest value in `block`, to choose the narrowest exact type.

    Returns:
        (stop - start, m): the part of the sums that comes from these source rows; whole numbers, see `_exact_type`.
    """
    rows, width = block.shape
    num, den = axis.num, axis.den
    dtype = _exact_type(peak * num + 1)
    if den == 1 and row0 == start * num and rows == (stop - start) * num:
        return _fold_whole(block, num, dtype)
    out = np.zeros((stop - start, width), dtype)
    scratch = np.empty(width, dtype)
    for i in range(start, stop):
        lo, hi = max(i * num, row0 * den), min((i + 1) * num, (row0 + rows) * den)
        if hi <= lo:
            continue
        first, last = lo // den, (hi - 1) // den
        target = out[i - start]
        if first == last:
            np.multiply(block[first - row0], dtype.type(hi - lo), out=target)
            continue
        np.multiply(block[first - row0], dtype.type((first + 1) * den - lo), out=target)
        np.multiply(block[last - row0], dtype.type(hi - last * den), out=scratch)
        target += scratch
        if last - first > 1:
            np.add.reduce(block[first - row0 + 1 : last - row0], axis=0, dtype=dtype, out=scratch)
            scratch *= dtype.type(den)
            target += scratch
    return out


def _fold_whole(block: npt.NDArray[Any], num: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """`_fold_rows` for an integer ratio and a block of whole frame rows."""
    if num == 1:
        return block.astype(dtype)
    if block.dtype == np.uint8 and num <= 257:
        dtype = np.dtype(np.uint16)  # 257 * 255 is the largest uint16
    out: npt.NDArray[Any] = np.add(block[0::num], block[1::num], dtype=dtype)
    for k in range(2, num):
        out += block[k::num]
    return out


def _swap_axes(sums: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """(rows, width * 3) to (width, rows * 3); OpenCV moves numbers of any kind several times as fast as NumPy."""
    carrier = {2: np.uint16, 4: np.int32, 8: np.float64}[sums.dtype.itemsize]
    swapped = cv2.transpose(sums.view(carrier).reshape(-1, width, 3))
    return swapped.reshape(width, -1).view(sums.dtype)


class FrameReader:
    """Reads RGB rectangles of the frame.

    The value of a frame pixel is sum(overlap * value) / sum(overlap) over the pixels of the chosen level under it,
    computed in integers and rounded half up. Memory is bounded whatever the scale: the source is read in blocks, each
    adds its part to the sums.

    Attributes:
        slide: the open slide; stays the caller's to close.
        frame: the frame.
        level: the file level that is read.
    """

    def __init__(self, slide: Slide, frame: Frame) -> None:
        self.slide = slide
        self.frame = frame
        self.level = choose_level(slide.level_sizes_wh, frame)
        level_wh = slide.level_sizes_wh[self.level]
        self._x_axis = _Axis.make(slide.size_wh[0], level_wh[0], frame.scale_xy[0])
        self._y_axis = _Axis.make(slide.size_wh[1], level_wh[1], frame.scale_xy[1])
        self._plain = all(axis.num == axis.den for axis in (self._x_axis, self._y_axis))

    def read(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Return the rectangle as (h, w, 3) uint8 RGB; padding is white.

        Args:
            x_px: left edge, frame pixels.
            y_px: top edge.
            w_px: width, at least 1.
            h_px: height, at least 1.

        Raises:
            ValueError: the rectangle leaves the frame.
            SlideError: the file cannot be read there.
        """
        w_in, h_in = _content_part(self.frame, x_px, y_px, w_px, h_px)
        if w_in == w_px and h_in == h_px:
            return self._content(x_px, y_px, w_px, h_px)
        out = np.full((h_px, w_px, 3), 255, np.uint8)
        if w_in and h_in:
            out[:h_in, :w_in] = self._content(x_px, y_px, w_in, h_in)
        return out

    def parts(
        self, x_px: int, y_px: int, w_px: int, h_px: int, done: tuple[int, int, int, int] | None = None
    ) -> Iterator[tuple[npt.NDArray[np.uint8], int, int]]:
        """The content of a rectangle in pieces, (pixels, x, y), see `Slide.parts`; arguments and errors as `read`."""
        w_in, h_in = _content_part(self.frame, x_px, y_px, w_px, h_px)
        if w_in and h_in and self._plain:
            yield from self.slide.parts(self.level, x_px, y_px, w_in, h_in, done)
        elif w_in and h_in:
            yield self._content(x_px, y_px, w_in, h_in), x_px, y_px

    def _content(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        if self._plain:
            return self.slide.read(self.level, x_px, y_px, w_px, h_px)
        band_px = max(1, _ACC_BYTES // (w_px * 3 * 8))
        if band_px >= h_px:
            return self._band(x_px, y_px, w_px, h_px)
        out = np.empty((h_px, w_px, 3), np.uint8)
        for top in range(0, h_px, band_px):
            rows = min(band_px, h_px - top)
            out[top : top + rows] = self._band(x_px, y_px + top, w_px, rows)
        return out

    def _band(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Box means of a rectangle of content, summed over source blocks that are aligned to the file's tiles."""
        x_axis, y_axis = self._x_axis, self._y_axis
        x_stop, y_stop = x_px + w_px, y_px + h_px
        sums = np.zeros((h_px, w_px, 3), _exact_type(511 * x_axis.num * y_axis.num))
        tile_w, tile_h = self.slide.tile_wh(self.level)
        for y_lo, y_hi in _blocks(y_axis.span(y_px, y_stop), y_axis.step(tile_h)):
            j0, j1 = y_axis.touched(y_px, y_stop, y_lo, y_hi)
            for x_lo, x_hi in _blocks(x_axis.span(x_px, x_stop), x_axis.step(tile_w)):
                i0, i1 = x_axis.touched(x_px, x_stop, x_lo, x_hi)
                block = self.slide.read(self.level, x_lo, y_lo, x_hi - x_lo, y_hi - y_lo)
                target = sums[j0 - y_px : j1 - y_px, i0 - x_px : i1 - x_px]
                self._add_block(target, block, (x_lo, y_lo), (i0, i1), (j0, j1))
        return _round_half_up(sums, x_axis.coverage(x_px, x_stop), y_axis.coverage(y_px, y_stop))

    def _add_block(
        self,
        target: npt.NDArray[Any],
        block: npt.NDArray[np.uint8],
        corner_xy: tuple[int, int],
        columns: tuple[int, int],
        rows: tuple[int, int],
    ) -> None:
        """Add a source block's part to the sums of frame columns and rows [start, stop), some rows at a time.

        Down first (whole rows, contiguous), then across on what is left. Few rows at a time stay in cache and below the
        size at which the allocator returns memory to the system after each use.
        """
        x_axis, y_axis = self._x_axis, self._y_axis
        width = block.shape[1]
        for j0 in range(rows[0], rows[1], _ROWS_AT_ONCE):
            j1 = min(rows[1], j0 + _ROWS_AT_ONCE)
            lo, hi = y_axis.span(j0, j1)
            lo, hi = max(lo, corner_xy[1]), min(hi, corner_xy[1] + block.shape[0])
            part = block[lo - corner_xy[1] : hi - corner_xy[1]].reshape(hi - lo, -1)
            down = _swap_axes(_fold_rows(part, lo, y_axis, j0, j1, 255), width)
            across = _fold_rows(down, corner_xy[0], x_axis, *columns, 255 * y_axis.num)
            cells = _swap_axes(across, j1 - j0).reshape(j1 - j0, -1, 3)
            target[j0 - rows[0] : j1 - rows[0]] += cells.astype(target.dtype, copy=False)


def _exact_type(bound: int) -> np.dtype[Any]:
    """Narrowest of uint32, float64 and int64 that holds whole numbers below `bound` exactly.

    float64 does so below 2**53, and multiplies and divides several times as fast as int64.
    """
    return np.dtype(np.uint32 if bound < 2**32 else np.float64 if bound < 2**53 else np.int64)


def _round_half_up(
    sums: npt.NDArray[Any], over_x: int | npt.NDArray[np.int64], over_y: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Return floor(sums / area + 1/2) = floor((2 sum + area) / (2 area)) as uint8. Overwrites `sums`.

    Exact in float64 as well: sums are below 2**53, so 2 area < 2**45, and a quotient that is not a whole number lies at
    least 1 / (2 area) below the next one, more than float64 can lose below 256.
    """
    if isinstance(over_x, int) and isinstance(over_y, int):
        area: Any = sums.dtype.type(over_x * over_y)
    else:
        grid = np.multiply.outer(np.atleast_1d(over_y), np.atleast_1d(over_x))
        area = np.broadcast_to(grid, sums.shape[:2])[:, :, None].astype(sums.dtype)
    sums *= sums.dtype.type(2)
    sums += area
    if sums.dtype == np.float64:
        sums /= 2 * area
    else:
        sums //= area * sums.dtype.type(2)
    return sums.astype(np.uint8)


class MaskReader:
    """Reads class ids of the frame: each frame pixel takes the mask pixel under its centre, padding is class 0.

    Attributes:
        mask: the open mask; stays the caller's to close. Must have the slide's level-0 size.
        frame: the frame.
    """

    def __init__(self, mask: Mask, frame: Frame) -> None:
        self.mask = mask
        self.frame = frame

    def read(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Return the rectangle as (h, w) uint8 class ids; arguments and errors as `FrameReader.read`."""
        w_in, h_in = _content_part(self.frame, x_px, y_px, w_px, h_px)
        out = np.zeros((h_px, w_px), np.uint8)
        if not (w_in and h_in):
            return out
        columns = _centres(x_px, w_in, self.frame.scale_xy[0], self.mask.size_wh[0])
        rows = _centres(y_px, h_in, self.frame.scale_xy[1], self.mask.size_wh[1])
        left, width = int(columns[0]), int(columns[-1] - columns[0]) + 1
        max_rows = max(1, _MASK_BLOCK_BYTES // width)
        start = 0
        while start < h_in:
            stop = max(start + 1, int(np.searchsorted(rows, rows[start] + max_rows)))
            top, height = int(rows[start]), int(rows[stop - 1] - rows[start]) + 1
            block = self.mask.read(left, top, width, height)
            if (width, height) != (w_in, stop - start):  # else every pixel is its own centre, the usual case at 64K
                block = block.take(rows[start:stop] - top, 0).take(columns - left, 1)
            out[start:stop, :w_in] = block
            start = stop
        return out


def _centres(start: int, count: int, scale: Fraction, source_px: int) -> npt.NDArray[np.int64]:
    """Level-0 pixel that holds the centre of each frame pixel start ... start + count - 1: floor((i + 1/2) / scale)."""
    num, den = scale.denominator, 2 * scale.numerator
    twice = 2 * np.arange(start, start + count, dtype=np.int64) + 1
    centres: npt.NDArray[np.int64] = np.minimum(twice * num // den, source_px - 1)
    return centres


def _blocks(span: tuple[int, int], step: int) -> Iterator[tuple[int, int]]:
    """Cut [lo, hi) at the multiples of `step`."""
    lo, hi = span
    while lo < hi:
        stop = min(hi, (lo // step + 1) * step)
        yield lo, stop
        lo = stop


def _content_part(frame: Frame, x_px: int, y_px: int, w_px: int, h_px: int) -> tuple[int, int]:
    """Width and height of the part of a rectangle that is content. Raises ValueError outside the frame."""
    size = frame.size_px
    if w_px < 1 or h_px < 1 or x_px < 0 or y_px < 0 or x_px + w_px > size or y_px + h_px > size:
        raise ValueError(f"rectangle x={x_px} y={y_px} w={w_px} h={h_px} is not inside the frame of {size} px")
    w_in = min(w_px, max(0, frame.content_wh[0] - x_px))
    h_in = min(h_px, max(0, frame.content_wh[1] - y_px))
    return w_in, h_in
