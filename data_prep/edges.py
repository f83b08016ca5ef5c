"""Edge pixels of a frame, tile by tile, bit for bit those of OpenCV on the whole frame. No files, no slides, no ranks.

Why a tile can know. Blur, gradient and non-maximum suppression look k // 2 + 2 pixels around; a tile read with a halo
of k // 2 + 3, clipped only where the frame itself ends, computes them as the whole frame does, and OpenCV's border
rules apply at the frame's border and nowhere else. Weak pixels are `Canny(lo, lo)`; strong ones are the weak pixels
whose magnitude exceeds hi, because suppression does not depend on the threshold. The rest is hysteresis, which
`data_prep.hysteresis` makes exact across tiles. A block whose blurred values span at most lo / 8 has no weak pixel (an
L1 Sobel magnitude is at most eight times the range in its 3 x 3 neighbourhood), so flat background costs a minimum
and a maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.cells import counts_from_map
from data_prep.hysteresis import TileEdges, merge_tiles, resolve_tile
from data_prep.quadtree import tree_depth

__all__ = [
    "EdgeResult",
    "auto_thresholds",
    "blur_for",
    "count_edges",
    "counts_from_map",
    "edge_map",
    "luma",
]

Gray = NDArray[np.uint8]
Reader = Callable[[int, int, int, int], NDArray[np.uint8]]
Thresholds = tuple[int, int] | Literal["auto"]

MAX_MAGNITUDE = 2040  # |dx| + |dy| of a 3 x 3 Sobel on bytes: 4 * 255 each

_BLUR = {512: 3, 1024: 3, 4096: 7, 8192: 9, 16384: 11, 32768: 13, 65536: 15}
_BLOCK = 256  # gradients of one block stay in the second-level cache
_REACH = 3  # of gradient and non-maximum suppression, with a pixel to spare
_CACHE_BYTES = 512 * 2**20  # blurred luma up to this size is kept between the two passes of `auto`


def blur_for(resolution: int) -> int:
    """Side of the Gaussian kernel for a frame of `resolution` pixels.

    512: 3, 1K: 3, 4K: 7 and 8K: 9 are in the APF authors' public code; 16K: 11, 32K: 13 and 64K: 15 are extrapolated
    from it. Between entries the next larger resolution counts (also extrapolated), beyond 64K the last one.
    """
    return next((k for size, k in _BLUR.items() if resolution <= size), _BLUR[65536])


def luma(rgb: NDArray[np.uint8]) -> Gray:
    """OpenCV's 8-bit luma of an (h, w, 3) RGB picture, (h, w) uint8."""
    gray: Any = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
    return cast(Gray, gray)


def edge_map(rgb: NDArray[np.uint8], lo: int, hi: int, blur: int) -> NDArray[np.bool_]:
    """Edges of a whole picture at once, (h, w) bool: what the tiled count must agree with.

    Args:
        rgb: (h, w, 3) uint8.
        lo: lower L1 threshold of Canny.
        hi: upper L1 threshold.
        blur: side of the Gaussian kernel, odd; 1 for none.
    """
    found: NDArray[np.bool_] = cv2.Canny(_blurred(luma(rgb), blur), lo, hi) != 0
    return found


def auto_thresholds(hist: NDArray[Any]) -> tuple[int, int]:
    """Thresholds relative to the picture's own gradients.

    Args:
        hist: (M,) integers, hist[m] = content pixels whose L1 Sobel magnitude is m; hist[0] is ignored.

    Returns:
        (lo, hi): hi the smallest magnitude that at least 90 % of the non-zero ones do not exceed, at least 8;
        lo = hi // 2.
    """
    reached = np.cumsum(np.asarray(hist, np.int64)[1:])
    total = int(reached[-1]) if len(reached) else 0
    quantile = int(np.searchsorted(10 * reached, 9 * total)) + 1 if total else 0
    hi = max(8, quantile)
    return hi // 2, hi


@dataclass(frozen=True)
class EdgeResult:
    """Edges of a frame as counts.

    Attributes:
        counts: (G, G) int32, edge pixels per p_min cell, G = size_px / p_min.
        lo: lower threshold that was used.
        hi: upper threshold that was used.
        edge_pixels: their sum.
    """

    counts: NDArray[np.int32]
    lo: int
    hi: int
    edge_pixels: int


