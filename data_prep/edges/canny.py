"""Edge pixels of a frame, tile by tile, bit for bit those of OpenCV on the whole frame. No files, no slides, no ranks.

Why a tile can know. Blur, gradient and non-maximum suppression look k // 2 + 2 pixels around; a tile read with a halo
of k // 2 + 3, clipped only where the frame itself ends, computes them as the whole frame does, and OpenCV's border
rules apply at the frame's border and nowhere else. Weak pixels are `Canny(lo, lo)`; strong ones are the weak pixels
whose magnitude exceeds hi, because suppression does not depend on the threshold. The rest is hysteresis, which
`data_prep.edges.hysteresis` makes exact. A tile is worked on in blocks that fit the cache, and it is blocks, not tiles,
that hysteresis joins. A block whose values span at most lo / 8 has no weak pixel (an L1 Sobel magnitude is at most
eight times the range in its 3 x 3 neighbourhood), so flat background costs a minimum and a maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges import AUTO_PERCENT
from data_prep.edges.hysteresis import BlockEdges, merge_blocks, resolve_pixels
from data_prep.edges.kernels.maxima import maxima
from data_prep.system.powers_of_two import tree_depth

__all__ = [
    "EdgeResult",
    "auto_thresholds",
    "block_edges",
    "blur_for",
    "blurred",
    "count_edges",
    "edge_map",
    "gaussian",
    "gradient",
    "is_flat",
    "luma",
    "weak_pixels",
]

Gray = NDArray[np.uint8]
Reader = Callable[[int, int, int, int], NDArray[np.uint8]]
Thresholds = tuple[int, int] | Literal["auto"]

MAX_MAGNITUDE = 2040  # |dx| + |dy| of a 3 x 3 Sobel on bytes: 4 * 255 each

_BLUR = {512: 3, 1024: 3, 4096: 7, 8192: 9, 16384: 11, 32768: 13, 65536: 15}
_BLOCK = 256  # all of one block stays in the second-level cache
REACH_PX = 3  # of gradient and non-maximum suppression, with a pixel to spare
ROOM = 16  # spare entries that `kernel_maxima.maxima` may write to
_CACHE_BYTES = 512 * 2**20  # blurred luma up to this size is kept between the two passes of `auto`


def blur_for(resolution: int) -> int:
    """Side of the Gaussian kernel for a frame of `resolution` pixels.

    512: 3, 1K: 3, 4K: 7 and 8K: 9 are in the APF authors' public code; 16K: 11, 32K: 13 and 64K: 15 are extrapolated
    from it. Between entries the next larger resolution counts (also extrapolated), beyond 64K the last one.
    """
    return next((k for size, k in _BLUR.items() if resolution <= size), _BLUR[65536])


def luma(rgb: NDArray[np.uint8]) -> Gray:
    """OpenCV's 8-bit luma of an (h, w, 3) RGB picture, (h, w) uint8."""
    gray: Any = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return cast(Gray, gray)


def edge_map(rgb: NDArray[np.uint8], lo: int, hi: int, blur: int) -> NDArray[np.bool_]:
    """Edges of a whole picture at once, (h, w) bool: what the tiled count must agree with.

    Args:
        rgb: (h, w, 3) uint8.
        lo: lower L1 threshold of Canny.
        hi: upper L1 threshold.
        blur: side of the Gaussian kernel, odd; 1 for none.
    """
    found: NDArray[np.bool_] = cv2.Canny(blurred(luma(rgb), blur), lo, hi) != 0
    return found


def auto_thresholds(hist: NDArray[Any], percent: int = AUTO_PERCENT) -> tuple[int, int]:
    """Thresholds relative to the picture's own gradients.

    Args:
        hist: (M,) integers, hist[m] = content pixels whose L1 Sobel magnitude is m; hist[0] is ignored.
        percent: share of the non-zero magnitudes that hi reaches, 1 to 99.

    Returns:
        (lo, hi): hi the smallest magnitude that at least `percent` % of the non-zero ones do not exceed, at least 8;
        lo = hi // 2.
    """
    reached = np.cumsum(np.asarray(hist, np.int64)[1:])
    total = int(reached[-1]) if len(reached) else 0
    quantile = int(np.searchsorted(100 * reached, percent * total)) + 1 if total else 0
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
    on_block: Callable[[int, int, NDArray[np.bool_]], None] | None = None,
    percent: int = AUTO_PERCENT,
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
        on_block: called as (x_px, y_px, (h, w) bool edge map) for every block once all is decided; what is not
            reported has no edges. Keeps the edge pixels in memory: for pictures and tests, not for huge frames.
        percent: of "auto", see `auto_thresholds`.

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
        lo, hi = auto_thresholds(source.histogram(), percent)
    else:
        lo, hi = _checked(thresholds)
    keep_map = on_block is not None
    found = (
        block_edges(block.values, block.inside, (block.x, block.y, block.w, block.h), lo, hi, p_min, keep_map)
        for block in source.blocks(lo)
    )
    merged = merge_blocks((block for block in found if block is not None), size_px, p_min)
    if on_block is not None:
        for x, y, edges in merged.maps():
            on_block(x, y, edges)
    return EdgeResult(merged.counts, lo, hi, int(merged.counts.sum(dtype=np.int64)))


