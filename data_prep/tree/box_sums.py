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

from data_prep.system.powers_of_two import is_power_of_two

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


def counts_from_map(edge_map: NDArray[Any], p_min: int) -> NDArray[np.int32]:
    """Number of set pixels in every p_min x p_min cell.

    Args:
        edge_map: (h, w) bool or uint8 (any non-zero value counts as set), h and w multiples of p_min.
        p_min: side of a cell in pixels, a power of two.

    Returns:
        (h / p_min, w / p_min) int32.

    Raises:
        ValueError: p_min is not a power of two or does not divide the map.
    """
    if not is_power_of_two(p_min):
        raise ValueError(f"the smallest leaf must have a power-of-two side, got {p_min}")
    h, w = edge_map.shape
    if h % p_min or w % p_min:
        raise ValueError(f"a {w} x {h} map cannot be cut into cells of {p_min} pixels")
    ones = edge_map.view(np.uint8) if edge_map.dtype == np.bool_ else (edge_map != 0).view(np.uint8)
    return sum_pyramid(ones, 1, p_min.bit_length() - 1)[-1].astype(np.int32)