def count_edges(
    read_rgb: Reader,
    size_px: int,
    content_wh: tuple[int, int],
    p_min: int,
    blur: int,
    thresholds: Thresholds,
    tile_px: int = 2048,
    on_tile: Callable[[int, int, NDArray[np.bool_]], None] | None = None,
) -> EdgeResult:
    """Count edge pixels in every cell of the frame.

    The result does not depend on tile_px. The border between content and padding is an edge, as in the whole picture.

    Args:
        read_rgb: colours of a rectangle (x, y, w, h) of the frame, (h, w, 3) uint8; white in the padding.
        size_px: side R of the frame, p_min times a power of two.
        content_wh: width and height of the content at the top left.
        p_min: side of a cell, a power of two.
        blur: side of the Gaussian kernel, odd; 1 for none.
        thresholds: (lo, hi) for L1 magnitudes, or "auto", see `auto_thresholds`.
        tile_px: side of the tiles; memory goes with its square. With "auto" the blurred luma is kept between the two
            passes if the frame has at most 512 Mi pixels, else every tile is read twice.
        on_tile: called as (x_px, y_px, edge map) for every tile once all is decided; a tile that is not reported has
            no edges. Keeps one bit per pixel: for pictures and tests, not for huge frames.

    Raises:
        ValueError: sizes, kernel or thresholds that make no sense, in one line.
    """
    tree_depth(size_px, p_min)
    if blur < 1 or blur % 2 == 0:
        raise ValueError(f"the blur kernel must be a positive odd number, got {blur}")
    if tile_px < 1:
        raise ValueError(f"the tile must have at least one pixel, got {tile_px}")
    source = _Source(read_rgb, size_px, content_wh, blur, tile_px)
    if thresholds == "auto":
        lo, hi = auto_thresholds(source.histogram())
    else:
        lo, hi = _checked(thresholds)
    found = (_tile_edges(*part, lo, hi, p_min, on_tile is not None) for part in source.tiles())
    merged = merge_tiles(found, size_px, p_min)
    if on_tile is not None:
        for x, y, edges in merged.maps():
            on_tile(x, y, edges)
    return EdgeResult(merged.counts, lo, hi, int(merged.counts.sum(dtype=np.int64)))


def _checked(thresholds: tuple[int, int]) -> tuple[int, int]:
    lo, hi = int(thresholds[0]), int(thresholds[1])
    if (lo, hi) != tuple(thresholds) or not 0 <= lo <= hi:
        raise ValueError(f"thresholds must be two integers 0 <= lo <= hi, got {thresholds}")
    return lo, hi


def _blurred(gray: Gray, blur: int) -> Gray:
    if blur == 1:
        return gray
    out: Any = cv2.GaussianBlur(gray, (blur, blur), 0)
    return cast(Gray, out)


@dataclass(frozen=True)
class _Core:
    """The part of `values` that a tile or block answers for: values[y : y + h, x : x + w]; the rest is halo."""

    x: int
    y: int
    w: int
    h: int