def _checked(thresholds: tuple[int, int]) -> tuple[int, int]:
    lo, hi = int(thresholds[0]), int(thresholds[1])
    if (lo, hi) != tuple(thresholds) or not 0 <= lo <= hi:
        raise ValueError(f"thresholds must be two integers 0 <= lo <= hi, got {thresholds}")
    return lo, hi


def blurred(gray: Gray, blur: int) -> Gray:
    """OpenCV's Gaussian of side `blur`, sigma from it; 1 for none."""
    if blur == 1:
        return gray
    out: Any = cv2.GaussianBlur(gray, (blur, blur), 0)
    return cast(Gray, out)


@dataclass(frozen=True)
class _Block:
    """Blurred luma of one block of the frame with the halo that Canny needs.

    Attributes:
        values: blurred luma of the block and up to REACH_PX pixels around it, less where the frame ends.
        inside: where the block itself is in `values`.
        x, y, w, h: rectangle of the block in the frame.
    """

    values: Gray
    inside: tuple[slice, slice]
    x: int
    y: int
    w: int
    h: int


class _Source:
    """Blurred luma of a frame, block by block, read tile by tile."""

    def __init__(self, read_rgb: Reader, size_px: int, content_wh: tuple[int, int], blur: int, tile_px: int) -> None:
        self.read_rgb, self.size_px, self.content_wh = read_rgb, size_px, content_wh
        self.blur, self.tile_px, self.halo = blur, tile_px, blur // 2 + REACH_PX
        # Nothing beyond the halo of the content can be an edge: all it sees is white.
        self.end_wh = (min(size_px, content_wh[0] + self.halo), min(size_px, content_wh[1] + self.halo))
        self.cache: Gray | None = None

    def histogram(self) -> NDArray[np.int64]:
        """L1 magnitudes over the content; keeps the blurred luma for `blocks` if the frame is small enough."""
        hist = np.zeros(MAX_MAGNITUDE + 1, np.int64)
        keep = self.size_px * self.size_px <= _CACHE_BYTES
        reach_w, reach_h = (min(self.size_px, end + REACH_PX) if keep else 0 for end in self.end_wh)
        cache = np.full((reach_h, reach_w), 255, np.uint8)
        for block in self._read_blocks(-1):
            if keep:  # further out than the last block all is white, as the cache was made
                cache[block.y : block.y + block.h, block.x : block.x + block.w] = block.values[block.inside]
            w, h = min(block.w, self.content_wh[0] - block.x), min(block.h, self.content_wh[1] - block.y)
            if w > 0 and h > 0 and not is_flat(block.values, 0):
                magnitude = gradient(block.values)[2][block.inside][:h, :w].view(np.uint16)
                # Counts come as float32, exact below 2**24: a block has fewer pixels than that.
                found: Any = cv2.calcHist([magnitude], [0], None, [len(hist)], [0, len(hist)])
                hist += found.ravel().astype(np.int64)
        self.cache = cache if keep else None
        return hist

    def blocks(self, lo: int) -> Iterator[_Block]:
        """All blocks but those too flat for an edge above `lo`."""
        if self.cache is None:
            yield from self._read_blocks(lo)
            return
        for x, y, w, h in _grid(0, 0, *self.end_wh, _BLOCK):
            x0, y0, x1, y1 = self._grown(x, y, w, h, REACH_PX)
            values = self.cache[y0:y1, x0:x1]
            if not is_flat(values, lo):
                yield _block(values, x0, y0, (x, y, w, h))

    def _read_blocks(self, lo: int) -> Iterator[_Block]:
        """As `blocks`, from the slide; flatness is seen before the blur, which never widens the range."""
        for tile in _grid(0, 0, *self.end_wh, self.tile_px):
            left, top, right, bottom = self._grown(*tile, self.halo)
            gray = luma(self.read_rgb(left, top, right - left, bottom - top))
            for x, y, w, h in _grid(*tile, _BLOCK, rows=True):
                x0, y0, x1, y1 = self._grown(x, y, w, h, self.halo)
                yield from self._row_of_blocks(gray[y0 - top : y1 - top, x0 - left : x1 - left], x, y, w, h, lo)

    def _row_of_blocks(self, gray: Gray, x: int, y: int, w: int, h: int, lo: int) -> Iterator[_Block]:
        """Blur one row of blocks at once (OpenCV's blur is twice as slow on narrow pictures), if it is not all flat."""
        x0, y0, _, _ = self._grown(x, y, w, h, self.halo)
        wanted = []
        for block in _grid(x, y, w, h, _BLOCK):
            a, _, c, _ = self._grown(*block, self.halo)
            if not is_flat(gray[:, a - x0 : c - x0], lo):
                wanted.append(block)
        if not wanted:
            return
        smooth = blurred(gray, self.blur)
        for block in wanted:
            a, b, c, d = self._grown(*block, REACH_PX)
            yield _block(smooth[b - y0 : d - y0, a - x0 : c - x0], a, b, block)

    def _grown(self, x: int, y: int, w: int, h: int, by: int) -> tuple[int, int, int, int]:
        """Corners of a rectangle grown by a halo, clipped where the frame ends."""
        return max(0, x - by), max(0, y - by), min(self.size_px, x + w + by), min(self.size_px, y + h + by)


