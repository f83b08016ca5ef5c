"""Pixel arithmetic shared by the readers: orientation, transparency, bit depth. Pure functions; never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Stored = Callable[[int, int, int, int], npt.NDArray[Any]]


def oriented_size(stored_wh: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return width and height as shown, for an EXIF / TIFF orientation 1 to 8."""
    return (stored_wh[1], stored_wh[0]) if orientation >= 5 else stored_wh


def read_oriented(
    read_stored: Stored, stored_wh: tuple[int, int], orientation: int, x_px: int, y_px: int, w_px: int, h_px: int
) -> npt.NDArray[Any]:
    """Read a region given in shown coordinates from an image stored in another orientation.

    Args:
        read_stored: (x, y, w, h) in stored pixels -> (h, w, ...) array.
        stored_wh: stored width and height.
        orientation: EXIF / TIFF tag 274, 1 to 8 (1 = as stored).
        x_px: left edge as shown.
        y_px: top edge as shown.
        w_px: width as shown.
        h_px: height as shown.

    Returns:
        (h, w, ...) array as shown.
    """
    width, height = stored_wh
    if orientation >= 5:  # shown rows are stored columns
        mirror_rows, mirror_cols = orientation in (6, 7), orientation in (7, 8)
        left = width - y_px - h_px if mirror_cols else y_px
        top = height - x_px - w_px if mirror_rows else x_px
        block = read_stored(left, top, h_px, w_px)
    else:
        mirror_rows, mirror_cols = orientation in (3, 4), orientation in (2, 3)
        left = width - x_px - w_px if mirror_cols else x_px
        top = height - y_px - h_px if mirror_rows else y_px
        block = read_stored(left, top, w_px, h_px)
    if mirror_rows:
        block = block[::-1]
    if mirror_cols:
        block = block[:, ::-1]
    if orientation >= 5:
        block = block.swapaxes(0, 1)
    return np.ascontiguousarray(block)


def over_white(rgb: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8], premultiplied: bool) -> npt.NDArray[np.uint8]:
    """Lay (h, w, 3) colour with (h, w) transparency over white, rounded to nearest."""
    cover = alpha[:, :, None].astype(np.uint16)
    if premultiplied:
        added = rgb.astype(np.uint16) + (255 - cover)
        lightened: npt.NDArray[np.uint8] = np.minimum(added, 255).astype(np.uint8)
        return lightened
    mixed = (rgb * cover + 255 * (255 - cover) + 127) // 255  # at most 255 * 255 + 127
    rounded: npt.NDArray[np.uint8] = mixed.astype(np.uint8)
    return rounded


def to_8_bit(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Bring unsigned samples of `bits` bits to 8: the top 8 of more, the full range 0 to 255 of fewer."""
    if bits > 8:
        values = values >> (bits - 8)
    elif bits < 8:
        values = values.astype(np.uint16) * 255 // (2**bits - 1)
    return values.astype(np.uint8, copy=False)


def gray_to_rgb(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Repeat (h, w) gray to (h, w, 3)."""
    return np.repeat(gray[:, :, None], 3, axis=2)
