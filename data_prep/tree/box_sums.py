"""Exact sums over power-of-two squares of pixels, the arithmetic under edge counts and patches.

Must not import anything of the suite. `halve` is the only primitive: sums of 2 x 2 blocks. OpenCV's area resize by
two computes (a + b + c + d + 2) >> 2 on integers with SIMD; fed with 4a, 4b, 4c, 4d that is a + b + c + d exactly, as
long as the type holds four times the largest value. Beyond 16 bits the arrays are small and NumPy adds them.
"""

from __future__ import annotations

from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

# An array of unsigned integers whose width depends on how far it has been summed.
Sums = NDArray[np.unsignedinteger[Any]]

_BAND_ROWS = 256  # rows summed at a time: temporaries stay in the second-level cache


def halve(values: Sums, top: int) -> Sums:
    """Sums of 2 x 2 blocks, exactly.

    Args:
        values: (h, w) unsigned integers, h and w even, none larger than `top`.
        top: bound on the values; it alone decides the type of the result, so equal depths have equal types.

    Returns:
        (h / 2, w / 2) uint8, uint16, uint32 or uint64, whichever first holds 4 * top.
    """
    bound = 4 * top
    if bound <= 0xFFFF:
        quadruple: NDArray[Any] = values.astype(np.uint8 if bound <= 0xFF else np.uint16)
        np.left_shift(quadruple, 2, out=quadruple)
        h, w = values.shape
        out: Any = cv2.resize(quadruple, (w // 2, h // 2), interpolation=cv2.INTER_AREA)
        return cast(Sums, out.reshape(h // 2, w // 2))
    wide = np.uint32 if bound <= 0xFFFFFFFF else np.uint64
    rows = np.add(values[0::2], values[1::2], dtype=wide)
    return rows[:, 0::2] + rows[:, 1::2]


def sum_pyramid(values: Sums, top: int, levels: int) -> list[Sums]:
    """Sums over squares of side 1, 2, 4, ..., 2**levels.

    Args:
        values: (h, w) unsigned integers up to `top`, h and w multiples of 2**levels.
        top: bound on the values.
        levels: how many halvings.

    Returns:
        levels + 1 arrays; entry k is (h / 2**k, w / 2**k) and entry 0 is `values` itself.
    """
    h = len(values)
    out = [values]
    banded = min(levels, 4)
    if banded and h > _BAND_ROWS and h % _BAND_ROWS == 0:
        bands = [_sum_levels(values[y : y + _BAND_ROWS], top, banded) for y in range(0, h, _BAND_ROWS)]
        out += [np.concatenate(level) for level in zip(*bands, strict=True)]
    else:
        out += _sum_levels(values, top, banded)
    return out + _sum_levels(out[-1], top << (2 * banded), levels - banded)


def _sum_levels(values: Sums, top: int, levels: int) -> list[Sums]:
    out: list[Sums] = []
    for _ in range(levels):
        values = halve(values, top)
        top *= 4
        out.append(values)
    return out