def _block(values: Gray, left: int, top: int, rectangle: tuple[int, int, int, int]) -> _Block:
    x, y, w, h = rectangle
    return _Block(values, (slice(y - top, y - top + h), slice(x - left, x - left + w)), x, y, w, h)


def _grid(x: int, y: int, w: int, h: int, step: int, rows: bool = False) -> Iterator[tuple[int, int, int, int]]:
    """Cut a rectangle into squares of side `step`, smaller at its far ends, or into rows of them: (x, y, w, h)."""
    for top in range(y, y + h, step):
        for left in range(x, x + w, w if rows else step):
            yield left, top, w if rows else min(step, x + w - left), min(step, y + h - top)


def is_flat(values: Gray, lo: int) -> bool:
    """Whether no L1 Sobel magnitude can exceed `lo`: each is at most 8 times the range in its 3 x 3 pixels."""
    low, high, _, _ = cv2.minMaxLoc(values)
    return bool(8 * (high - low) <= lo)


def gradient(values: Gray) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Sobel dx and dy with the border rule of Canny, and their L1 magnitude."""
    dx: Any
    dy: Any
    dx, dy = cv2.spatialGradient(values, borderType=cv2.BORDER_REPLICATE)
    return dx, dy, np.abs(dx) + np.abs(dy)


def block_edges(
    values: Gray,
    inside: tuple[slice, slice],
    rectangle: tuple[int, int, int, int],
    lo: int,
    hi: int,
    p_min: int,
    keep_map: bool = False,
) -> BlockEdges | None:
    """Edges of one block: a pure function of its blurred luma, see `data_prep.edges.hysteresis`. None without any.

    Args:
        values: blurred luma of the block and up to REACH_PX pixels around it, less where the frame ends.
        inside: where the block itself is in `values`.
        rectangle: (x, y, w, h) of the block in the frame.
        lo: lower threshold.
        hi: upper threshold.
        p_min: side of a counting cell.
        keep_map: keep what `BlockEdges.edge_map` needs.
    """
    found = weak_pixels(values, inside, lo)
    if found is None:
        return None
    pixel, magnitude = found
    return resolve_pixels(pixel, magnitude, (lo, hi), rectangle, p_min, keep_map)


def weak_pixels(
    values: Gray, inside: tuple[slice, slice], lo: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]] | None:
    """`cv2.Canny(values, lo, lo)` as a list: pixels of the block (y * w + x, ascending) and their magnitudes.

    None without any. Arguments as `block_edges`.
    """
    rows, columns = inside
    w, room = columns.stop - columns.start, (columns.stop - columns.start) * (rows.stop - rows.start) + ROOM
    pixel, magnitude = np.empty(room, np.uint32), np.empty(room, np.uint16)
    frame = (0, 0, values.shape[1], values.shape[0])  # where it is not, the halo is wide enough
    n = maxima(
        np.ascontiguousarray(values),
        frame,
        (columns.start, rows.start, columns.stop, rows.stop),
        gaussian(1),
        lo,
        (0, 0),
        np.zeros((2, 1), np.uint32),
        (0, w),
        pixel,
        magnitude,
    )
    return (pixel[:n].copy(), magnitude[:n].copy()) if n else None


@functools.cache
def gaussian(blur: int) -> NDArray[np.uint16]:
    """Weights of OpenCV's 8-bit Gaussian of side `blur` in 256ths, from the centre on, then the zeros `maxima` wants.

    Found by blurring a bright line: rounded, 255 / 256 of a weight up to 128 is the weight.
    """
    line = np.zeros((1, 2 * blur + 1), np.uint8)
    line[0, blur] = 255
    out = np.zeros(blur // 2 + 4, np.uint16)
    if blur == 1:
        out[0] = 256
    else:
        seen: Any = cv2.GaussianBlur(line, (blur, blur), 0)
        out[: blur // 2 + 1] = seen[0, blur : blur + blur // 2 + 1]
    assert int(out[0]) + 2 * int(out[1:].sum()) == 256, f"OpenCV's Gaussian of side {blur} is none of 256ths"
    return out