class _Source:
    """Blurred luma of a frame, tile by tile."""

    def __init__(self, read_rgb: Reader, size_px: int, content_wh: tuple[int, int], blur: int, tile_px: int) -> None:
        self.read_rgb, self.size_px, self.content_wh, self.blur, self.tile_px = (
            read_rgb, size_px, content_wh, blur, tile_px,
        )
        self.halo = blur // 2 + _REACH
        # Nothing beyond the halo of the content can be an edge: all it sees is white.
        self.end_wh = (min(size_px, content_wh[0] + self.halo), min(size_px, content_wh[1] + self.halo))
        self.cache: Gray | None = None

    def _rectangles(self) -> Iterator[tuple[int, int, int, int]]:
        for y in range(0, self.end_wh[1], self.tile_px):
            for x in range(0, self.end_wh[0], self.tile_px):
                yield x, y, min(self.tile_px, self.end_wh[0] - x), min(self.tile_px, self.end_wh[1] - y)

    def _read(self, x: int, y: int, w: int, h: int) -> tuple[Gray, _Core]:
        """Blurred luma around a tile, right on the tile and _REACH pixels around it."""
        x0, y0, x1, y1 = self._grown(x, y, w, h, self.halo)
        values = _blurred(luma(self.read_rgb(x0, y0, x1 - x0, y1 - y0)), self.blur)
        near = self._grown(x, y, w, h, _REACH)
        values = values[near[1] - y0 : near[3] - y0, near[0] - x0 : near[2] - x0]
        return values, _Core(x - near[0], y - near[1], w, h)

    def _grown(self, x: int, y: int, w: int, h: int, by: int) -> tuple[int, int, int, int]:
        return max(0, x - by), max(0, y - by), min(self.size_px, x + w + by), min(self.size_px, y + h + by)

    def histogram(self) -> NDArray[np.int64]:
        """Magnitudes over the content; keeps the blurred luma for `tiles` if it is small enough."""
        hist = np.zeros(MAX_MAGNITUDE + 1, np.int64)
        reach_w, reach_h = (min(self.size_px, end + _REACH) for end in self.end_wh)
        if self.size_px * self.size_px <= _CACHE_BYTES:
            self.cache = np.full((reach_h, reach_w), 255, np.uint8)
        for x, y, w, h in self._rectangles():
            values, core = self._read(x, y, w, h)
            if self.cache is not None:
                # The far halo too: beyond the last tiles it lies in no tile's core.
                self.cache[y : y + h + _REACH, x : x + w + _REACH] = values[core.y :, core.x :]
            inside = _Core(core.x, core.y, min(w, self.content_wh[0] - x), min(h, self.content_wh[1] - y))
            if inside.w > 0 and inside.h > 0:
                hist += _magnitudes(values, inside)
        return hist

    def tiles(self) -> Iterator[tuple[Gray, _Core, int, int]]:
        """(blurred luma, core, x, y) of every tile that can hold an edge."""
        for x, y, w, h in self._rectangles():
            if self.cache is None:
                values, core = self._read(x, y, w, h)
            else:
                x0, y0, x1, y1 = self._grown(x, y, w, h, _REACH)
                values, core = self.cache[y0:y1, x0:x1], _Core(x - x0, y - y0, w, h)
            yield values, core, x, y


def _blocks(values: Gray, core: _Core) -> Iterator[tuple[Gray, _Core, int, int]]:
    """Cut the core into blocks with their halo: (part of values, core in it, x and y of the block in the core)."""
    for y in range(0, core.h, _BLOCK):
        for x in range(0, core.w, _BLOCK):
            h, w = min(_BLOCK, core.h - y), min(_BLOCK, core.w - x)
            top, left = max(0, core.y + y - _REACH), max(0, core.x + x - _REACH)
            part = values[top : core.y + y + h + _REACH, left : core.x + x + w + _REACH]
            yield part, _Core(core.x + x - left, core.y + y - top, w, h), x, y


def _flat(values: Gray, lo: int) -> bool:
    low, high, _, _ = cv2.minMaxLoc(values)
    return bool(8 * (high - low) <= lo)


def _gradient(values: Gray) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Sobel dx and dy with the border rule of Canny, and their L1 magnitude."""
    dx: Any
    dy: Any
    dx, dy = cv2.spatialGradient(values, borderType=cv2.BORDER_REPLICATE)
    return dx, dy, np.abs(dx) + np.abs(dy)


def _magnitudes(values: Gray, core: _Core) -> NDArray[np.int64]:
    """Histogram of the L1 magnitudes of the core."""
    hist = np.zeros(MAX_MAGNITUDE + 1, np.int64)
    for part, at, _, _ in _blocks(values, core):
        if not _flat(part, 0):
            _, _, magnitude = _gradient(part)
            inside = magnitude[at.y : at.y + at.h, at.x : at.x + at.w]
            hist += np.bincount(inside.ravel(), minlength=len(hist))
    return hist


def _tile_edges(values: Gray, core: _Core, x: int, y: int, lo: int, hi: int, p_min: int, keep_map: bool) -> TileEdges:
    """Edges of one tile: a pure function of its blurred luma, see `hysteresis`."""
    weak, strong = np.zeros((core.h, core.w), np.uint8), np.zeros((core.h, core.w), np.bool_)
    for part, at, bx, by in _blocks(values, core):
        if _flat(part, lo):
            continue
        dx, dy, magnitude = _gradient(part)
        inside = slice(at.y, at.y + at.h), slice(at.x, at.x + at.w)
        block = slice(by, by + at.h), slice(bx, bx + at.w)
        weak[block] = cv2.Canny(dx, dy, lo, lo)[inside]
        strong[block] = (weak[block] != 0) & (magnitude[inside] > hi)
    return resolve_tile(weak, strong, x, y, p_min, keep_map)
