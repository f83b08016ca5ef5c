"""One region of a frame: the unit of a distributed build. Pure functions of pixels; no files, no slides, no ranks.

A region is an aligned square of the frame whose side is a power of two. `scan_region` reads its pixels once, in bands
of rows, and leaves what later steps need instead of pixels: exact sums over small squares (patches of all but the
smallest leaves are made of them), and the edges, or with `auto` thresholds the gradient histogram and the maxima of
the gradient that may become edges. `light_regions` and `final_counts` then give the counts of the whole frame, bit
for bit those of OpenCV on the whole frame: see `data_prep.edges.canny` for why a block can know, and
`data_prep.edges.hysteresis` for what joins blocks, here those of a region and later the regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.hysteresis import BlockEdges, final_counts, join_blocks, light, resolve_pixels
from data_prep.edges.kernels.sums import count_class
from data_prep.edges.region_spec import WHITE, Maxima, Parts, Reader, RegionSpec, base_px
from data_prep.edges.scan import Scan

__all__ = [
    "WHITE",
    "Maxima",
    "RegionScan",
    "RegionSpec",
    "base_px",
    "edges_of_maxima",
    "final_counts",
    "light_regions",
    "pack_edges",
    "scan_region",
    "unpack_edges",
]

BLOCK_PX = 1024  # rows of one block stay close to the first-level cache


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
    scan = Scan(spec, (x_px, y_px), (wide, high) if wide else (0, 0), wanted, sums, seen, BLOCK_PX)
    for top in range(0, high if wide else 0, BLOCK_PX):
        scan.add_rows(min(high, top + BLOCK_PX))
        if read_mask is not None and mask_sums is not None:
            _sum_mask(mask_sums, read_mask, spec, (x_px, y_px), top, b)
    blocks, hist, kept = scan.result()
    edges = None if blocks is None else _join(blocks, spec, x_px, y_px)
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
    return BlockEdges(x, y, w, h, tuple(split), int(arrays["n_open"]), (cell_x, cell_y), numbers, cells, None, None)


def _join(blocks: list[BlockEdges], spec: RegionSpec, x_px: int, y_px: int) -> BlockEdges:
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
