"""Whole frames by way of their regions, and the small oracles that tests of edges share."""

import cv2
import numba
import numpy as np

from data_prep.edges.canny import auto_thresholds
from data_prep.edges.hysteresis import final_counts, light, pack_edges, resolve_pixels, unpack_edges
from data_prep.edges.kernels.pixels import _maxima_row
from data_prep.edges.scan import RegionSpec, edges_of_maxima, scan_region
from data_prep.tokens.cut import assemble, region_rows
from data_prep.tokens.token_set import TokenSet, check_leaves
from data_prep.tree.quadtree import Leaves


def counts_from_map(edge_map: np.ndarray, p_min: int) -> np.ndarray:
    """Number of set pixels in every p_min x p_min cell, int32."""
    h, w = (side // p_min for side in edge_map.shape)
    return (edge_map != 0).reshape(h, p_min, w, p_min).sum((1, 3), dtype=np.int32)


def corners_of(spec: RegionSpec) -> list[tuple[int, int]]:
    """Top left corners of all regions, row by row."""
    steps = range(0, spec.size_px, spec.side_px)
    return [(x, y) for y in steps for x in steps]


def edges_of_regions(read, read_mask, spec: RegionSpec):
    """Counts (R/p, R/p), thresholds and scans of a frame by its regions, all edges through their packed form."""
    corners = corners_of(spec)
    scans = [scan_region(read, read_mask, spec, x, y) for x, y in corners]
    if spec.thresholds == "auto":
        lo, hi = auto_thresholds(sum(scan.hist for scan in scans), spec.auto_percent)
        edges = [edges_of_maxima(scan.maxima, spec, x, y, lo, hi) for scan, (x, y) in zip(scans, corners, strict=True)]
    else:
        lo, hi = spec.thresholds
        edges = [scan.edges for scan in scans]
    packed = [pack_edges(one) for one in edges]
    lit = light([unpack_edges(one, counts=False) for one in packed], spec.size_px)
    counts = np.zeros((spec.size_px // spec.patch,) * 2, np.int64)
    for one, flags, (x, y) in zip(packed, lit, corners, strict=True):
        part = final_counts(unpack_edges(one), flags)
        i, j = y // spec.patch, x // spec.patch
        counts[i : i + len(part), j : j + len(part)] = part
    return counts, (lo, hi), scans


def cut(
    read_rgb, leaves: Leaves, p: int, size_px: int, content_wh, read_mask=None, classes: int = 1, side_px=None
) -> TokenSet:
    """Tokens of leaves: from pixels as of one region, or by regions of `side_px` and what their scans leave."""
    check_leaves(leaves, p, size_px)
    kinds = classes if read_mask is not None else 0
    spec = RegionSpec(size_px, content_wh, p, None, "auto", side_px or size_px, kinds)
    if side_px is None:
        return assemble(leaves, [region_rows({}, leaves, spec, (0, 0), read_rgb, read_mask)], spec)
    corners = [at for at in corners_of(spec) if at[0] < content_wh[0] and at[1] < content_wh[1]]
    scans = [scan_region(read_rgb, read_mask, spec, *at).squares() for at in corners]
    parts = [region_rows(sums, leaves, spec, at, read_rgb, read_mask) for sums, at in zip(scans, corners, strict=True)]
    return assemble(leaves, parts, spec)


def resolve_block(weak: np.ndarray, strong: np.ndarray, x_px: int, y_px: int, p_min: int):
    """`resolve_pixels` of a block from two maps (h, w), of weak pixels and of strong ones."""
    h, w = weak.shape
    pixel = np.flatnonzero(weak)
    magnitude = 1 + strong.ravel().take(pixel).astype(np.uint16)
    return resolve_pixels(pixel.astype(np.uint32), magnitude, (0, 1), (x_px, y_px, w, h), p_min)


def gradient(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """OpenCV's Sobel dx and dy with the border rule of Canny, and their L1 magnitude."""
    dx, dy = cv2.spatialGradient(values, borderType=cv2.BORDER_REPLICATE)
    return dx, dy, np.abs(dx) + np.abs(dy)


@numba.njit(error_model="numpy")
def is_maximum(magnitude, dx, dy, limit, flag):
    """Canny's suppression for one row, `cv2.Canny(dx, dy, limit, limit)`, given derivatives.

    `magnitude` (3 * (w + 2),) holds the row above, the row and the row below, one pixel more at each end.
    """
    n, zero = np.uint64(len(dx)), np.uint64(0)
    stride = n + np.uint64(2)
    _maxima_row(magnitude, zero, stride, stride + stride, dx, dy, zero, np.int16(limit), flag, n)
