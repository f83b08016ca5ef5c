"""The arithmetic of OpenCV's Canny that regions share: luma, blur, thresholds. No files, no slides, no ranks.

Weak pixels are `Canny(lo, lo)`. Strong ones are the weak pixels whose magnitude exceeds hi, because suppression does
not depend on the threshold. The rest is hysteresis, see `data_prep.edges.hysteresis`.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.edges import AUTO_PERCENT

__all__ = ["auto_thresholds", "blur_for", "blurred", "edge_map", "gaussian", "luma"]

Gray = NDArray[np.uint8]

MAX_MAGNITUDE = 2040  # |dx| + |dy| of a 3 x 3 Sobel on bytes: 4 * 255 each

_BLUR = {512: 3, 1024: 3, 4096: 7, 8192: 9, 16384: 11, 32768: 13, 65536: 15}
REACH_PX = 3  # of gradient and non-maximum suppression, with a pixel to spare
ROOM = 16  # spare entries that `kernels.pixels.maxima` may write to


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
    """Edges of a whole picture at once, (h, w) bool: what regions must agree with.

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


def blurred(gray: Gray, blur: int) -> Gray:
    """OpenCV's Gaussian of side `blur`, sigma from it; 1 for none."""
    if blur == 1:
        return gray
    out: Any = cv2.GaussianBlur(gray, (blur, blur), 0)
    return cast(Gray, out)


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
