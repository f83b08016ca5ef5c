"""Small pictures of image, truth and prediction for the report, painted from cells without the full-size raster.

Must not import torch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.system.files import write_atomic


def paint(
    values: NDArray[Any], leaf_xy: NDArray[Any], leaf_size: NDArray[Any], size_px: int, out_px: int
) -> NDArray[np.float32]:
    """Per-cell values as a picture of the frame of `out_px` pixels a side: the box mean of the full-size raster.

    Args:
        values: (N, p, p, C).
        leaf_xy: (N, 2) frame pixels.
        leaf_size: (N,) frame pixels.
        size_px: R.
        out_px: R divided by a power of two.

    Returns:
        (out_px, out_px, C) float32.
    """
    factor = size_px // out_px
    patch, channels = values.shape[1], values.shape[3]
    out = np.zeros((out_px, out_px, channels), np.float32)
    for side in np.unique(leaf_size):
        rows = np.flatnonzero(leaf_size == side)
        block = max(1, int(side) // factor)  # pixels of the picture that a leaf is wide
        part = values[rows].astype(np.float32)
        if block <= patch:
            cut = patch // block
            part = part.reshape(len(rows), block, cut, block, cut, channels).mean((2, 4))
        else:
            part = part.repeat(block // patch, axis=1).repeat(block // patch, axis=2)
        x, y = (leaf_xy[rows] // factor).T
        if side < factor:  # several leaves share one pixel, each with its share of the area
            np.add.at(out, (y, x), part[:, 0, 0] * (int(side) / factor) ** 2)
        else:
            span = np.arange(block)
            out[y[:, None, None] + span[:, None], x[:, None, None] + span] = part
    return out


def picture_side(size_px: int, limit_px: int) -> int:
    """Largest R / 2^k that is at most `limit_px`."""
    side = size_px
    while side > limit_px and side % 2 == 0:
        side //= 2
    return side


def save_png(path: Path, values: NDArray[Any]) -> None:
    """Write (h, w, 3) or (h, w) values 0..255 as a PNG, whole or not at all."""
    data = io.BytesIO()
    Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).save(data, "PNG")
    write_atomic(path, data.getbuffer())


def class_gray(values: NDArray[Any]) -> NDArray[np.float32]:
    """(h, w, K) shares of foreground 0..1 as one gray picture 0..255; class k of K is as bright as k / K."""
    classes = values.shape[-1]
    levels = np.arange(1, classes + 1, dtype=np.float32) * (255 / classes)
    gray: NDArray[np.float32] = (values * levels).max(-1)
    return gray
