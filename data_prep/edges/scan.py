"""A region of a frame as its rows come in: gray, sums, and block by block the edges or what may become edges.

The inside of `region.scan_region`. Pure functions of pixels; must not import readers, files or ranks.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges.canny import MAX_MAGNITUDE, ROOM, auto_thresholds, gaussian, luma
from data_prep.edges.hysteresis import BlockEdges, resolve_pixels
from data_prep.edges.kernels.components import steps_of
from data_prep.edges.kernels.maxima import maxima
from data_prep.edges.kernels.sums import cell_ranges, take
from data_prep.edges.region_spec import BYTE, WHITE, Maxima, Parts, Rectangle, RegionSpec, base_px

__all__ = ["Scan"]

_CELL_PX = 32  # side of the squares that are skipped if they are flat
_AUTO_LEAST = 4  # `auto` never has a lower threshold below this: what is flat for it is flat for any
_ENOUGH = 2**20  # gradients that let the thresholds of the frame be guessed
_PLENTY = 2**26  # the same, more closely


class Scan:
    """A region as its rows come in. Places are relative to the region's top left where nothing else is said.

    What is at hand are rows of gray, `halo` pixels wider than the region on either side, from `self.top` to
    `self.read_to`. A block is worked on once the rows below it are there, so blocks end a halo above the rows read.
    """

    def __init__(
        self,
        spec: RegionSpec,
        corner_xy: tuple[int, int],
        size_wh: tuple[int, int],
        parts: Parts,
        sums: NDArray[np.uint16],
        seen: NDArray[np.int64] | int,
        block_px: int,
    ) -> None:
        self.spec, self.parts, self.sums, self.seen = spec, parts, sums, seen
        (self.x, self.y), (self.wide, self.high) = corner_xy, size_wh
        self.halo, self.sought = spec.halo, spec.blur is not None
        self.block = min(block_px, spec.side_px)
        rows = 2 * self.block + 4 * self.halo
        self.gray = np.full((rows if self.sought else 0, self.wide + 2 * self.halo), WHITE, np.uint8)
        self.top, self.read_to = -self.halo, max(-self.halo, -self.y)
        self.hist = np.zeros((2, MAX_MAGNITUDE + 8), np.uint32)
        self.pixel = np.empty(rows * self.block + ROOM, np.uint32)
        self.magnitude = np.empty(rows * self.block + ROOM, np.uint16)
        self.blocks: list[BlockEdges] = []
        self.found = _Kept()
        self.total = self.kept = 0

    def add_rows(self, stop: int) -> None:
        """Read up to a row, and work on the blocks that have all they need."""
        last = stop == self.high
        self._read(min(stop + self.halo if last else stop, self.spec.size_px - self.y))
        done, end = self.top + self.halo, stop if last else stop - self.halo
        if not self.sought or end <= done:
            return
        self._mirror_rows(end + self.halo)
        self._add_blocks(done, end)
        keep = self.gray[end - self.halo - self.top : self.read_to - self.top]
        self.gray[: len(keep)] = keep
        self.top = end - self.halo

    def _read(self, stop: int) -> None:
        """Gray and sums of all rows before one, as far as the frame goes."""
        x0, x1 = max(-self.halo, -self.x), min(self.wide + self.halo, self.spec.size_px - self.x)
        y0, y1, self.read_to = self.read_to, stop, stop
        if self.sought:
            assert stop - self.top <= len(self.gray)
        if self.sought and (x1 > self.spec.content_wh[0] - self.x or y1 > self.spec.content_wh[1] - self.y):
            self.gray[y0 - self.top : y1 - self.top] = WHITE
        x1, y1 = min(x1, self.spec.content_wh[0] - self.x), min(y1, self.spec.content_wh[1] - self.y)
        if x0 < x1 and y0 < y1:
            b, gray_xy = base_px(self.spec), (-self.halo, self.top)
            # Regions around this one ask for what is on its sides, wherever they begin.
            inside = (
                self.x + self.halo,
                self.y + self.halo,
                self.x + self.wide - self.halo,
                self.y + min(y1, self.spec.side_px - self.halo),
            )
            for pixels, left, top in self.parts(self.x + x0, self.y + y0, x1 - x0, y1 - y0, inside):
                h, w, _ = pixels.shape
                at = left - self.x, top - self.y
                wanted = max(x0, at[0]), max(y0, at[1]), min(x1, at[0] + w), min(y1, at[1] + h)
                if not pixels.strides[0] and self._one_colour(pixels, wanted, b):
                    continue
                rows = np.ascontiguousarray(pixels).reshape(h, 3 * w)
                take(rows, at, wanted, self.gray, gray_xy, self.sums, b)
                del rows, pixels  # see `FastSlide.parts`
        if self.sought:
            size_px = self.spec.size_px
            band = self.gray[y0 - self.top : stop - self.top]
            for x in (*range(-self.halo, -self.x), *range(size_px - self.x, self.wide + self.halo)):
                from_x = cv2.borderInterpolate(x + self.x, size_px, cv2.BORDER_REFLECT_101) - self.x
                band[:, x + self.halo] = band[:, from_x + self.halo]

    def _one_colour(self, pixels: NDArray[np.uint8], wanted: Rectangle, b: int) -> bool:
        """Fill in a piece of one colour; False if that is not so simple."""
        x0, y0, x1, y1 = wanted
        a, c, d, e = max(x0, 0), max(y0, 0), min(x1, self.spec.side_px), min(y1, self.spec.side_px)
        white = bool((pixels[0, 0] == WHITE).all())  # as the sums began
        if not white and (a % b or c % b or d % b or e % b):
            return False
        if not white and a < d and c < e:
            self.sums[:, c // b : e // b, a // b : d // b] = pixels[0, 0].astype(np.uint16)[:, None, None] * (b * b)
        if self.sought:
            gray = luma(pixels[:1, :1].copy())
            self.gray[y0 - self.top : y1 - self.top, x0 + self.halo : x1 + self.halo] = gray[0, 0]
        return True

    def _mirror_rows(self, stop: int) -> None:
        """What the blur sees above and below the frame."""
        size_px = self.spec.size_px
        for y in (*range(self.top, -self.y), *range(size_px - self.y, stop)):
            from_y = cv2.borderInterpolate(y + self.y, size_px, cv2.BORDER_REFLECT_101) - self.y
            self.gray[y - self.top] = self.gray[from_y - self.top]

    def _add_blocks(self, done: int, end: int) -> None:
        """Work on the rows [done, end)."""
        spec, halo = self.spec, self.halo
        lo = spec.thresholds[0] if spec.thresholds != "auto" else _AUTO_LEAST
        gray = self.gray[: end - done + 2 * halo]
        cell = max(_CELL_PX, halo)
        lively = _lively(gray, cell, lo)
        limit, byte = (lo, False) if spec.thresholds != "auto" else self._likely()
        for x in range(0, self.wide, self.block):
            w = min(self.block, self.wide - x)
            self.total += 1
            box = _around(lively, cell, (x + halo, halo, x + halo + w, halo + end - done))
            if box is not None:
                self.kept += 1
                self._add_block(gray, box, (x, done, w, end - done), limit, byte)

    def _likely(self) -> tuple[int, bool]:
        """(a threshold below what `auto` is likely to give, whether a byte is likely to do for what is above it).

        It is three quarters, later seven eighths, of what it would be for all seen so far; `auto` has an upper
        threshold twice as large.
        """
        hist = self._counts() + self.seen
        n = int(hist[1:].sum())
        if n < _ENOUGH:
            return _AUTO_LEAST, False
        lo = auto_thresholds(hist, self.spec.auto_percent)[0]
        limit = max(_AUTO_LEAST, 7 * lo // 8 if n >= _PLENTY else 3 * lo // 4)
        return limit, 3 * lo < limit + BYTE

    def _add_block(self, gray: NDArray[np.uint8], box: Rectangle, block: Rectangle, limit: int, byte: bool) -> None:
        """Edges or maxima of a block, all of which lie in a box of `gray`."""
        spec, halo = self.spec, self.halo
        assert spec.blur is not None
        x, y, w, h = block
        ahead = halo - self.x, halo - self.y - y  # of the frame's top left in `gray`
        frame = (*ahead, ahead[0] + spec.size_px, ahead[1] + spec.size_px)
        counted = (ahead[0] + spec.content_wh[0], ahead[1] + spec.content_wh[1])
        first = (box[1] - halo) * w + box[0] - halo - x
        n = maxima(
            gray,
            frame,
            box,
            gaussian(spec.blur),
            limit,
            counted if spec.thresholds == "auto" else (0, 0),
            self.hist,
            (first, w),
            self.pixel,
            self.magnitude,
        )
        place = (self.x + x, self.y + y, w, h)
        if n and spec.thresholds != "auto":
            found = self.pixel[:n], self.magnitude[:n]
            self.blocks.append(resolve_pixels(*found, spec.thresholds, place, spec.patch))
        elif spec.thresholds == "auto":
            self.found.above = max(self.found.above, limit)
            if n:
                self.found.add(place, self.pixel[:n], self.magnitude[:n], limit if byte else -1)

    def _counts(self) -> NDArray[np.int64]:
        hist: NDArray[np.int64] = self.hist.sum(0, dtype=np.int64)[: MAX_MAGNITUDE + 1]
        hist[0] = 0
        return hist

    def result(self) -> tuple[list[BlockEdges] | None, NDArray[np.int64] | None, Maxima | None]:
        """Blocks with edges, or histogram and maxima."""
        if not self.sought:
            return None, None, None
        if self.spec.thresholds != "auto":
            return self.blocks, None, None
        return None, self._counts(), self.found.all()


class _Kept:
    """Maxima block by block."""

    def __init__(self) -> None:
        self.above = 0
        self.blocks: list[Rectangle] = []
        self.ahead, self.far = [np.zeros(0, np.uint8)], [np.zeros((0, 2), np.uint32)]
        self.magnitude, self.least = [np.zeros(0, np.uint8)], list[int]()
        self.room = np.empty((0, 2), np.uint32)

    def add(self, block: Rectangle, pixel: NDArray[np.uint32], magnitude: NDArray[np.uint16], least: int) -> None:
        """Keep a copy; `least` as in `Maxima`, with magnitudes that are all larger."""
        ahead = np.empty(len(pixel), np.uint8)
        if len(self.room) <= len(pixel):
            self.room = np.empty((2 * len(pixel) + 1, 2), np.uint32)
        used = steps_of(pixel, ahead, self.room)
        self.blocks.append(block)
        self.ahead.append(ahead)
        self.far.append(self.room[:used].copy())
        if least < 0:
            self.magnitude.append(magnitude.copy().view(np.uint8))
        else:
            self.magnitude.append(np.minimum(magnitude - np.uint16(least), BYTE).astype(np.uint8))
        self.least.append(least)

    def all(self) -> Maxima:
        """What was kept."""
        start, far_start = (np.cumsum([len(part) for part in parts]) for parts in (self.ahead, self.far))
        return Maxima(
            np.array(self.blocks, np.int64).reshape(-1, 4),
            start,
            np.concatenate(self.ahead),
            far_start,
            np.concatenate(self.far),
            np.concatenate(self.magnitude),
            np.array(self.least, np.int64),
            np.array(self.above, np.int64),
        )


def _lively(gray: NDArray[np.uint8], cell: int, lo: int) -> NDArray[np.bool_]:
    """Squares of `cell` pixels that may hold an L1 magnitude above `lo`, of what is at most `cell` pixels around them.

    A magnitude is at most 8 times the range of what it sees, and neither luma nor blur widens the range.
    """
    h, w = (-(-side // cell) for side in gray.shape)
    low, high = np.empty((h, w), np.uint8), np.empty((h, w), np.uint8)
    cell_ranges(gray, cell, low, high)
    around = np.ones((3, 3), np.uint8)
    spread: Any = cv2.dilate(high, around).astype(np.int32) - cv2.erode(low, around)
    lively: NDArray[np.bool_] = 8 * spread > lo
    return lively


def _around(lively: NDArray[np.bool_], cell: int, block: Rectangle) -> Rectangle | None:
    """The part (x0, y0, x1, y1) of a block with all its lively squares; None if it has none."""
    x0, y0, x1, y1 = block
    column, row = x0 // cell, y0 // cell
    here = lively[row : -(-y1 // cell), column : -(-x1 // cell)]
    rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
    if not len(rows):
        return None
    return (
        max(x0, (column + int(columns[0])) * cell),
        max(y0, (row + int(rows[0])) * cell),
        min(x1, (column + int(columns[-1]) + 1) * cell),
        min(y1, (row + int(rows[-1]) + 1) * cell),
    )
