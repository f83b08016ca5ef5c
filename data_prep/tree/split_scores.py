"""Scores of a frame's squares for splits by other things than edges; must not import files, readers, MPI or torch.

The budget rule asks two things of a score: it is an integer of at least 0, and no child's exceeds its parent's. The
sum of squared deviations has that by its decomposition (what is left of the parent's is the spread of the children's
means), the entropy times the number of pixels because entropy is concave. Both are about the content alone: white
padding has no part in any sum, nor in the blur.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.edges.canny import Gray, blurred, luma
from data_prep.edges.scan import Reader
from data_prep.system.powers_of_two import tree_depth
from data_prep.tree.box_sums import sum_pyramid

__all__ = ["BINS", "Criterion", "content_luma", "content_pixels", "entropy_levels", "score_levels", "variance_levels"]

IntArray = NDArray[np.int64]
Criterion = Literal["variance", "entropy"]
Levels = list[IntArray]

BINS = 32  # of the luma's histogram, eight values each
_SHIFT = 3
_NO_BIN = 255
_BAND_PX = 512


def score_levels(
    read_rgb: Reader, size_px: int, content_wh: tuple[int, int], p_min: int, blur: int, split_on: Criterion
) -> Levels:
    """Scores of all nodes of a frame that fits in memory, for `quadtree.budget_tree_of`.

    Args:
        read_rgb: colours of a rectangle (x, y, w, h) of the frame, (h, w, 3) uint8; only the content is read.
        size_px: side R of the frame, p_min times a power of two.
        content_wh: width and height of the content at the top left.
        p_min: side of a cell, a power of two.
        blur: side of the Gaussian kernel, odd; 1 for none.
        split_on: what to score.

    Returns:
        As `variance_levels` or `entropy_levels`.

    Raises:
        ValueError: sizes that make no sense, in one line.
    """
    gray = content_luma(read_rgb, content_wh, blur)
    score = {"variance": variance_levels, "entropy": entropy_levels}[split_on]
    return score(gray, size_px, p_min)


def content_luma(read_rgb: Reader, content_wh: tuple[int, int], blur: int) -> Gray:
    """Blurred luma of the content alone, (h, w) uint8; at its border OpenCV mirrors it, so padding does not get in."""
    width, height = content_wh
    gray = np.empty((height, width), np.uint8)
    for top in range(0, height, _BAND_PX):
        rows = min(_BAND_PX, height - top)
        gray[top : top + rows] = luma(read_rgb(0, top, width, rows))
    return blurred(gray, blur)


def content_pixels(depth: int, size_px: int, content_wh: tuple[int, int]) -> IntArray:
    """Pixels of the content in every node of a depth, (2**depth, 2**depth) int64, indexed [y, x]."""
    side = size_px >> depth
    start = np.arange(1 << depth, dtype=np.int64) * side
    across, down = (np.clip(length - start, 0, side) for length in content_wh)
    return np.outer(down, across)


def variance_levels(gray: Gray, size_px: int, p_min: int) -> Levels:
    """Sum of squared deviations of every node's luma from the node's mean, rounded down to an integer.

    With sum S and sum of squares T over n pixels it is T - S^2 / n. S^2 can pass 64 bits, so S is divided first: with
    S = q n + r, the score is T - q (q n + 2 r) - ceil(r^2 / n), exact for up to 2^31 pixels. Rounding down keeps the
    order, so a child's score does not exceed its parent's. Needs about six bytes per frame pixel and 50 per cell.

    Args:
        gray: (h, w) uint8, luma of the content at the top left of the frame.
        size_px: side R of the frame.
        p_min: side of the smallest cell; R / p_min is a power of two.

    Returns:
        log2(R / p_min) + 1 arrays; entry d is (2**d, 2**d) int64, indexed [y, x]. 0 where there is no content.

    Raises:
        ValueError: R, p_min or the content do not fit each other.
    """
    bottom = _bottom(gray, size_px, p_min)
    frame = _framed(gray, size_px, 0)
    sums = _by_depth(frame, 255, bottom)
    squares = _by_depth(np.square(frame, dtype=np.uint16), 255**2, bottom)
    levels = []
    for depth in range(bottom + 1):
        n = np.maximum(1, content_pixels(depth, size_px, gray.shape[::-1]))
        s, t = sums[depth].astype(np.int64), squares[depth].astype(np.int64)
        q, r = np.divmod(s, n)
        levels.append(t - q * (s + r) + (-(r * r) // n))  # the last term is -ceil(r^2 / n)
    return levels


def entropy_levels(gray: Gray, size_px: int, p_min: int) -> Levels:
    """Bits that every node's luma takes under the node's own histogram: n times Shannon's entropy, to the nearest bit.

    The histogram has 32 equal bins over 0..255. With c_b of n pixels in bin b it is n log2 n - sum of c_b log2 c_b, in
    double precision, the bins in their order. A node of two colours takes at least 2 bits, so rounding makes nothing 0
    that is not. Where rounding errors would leave a child above its parent, the parent is raised to it. One bin at a
    time is counted: needs about three bytes per frame pixel and 40 per cell, not 32 counts for each.

    Args, returns and raises: as `variance_levels`.
    """
    bottom = _bottom(gray, size_px, p_min)
    frame = _framed(gray >> _SHIFT, size_px, _NO_BIN)
    bits = [_times_log(content_pixels(depth, size_px, gray.shape[::-1])) for depth in range(bottom + 1)]
    for value in range(BINS):
        here = (frame == value).view(np.uint8)
        if here.any():
            for total, count in zip(bits, _by_depth(here, 1, bottom), strict=True):
                total -= _times_log(count)
    return raised([np.maximum(0, np.rint(total)).astype(np.int64) for total in bits])


def raised(levels: Levels) -> Levels:
    """Every parent raised to its largest child, from the bottom up, in place; `levels` as `entropy_levels` has them."""
    for depth in range(len(levels) - 2, -1, -1):
        below, side = levels[depth + 1], 1 << depth
        np.maximum(levels[depth], below.reshape(side, 2, side, 2).max(axis=(1, 3)), out=levels[depth])
    return levels


def _times_log(count: NDArray[Any]) -> NDArray[np.float64]:
    """c log2 c, 0 for 0."""
    c = count.astype(np.float64)
    product: NDArray[np.float64] = c * np.log2(np.maximum(c, 1))
    return product


def _bottom(gray: Gray, size_px: int, p_min: int) -> int:
    """Depth of the smallest cells."""
    if max(gray.shape) > size_px or not gray.size:
        raise ValueError(f"content of {gray.shape[1]} x {gray.shape[0]} pixels is not in a frame of {size_px}")
    return tree_depth(size_px, p_min)


def _framed(values: NDArray[Any], size_px: int, rest: int) -> NDArray[np.uint8]:
    frame = np.full((size_px, size_px), rest, np.uint8)
    frame[: values.shape[0], : values.shape[1]] = values
    return frame


def _by_depth(frame: NDArray[Any], top: int, bottom: int) -> list[NDArray[Any]]:
    """Sums over the nodes of every depth, 0 first, of pixel values up to `top`."""
    return sum_pyramid(frame, top, len(frame).bit_length() - 1)[::-1][: bottom + 1]
