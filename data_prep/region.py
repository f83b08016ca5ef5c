"""One region of a frame: the unit of a distributed build. Pure functions of pixels; no files, no slides, no ranks.

A region is an aligned square of the frame whose side is a power of two. `scan_region` reads its pixels once, in bands
of rows with the halo that blur and Canny need, and leaves what later steps need instead of pixels: exact sums over
small squares (patches of all but the smallest leaves are made of them), and the edges, or with `auto` thresholds the
gradient histogram and the blurred luma of the blocks that are not flat. `light_regions` and `final_counts` then give
the counts of the whole frame, bit for bit those of OpenCV on the whole frame: see `data_prep.edges` for why a block
can know, and `data_prep.hysteresis` for what joins blocks, here those of a region and later the regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.cells import Sums, is_power_of_two, sum_pyramid
from data_prep.edges import MAX_MAGNITUDE, REACH_PX, block_edges, blurred, gradient, is_flat, luma
from data_prep.hysteresis import BlockEdges, final_counts, join_blocks, light

__all__ = [
    "Luma",
    "RegionScan",
    "RegionSpec",
    "base_px",
    "edges_of_luma",
    "final_counts",
    "light_regions",
    "pack_edges",
    "scan_region",
    "unpack_edges",
]

Reader = Callable[[int, int, int, int], NDArray[np.uint8]]
Rectangle = tuple[int, int, int, int]

BLOCK_PX = 512  # blurred luma, gradients and labels of one block stay in the second-level cache
_AUTO_LEAST = 4  # `auto` never has a lower threshold below this: a block flat for it is flat for any
WHITE = 255


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
    """

    size_px: int
    content_wh: tuple[int, int]
    patch: int
    blur: int | None
    thresholds: tuple[int, int] | Literal["auto"]
    side_px: int
    classes: int = 0

    def __post_init__(self) -> None:
        if not is_power_of_two(self.side_px) or not self.patch <= self.side_px <= self.size_px:
            raise ValueError(f"a region of {self.side_px} px is no power of two from {self.patch} to {self.size_px}")

    @property
    def halo(self) -> int:
        """Pixels around a region that its edges depend on."""
        return 0 if self.blur is None else self.blur // 2 + REACH_PX

    @property
    def end_wh(self) -> tuple[int, int]:
        """Beyond this corner all is white and without edges: content, halo, and the rest of the last cell."""
        unit = min(self.patch, BLOCK_PX)
        ends = (-(-(content + self.halo) // unit) * unit for content in self.content_wh)
        width, height = (min(self.size_px, end) for end in ends)
        return width, height


def base_px(spec: RegionSpec) -> int:
    """Side of the squares whose sums a scan keeps: 8, less where a whole frame is that small."""
    return min(8, spec.side_px)


@dataclass(frozen=True)
class Luma:
    """Blurred luma of the blocks of a region that are not flat, to be kept until the thresholds are known.

    Attributes:
        xy: (n, 2) int32, top left of each block in the frame.
        values: (n, BLOCK_PX + 2 * REACH_PX, same) uint8, block and halo from the top left on; what the frame's border
            cuts off is zero at the far end and never looked at. May be memory-mapped.
    """

    xy: NDArray[np.int32]
    values: NDArray[np.uint8]


@dataclass(frozen=True)
class RegionScan:
    """What is left of a region's pixels.

    Attributes:
        sums: (3, S / b, S / b) uint16, sums of red, green and blue over b x b squares, b = `base_px`.
        mask_sums: (K, S / b, S / b) uint8, content pixels of class k + 1 in the square; None without a mask.
        edges: the edges if the thresholds are fixed, else None.
        hist: (2041,) int64, content pixels per L1 gradient magnitude (from 1 on) with `auto`, else None.
        luma: what `edges_of_luma` needs with `auto`, else None.
        blocks_total: blocks of up to 512 x 512 pixels in the region, padding not counted.
        blocks_skipped: those too flat for any edge.
    """

    sums: NDArray[np.uint16]
    mask_sums: NDArray[np.uint8] | None
    edges: BlockEdges | None
    hist: NDArray[np.int64] | None
    luma: Luma | None
    blocks_total: int
    blocks_skipped: int


def scan_region(
    read_rgb: Reader, read_mask: Reader | None, spec: RegionSpec, x_px: int, y_px: int
) -> RegionScan:
    """Read a region once, in bands of rows.

    Args:
        read_rgb: colours of a rectangle (x, y, w, h) of the frame, (h, w, 3) uint8; white in the padding.
        read_mask: class ids of a rectangle, (h, w) uint8; None without a mask.
        spec: the frame.
        x_px: left edge of the region, a multiple of its side.
        y_px: top edge.

    Raises:
        ValueError: the mask has a class id above `spec.classes`.
    """
    side, b = spec.side_px, base_px(spec)
    scan = _Scan(spec, x_px, y_px)
    cells = side // b
    sums = np.full((3, cells, cells), WHITE * b * b, np.uint16)
    mask_sums = np.zeros((spec.classes, cells, cells), np.uint8) if read_mask is not None else None
    # Rows and columns that are not white padding: content for sums, halo further for edges.
    wide, high = (min(side, max(0, end - at)) for end, at in zip(spec.end_wh, (x_px, y_px), strict=True))
    for top in range(0, high if wide else 0, BLOCK_PX):
        rows = min(BLOCK_PX, high - top)
        x0, y0, x1, y1 = scan.grown((x_px, y_px + top, wide, rows), spec.halo)
        rgb = np.ascontiguousarray(read_rgb(x0, y0, x1 - x0, y1 - y0))
        inner = rgb[y_px + top - y0 :][:rows, x_px - x0 :][:, :wide]
        ranges = scan.ranges(rgb, (x0, y0), (x_px, y_px + top, wide, rows))
        _sum_colours(sums, inner, top, b, [low == WHITE for low, _ in ranges])
        if spec.blur is not None:
            scan.add_band(rgb, (x0, y0), (x_px, y_px + top, wide, rows), ranges)
        if read_mask is not None and mask_sums is not None:
            _sum_mask(mask_sums, read_mask, spec, (x_px, y_px), top, b)
    return RegionScan(sums, mask_sums, *scan.result(), scan.total, scan.total - scan.kept)


class _Scan:
    """Blocks of one region as its bands come in."""

    def __init__(self, spec: RegionSpec, x_px: int, y_px: int) -> None:
        self.spec, self.x, self.y = spec, x_px, y_px
        self.hist = np.zeros(MAX_MAGNITUDE + 1, np.int64)
        self.blocks: list[BlockEdges] = []
        side, spool = min(BLOCK_PX, spec.side_px), spec.thresholds == "auto" and spec.blur is not None
        most = max(1, spec.side_px // BLOCK_PX) ** 2 if spool else 0
        self.luma = np.zeros((most, side + 2 * REACH_PX, side + 2 * REACH_PX), np.uint8)
        self.luma_xy = np.zeros((most, 2), np.int32)
        self.total = self.kept = 0

    def grown(self, rectangle: Rectangle, by: int) -> Rectangle:
        """Corners (x0, y0, x1, y1) of a rectangle grown by a halo, clipped where the frame ends."""
        x, y, w, h = rectangle
        size = self.spec.size_px
        return max(0, x - by), max(0, y - by), min(size, x + w + by), min(size, y + h + by)

    def ranges(
        self, rgb: NDArray[np.uint8], corner_xy: tuple[int, int], band: Rectangle
    ) -> list[tuple[float, float]]:
        """Smallest and largest value of any colour in every block of a band, halo included."""
        found = [cv2.minMaxLoc(_flat_view(self._cut(rgb, corner_xy, block))) for block in _blocks(band)]
        return [(low, high) for low, high, _, _ in found]

    def add_band(
        self,
        rgb: NDArray[np.uint8],
        corner_xy: tuple[int, int],
        band: Rectangle,
        ranges: list[tuple[float, float]],
    ) -> None:
        """Blur what is not flat in a band and take its blocks.

        Args:
            rgb: colours of the band and its halo, rows of pixels without gaps inside.
            corner_xy: where its top left lies in the frame.
            band: the band without halo, at most BLOCK_PX high.
            ranges: from `ranges`.
        """
        spec = self.spec
        assert spec.blur is not None
        lo = spec.thresholds[0] if spec.thresholds != "auto" else _AUTO_LEAST
        self.total += len(ranges)
        # Seen before the blur, which never widens the range of what it sees; neither does luma that of the colours.
        pairs = zip(_blocks(band), ranges, strict=True)
        for coloured in _runs([block for block, (low, high) in pairs if 8 * (high - low) > lo]):
            whole = _around(coloured)
            gray = luma(self._cut(rgb, corner_xy, whole))
            origin_xy = self.grown(whole, spec.halo)[:2]
            for run in _runs([block for block in coloured if not is_flat(self._cut(gray, origin_xy, block), lo)]):
                part = _around(run)
                smooth = blurred(self._cut(gray, origin_xy, part), spec.blur)
                a, b, _, _ = self.grown(part, spec.halo)
                for block in run:
                    x0, y0, x1, y1 = self.grown(block, REACH_PX)
                    self._add_block(smooth[y0 - b : y1 - b, x0 - a : x1 - a], (x0, y0), block, lo)

    def _cut(self, pixels: NDArray[np.uint8], corner_xy: tuple[int, int], rectangle: Rectangle) -> NDArray[np.uint8]:
        """A rectangle with halo out of pixels whose top left is `corner_xy`."""
        x0, y0, x1, y1 = self.grown(rectangle, self.spec.halo)
        return pixels[y0 - corner_xy[1] : y1 - corner_xy[1], x0 - corner_xy[0] : x1 - corner_xy[0]]

    def _add_block(
        self, values: NDArray[np.uint8], corner_xy: tuple[int, int], block: Rectangle, lo: int
    ) -> None:
        if is_flat(values, lo):
            return
        inside = _inside(corner_xy, block)
        if self.spec.thresholds != "auto":
            self.kept += 1
            found = block_edges(values, inside, block, *self.spec.thresholds, self.spec.patch)
            if found is not None:
                self.blocks.append(found)
            return
        magnitude = gradient(values)[2][inside].view(np.uint16)
        w, h = (min(block[2 + i], self.spec.content_wh[i] - block[i]) for i in (0, 1))
        if w > 0 and h > 0:
            # Counts come as float32, exact below 2**24: a block has fewer pixels than that.
            counts: Any = cv2.calcHist([magnitude[:h, :w]], [0], None, [len(self.hist)], [0, len(self.hist)])
            self.hist += counts.ravel().astype(np.int64)
        if cv2.minMaxLoc(magnitude)[1] > lo:
            # Untouched pages of the zeros cost nothing, so room for all blocks may be asked for.
            self.luma[self.kept, : values.shape[0], : values.shape[1]] = values
            self.luma_xy[self.kept] = block[:2]
            self.kept += 1

    def result(self) -> tuple[BlockEdges | None, NDArray[np.int64] | None, Luma | None]:
        """Edges, or histogram and luma."""
        if self.spec.blur is None:
            return None, None, None
        if self.spec.thresholds != "auto":
            return _join(self.blocks, self.spec, self.x, self.y), None, None
        self.hist[0] = 0
        return None, self.hist, Luma(self.luma_xy[: self.kept], self.luma[: self.kept])


def edges_of_luma(kept: Luma, spec: RegionSpec, x_px: int, y_px: int, lo: int, hi: int) -> BlockEdges:
    """Edges of a region from the blurred luma that its scan left, once `auto` thresholds are known.

    Args:
        kept: `RegionScan.luma`.
        spec: the frame.
        x_px: left edge of the region.
        y_px: top edge.
        lo: lower threshold, at least 4.
        hi: upper threshold.
    """
    scan = _Scan(spec, x_px, y_px)
    blocks = []
    for (x, y), packed in zip(kept.xy.tolist(), kept.values, strict=True):
        ends = [min(BLOCK_PX, at + spec.side_px - v, end - v)
                for v, at, end in zip((x, y), (x_px, y_px), spec.end_wh, strict=True)]  # fmt: skip
        block = (x, y, *ends)
        x0, y0, x1, y1 = scan.grown(block, REACH_PX)
        values = packed[: y1 - y0, : x1 - x0]
        if not is_flat(values, lo):
            found = block_edges(values, _inside((x0, y0), block), block, lo, hi, spec.patch)
            if found is not None:
                blocks.append(found)
    return _join(blocks, spec, x_px, y_px)


def light_regions(regions: list[BlockEdges], size_px: int) -> list[NDArray[np.bool_]]:
    """Which open components of the regions are edges, (n_open,) bool each; looks at the regions' sides only."""
    return light(regions, size_px)


def pack_edges(edges: BlockEdges) -> dict[str, NDArray[Any]]:
    """A region's edges as plain arrays, counts in the narrowest type that holds a full cell."""
    top = int(edges.counts.max(initial=0))
    return {
        "rectangle": np.array([edges.x_px, edges.y_px, edges.w_px, edges.h_px], np.int64),
        "sides": np.concatenate(edges.sides).astype(np.int32),
        "n_open": np.array(edges.n_open, np.int64),
        "cell_xy": np.array(edges.cell_xy, np.int64),
        "counts": edges.counts.astype(np.min_scalar_type(top)),
        "open_cells": edges.open_cells,
    }


def unpack_edges(arrays: dict[str, NDArray[Any]], counts: bool = True) -> BlockEdges:
    """The inverse of `pack_edges`.

    Args:
        arrays: from `pack_edges`, or a mapping that loads them one by one.
        counts: False to leave counts and the cells of open components out, which `light_regions` does not need.
    """
    x, y, w, h = arrays["rectangle"].tolist()
    cell_x, cell_y = arrays["cell_xy"].tolist()
    split = np.split(arrays["sides"], np.cumsum([w, w, h]))
    none = np.zeros((0, 3), np.int64)
    numbers = arrays["counts"].astype(np.int32) if counts else np.zeros((0, 0), np.int32)
    cells = arrays["open_cells"] if counts else none
    return BlockEdges(
        x, y, w, h, tuple(split), int(arrays["n_open"]), (cell_x, cell_y), numbers, cells, None, None
    )


def _join(blocks: list[BlockEdges], spec: RegionSpec, x_px: int, y_px: int) -> BlockEdges:
    return join_blocks(blocks, (x_px, y_px, spec.side_px, spec.side_px), spec.patch)


def _inside(corner_xy: tuple[int, int], block: Rectangle) -> tuple[slice, slice]:
    """Where the block lies in an array whose top left is `corner_xy`."""
    left, top = block[0] - corner_xy[0], block[1] - corner_xy[1]
    return slice(top, top + block[3]), slice(left, left + block[2])


def _blocks(band: Rectangle) -> list[Rectangle]:
    """The blocks of a band, from left to right."""
    x, y, w, h = band
    return [(left, y, min(BLOCK_PX, x + w - left), h) for left in range(x, x + w, BLOCK_PX)]


def _runs(blocks: list[Rectangle]) -> Iterator[list[Rectangle]]:
    """Neighbouring blocks together: OpenCV's blur is slower on narrow pictures."""
    run: list[Rectangle] = []
    for block in blocks:
        if run and run[-1][0] + run[-1][2] != block[0]:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _sum_colours(sums: NDArray[np.uint16], rgb: NDArray[np.uint8], top: int, b: int, white: list[bool]) -> None:
    """Sums over b x b squares of a band that begins `top` rows below the region's top; `sums` are those of white."""
    h, w = -(-rgb.shape[0] // b) * b, -(-rgb.shape[1] // b) * b
    if (h, w) != rgb.shape[:2]:
        padded = np.full((h, w, 3), WHITE, np.uint8)
        padded[: rgb.shape[0], : rgb.shape[1]] = rgb
        rgb = padded
    for left, skip in zip(range(0, w, BLOCK_PX), white, strict=True):
        if skip:
            continue
        part = rgb[:, left : left + BLOCK_PX]
        target = sums[:, top // b : (top + h) // b, left // b : (left + part.shape[1]) // b]
        target[:] = _square_sums(part, b)


def _around(run: list[Rectangle]) -> Rectangle:
    """The rectangle of neighbouring blocks of one row."""
    x, y, _, h = run[0]
    return x, y, run[-1][0] + run[-1][2] - x, h


def _flat_view(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 3) with contiguous pixels as (h, 3 w), without a copy though the rows are apart."""
    h, w, c = part.shape
    return np.lib.stride_tricks.as_strided(part, (h, w * c), (part.strides[0], 1))


def _square_sums(part: NDArray[np.uint8], b: int) -> NDArray[np.uint16]:
    """Sums of an (h, w, 3) picture over b x b squares, (3, h / b, w / b) uint16: down first, then across."""
    h, w, _ = part.shape
    flat = _flat_view(part)
    if b == 1:
        return part.transpose(2, 0, 1).astype(np.uint16)
    rows = np.add(flat[0::b], flat[1::b], dtype=np.uint16)
    for k in range(2, b):
        rows += flat[k::b]
    # The mean of b values times b: at most 255 * b * b, so exact in 16 bits.
    np.multiply(rows, b, out=rows)
    out: Any = cv2.resize(rows.reshape(h // b, w, 3), (w // b, h // b), interpolation=cv2.INTER_AREA)
    return cast(NDArray[np.uint16], out).reshape(h // b, w // b, 3).transpose(2, 0, 1)


def _sum_mask(
    mask_sums: NDArray[np.uint8], read_mask: Reader, spec: RegionSpec, corner_xy: tuple[int, int], top: int, b: int
) -> None:
    """Count the content pixels of every class in the squares of one band."""
    x, y = corner_xy[0], corner_xy[1] + top
    w = min(spec.side_px, spec.content_wh[0] - x)
    h = min(BLOCK_PX, spec.side_px - top, spec.content_wh[1] - y)
    if w <= 0 or h <= 0:
        return
    ids = np.zeros((-(-h // b) * b, -(-w // b) * b), np.uint8)
    ids[:h, :w] = read_mask(x, y, w, h)
    highest = int(ids.max())
    if highest > spec.classes:
        raise ValueError(f"the mask has class {highest}, but only classes 1 to {spec.classes} are expected")
    rows, columns = slice(top // b, top // b + ids.shape[0] // b), slice(0, ids.shape[1] // b)
    for k in range(highest):
        plane: Sums = (ids == k + 1).view(np.uint8)
        mask_sums[k, rows, columns] = sum_pyramid(plane, 1, b.bit_length() - 1)[-1]
