"""One region of a frame, read once: its edges, and sums of its pixels. Pure functions; no files, no slides, no ranks.

A region is an aligned square of the frame whose side is a power of two; a frame in memory is a frame of one region.
`scan_region` reads its pixels in bands of rows. It leaves what later steps need instead of pixels: exact sums over
small squares, of which tokens are made, and the edges. With `auto` thresholds it leaves the gradient histogram and the
maxima of the gradient that may become edges. `hysteresis` joins the edges of blocks, and later the edges of regions.

Why a block can know. Blur, gradient and non-maximum suppression look k // 2 + 2 pixels around. A region read with a
halo of k // 2 + 3, clipped only where the frame itself ends, computes them as OpenCV does on the whole frame.
A block whose values span at most lo / 8 has no weak pixel: an L1 Sobel magnitude is at most eight times the range in
its 3 x 3 neighbourhood. So flat background costs a minimum and a maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges import AUTO_PERCENT
from data_prep.edges.canny import MAX_MAGNITUDE, REACH_PX, ROOM, auto_thresholds, gaussian, luma
from data_prep.edges.hysteresis import BlockEdges, join_blocks, resolve_pixels
from data_prep.edges.kernels.components import pixels_of, steps_of
from data_prep.edges.kernels.pixels import cell_ranges, count_class, maxima, take
from data_prep.system.powers_of_two import is_power_of_two

Reader = Callable[[int, int, int, int], NDArray[np.uint8]]
Rectangle = tuple[int, int, int, int]
# As a reader, in pieces: (C-contiguous pixels or one colour broadcast, x, y of their top left). They may reach beyond
# the rectangle and cover it, each pixel once. The last argument is a rectangle (x0, y0, x1, y1) whose pixels are not
# asked for again.
Parts = Callable[[int, int, int, int, Rectangle], Iterable[tuple[NDArray[np.uint8], int, int]]]

WHITE = 255
BYTE = 255
BLOCK_PX = 1024  # rows of one block stay close to the first-level cache
_SMALL_FRAME_PX = 16384
_UNIT_PX = 512  # what is white and without edges is known in steps of this, or of a cell if that is smaller
_CELL_PX = 32  # side of the squares that are skipped if they are flat
_AUTO_LEAST = 4  # `auto` never has a lower threshold below this: what is flat for it is flat for any
_ENOUGH = 2**20  # gradients that let the thresholds of the frame be guessed
_PLENTY = 2**26  # the same, more closely


@dataclass(frozen=True)
class RegionSpec:
    """What the regions of one frame have in common.

    Attributes:
        size_px: side R of the frame.
        content_wh: width and height of the content at the frame's top left; the rest is white padding.
        patch: side p of the smallest leaf, a power of two.
        blur: side of the Gaussian in pixels, odd, 1 for none; None where no edges are wanted (uniform patching).
        thresholds: Canny's (lo, hi), or "auto".
        side_px: side of the regions, a power of two, at least `patch`, at most `size_px`.
        classes: K, foreground classes of the mask; 0 without one.
        auto_percent: of "auto", see `canny.auto_thresholds`.
    """

    size_px: int
    content_wh: tuple[int, int]
    patch: int
    blur: int | None
    thresholds: tuple[int, int] | Literal["auto"]
    side_px: int
    classes: int = 0
    auto_percent: int = AUTO_PERCENT

    def __post_init__(self) -> None:
        if not is_power_of_two(self.patch):
            raise ValueError(f"the patch must be a power of two, got {self.patch}")
        if not is_power_of_two(self.side_px) or not self.patch <= self.side_px <= self.size_px:
            raise ValueError(f"a region of {self.side_px} px is no power of two from {self.patch} to {self.size_px}")

    @property
    def halo(self) -> int:
        """Pixels around a region that its edges depend on."""
        return 0 if self.blur is None else self.blur // 2 + REACH_PX

    @property
    def end_wh(self) -> tuple[int, int]:
        """Beyond this corner all is white and without edges: content, halo, and the rest of the last cell."""
        unit = min(self.patch, _UNIT_PX)
        ends = (-(-(content + self.halo) // unit) * unit for content in self.content_wh)
        width, height = (min(self.size_px, end) for end in ends)
        return width, height


def base_px(spec: RegionSpec) -> int:
    """Side of the squares whose sums a scan keeps: 8, or 4 in frames whose leaves are small; less in tiny regions.

    Leaves with smaller cells have their pixels read again. Squares of 4 take four times the room on the disk.
    """
    return min(8 if spec.size_px > _SMALL_FRAME_PX else 4, spec.side_px)


@dataclass(frozen=True)
class Maxima:
    """Pixels of a region that Canny keeps above a low enough threshold, until the thresholds are known.

    Attributes:
        blocks: (n, 4) int64, rectangle (x, y, w, h) of each block in the frame.
        start: (n + 1,) int64, where the blocks' pixels begin in what follows.
        ahead: (m,) uint8, see `kernels.components.steps_of`, of y * w + x in the block.
        far_start: (n + 1,) int64, where the blocks' rows begin in `far`.
        far: (k, 2) uint32.
        magnitude: (b,) uint8, block by block either the L1 magnitudes, 2 bytes each, or 1 byte each: what is above
            `least`, 255 for 255 and more.
        least: (n,) int64, -1 for blocks with 2 bytes a pixel.
        above: () int64, all with larger magnitudes than this are there.
    """

    blocks: NDArray[np.int64]
    start: NDArray[np.int64]
    ahead: NDArray[np.uint8]
    far_start: NDArray[np.int64]
    far: NDArray[np.uint32]
    magnitude: NDArray[np.uint8]
    least: NDArray[np.int64]
    above: NDArray[np.int64]

    def serves(self, lo: int, hi: int) -> bool:
        """Whether these thresholds can be told from what is there."""
        narrow = self.least[self.least >= 0]
        return lo >= int(self.above) and hi < BYTE + int(narrow.min(initial=MAX_MAGNITUDE))

    def block(self, i: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16], int]:
        """Pixels (y * w + x, ascending) of a block, their magnitudes less a number, and that number."""
        here = slice(*self.start[i : i + 2].tolist())
        pixel = np.empty(here.stop - here.start, np.uint32)
        pixels_of(self.ahead[here], self.far[slice(*self.far_start[i : i + 2].tolist())], pixel)
        begin = int((np.diff(self.start[: i + 1]) * np.where(self.least[:i] < 0, 2, 1)).sum())
        if self.least[i] < 0:
            return pixel, self.magnitude[begin : begin + 2 * len(pixel)].copy().view(np.uint16), 0
        return pixel, self.magnitude[begin : begin + len(pixel)].astype(np.uint16), int(self.least[i])


@dataclass(frozen=True)
class RegionScan:
    """What is left of a region's pixels.

    Attributes:
        sums: (3, S / b, S / b) uint16, sums of red, green and blue over b x b squares, b = `base_px`.
        mask_sums: (K, S / b, S / b) uint8, content pixels of class k + 1 in the square; None without a mask.
        edges: the edges if the thresholds are fixed, else None.
        hist: (2041,) int64, content pixels per L1 gradient magnitude (from 1 on) with `auto`, else None.
        maxima: what `edges_of_maxima` needs with `auto`, else None.
        blocks_total: blocks of about 1024 x 1024 pixels in the region, padding not counted.
        blocks_skipped: those too flat for any edge.
    """

    sums: NDArray[np.uint16]
    mask_sums: NDArray[np.uint8] | None
    edges: BlockEdges | None
    hist: NDArray[np.int64] | None
    maxima: Maxima | None
    blocks_total: int
    blocks_skipped: int

    def squares(self) -> dict[str, NDArray[Any]]:
        """`sums` and, with a mask, `mask_sums`: what tokens are made of."""
        return {"sums": self.sums} | ({} if self.mask_sums is None else {"mask_sums": self.mask_sums})


def scan_region(
    read_rgb: Reader,
    read_mask: Reader | None,
    spec: RegionSpec,
    x_px: int,
    y_px: int,
    parts: Parts | None = None,
    seen: NDArray[np.int64] | int = 0,
) -> RegionScan:
    """Read a region once, in bands of rows.

    Args:
        read_rgb: colours of a rectangle (x, y, w, h) of the frame's content, (h, w, 3) uint8.
        read_mask: class ids of a rectangle, (h, w) uint8; None without a mask.
        spec: the frame.
        x_px: left edge of the region, a multiple of its side.
        y_px: top edge.
        parts: the same as `read_rgb` in pieces, used instead of it: saves a copy.
        seen: (2041,) gradients of other regions of the frame, or 0. Decides with `auto` how many maxima are kept, that
            they are enough but few; nothing else.

    Raises:
        ValueError: the mask has a class id above `spec.classes`.
    """
    side, b = spec.side_px, base_px(spec)
    cells = side // b
    sums = np.full((3, cells, cells), WHITE * b * b, np.uint16)
    mask_sums = np.zeros((spec.classes, cells, cells), np.uint8) if read_mask is not None else None
    # Rows and columns that are not white padding: content for sums, halo further for edges.
    wide, high = (min(side, max(0, end - at)) for end, at in zip(spec.end_wh, (x_px, y_px), strict=True))
    wanted = parts or (lambda x, y, w, h, _: [(np.ascontiguousarray(read_rgb(x, y, w, h)), x, y)])
    scan = _Scan(spec, (x_px, y_px), (wide, high) if wide else (0, 0), wanted, sums, seen)
    for top in range(0, high if wide else 0, BLOCK_PX):
        scan.add_rows(min(high, top + BLOCK_PX))
        if read_mask is not None and mask_sums is not None:
            _sum_mask(mask_sums, read_mask, spec, (x_px, y_px), top, b)
    blocks, hist, kept = scan.result()
    edges = None if blocks is None else join_blocks(blocks, (x_px, y_px, side, side), spec.patch)
    return RegionScan(sums, mask_sums, edges, hist, kept, scan.total, scan.total - scan.kept)


def edges_of_maxima(kept: Maxima, spec: RegionSpec, x_px: int, y_px: int, lo: int, hi: int) -> BlockEdges | None:
    """Edges of a region from the maxima that its scan left, once `auto` thresholds are known.

    Args:
        kept: `RegionScan.maxima`.
        spec: the frame.
        x_px: left edge of the region.
        y_px: top edge.
        lo: lower threshold, at least 4.
        hi: upper threshold.

    Returns:
        The edges; None if the scan kept too few, or too little of each, because the region has another contrast than
        the frame: scan it again with these thresholds.
    """
    if not kept.serves(lo, hi):
        return None
    blocks = []
    for i, (x, y, w, h) in enumerate(kept.blocks.tolist()):
        pixel, magnitude, least = kept.block(i)
        blocks.append(resolve_pixels(pixel, magnitude, (lo - least, hi - least), (x, y, w, h), spec.patch))
    return join_blocks(blocks, (x_px, y_px, spec.side_px, spec.side_px), spec.patch)


def _sum_mask(
    mask_sums: NDArray[np.uint8], read_mask: Reader, spec: RegionSpec, corner_xy: tuple[int, int], top: int, b: int
) -> None:
    """Count the content pixels of every class in the squares of one band."""
    x, y = corner_xy[0], corner_xy[1] + top
    w = min(spec.side_px, spec.content_wh[0] - x)
    h = min(BLOCK_PX, spec.side_px - top, spec.content_wh[1] - y)
    if w <= 0 or h <= 0:
        return
    ids = np.ascontiguousarray(read_mask(x, y, w, h))
    if h % b or w % b:
        ids = np.pad(ids, ((0, -h % b), (0, -w % b)))
    highest = int(ids.max())
    if highest > spec.classes:
        raise ValueError(f"the mask has class {highest}, but only classes 1 to {spec.classes} are expected")
    rows, columns = slice(top // b, top // b + ids.shape[0] // b), slice(0, ids.shape[1] // b)
    for k in range(highest):
        counts = np.empty((ids.shape[0] // b, ids.shape[1] // b), np.uint8)
        count_class(ids, k + 1, counts)
        mask_sums[k, rows, columns] = counts


class _Scan:
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
    ) -> None:
        self.spec, self.parts, self.sums, self.seen = spec, parts, sums, seen
        (self.x, self.y), (self.wide, self.high) = corner_xy, size_wh
        self.halo, self.sought = spec.halo, spec.blur is not None
        self.block = min(BLOCK_PX, spec.side_px)
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
