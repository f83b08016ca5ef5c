"""Random flips, quarter turns and colours of training images, on token sets as well as on crops.

Everything is a pure function of its arguments. The caller seeds the generator with (seed, global sample index), so that
a picture looks the same on any number of ranks.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.tree.quadtree import morton
from launch.config.data import DataConfig

Array = NDArray[Any]

DIHEDRAL = 8


def turn_pixels(values: Array, code: int, rows: int, cols: int) -> Array:
    """Flip and turn the axes `rows` (y) and `cols` (x) of an array of squares by `code` of the dihedral group; a view.

    Args:
        code: 0..7: bit 2 swaps x and y, then bit 0 reverses x, then bit 1 reverses y.
    """
    if code & 4:
        values = values.swapaxes(rows, cols)
    if code & 1:
        values = np.flip(values, cols)
    if code & 2:
        values = np.flip(values, rows)
    return values


def turn_leaves(leaf_xy: Array, leaf_size: Array, size_px: int, code: int) -> Array:
    """New top left corners (N, 2) of leaves when the whole frame of `size_px` is turned by `code`."""
    x, y = leaf_xy[:, 0], leaf_xy[:, 1]
    if code & 4:
        x, y = y, x
    if code & 1:
        x = size_px - x - leaf_size
    if code & 2:
        y = size_px - y - leaf_size
    return np.stack([x, y], axis=1)


def turn_tokens(
    leaf_xy: Array, leaf_size: Array, per_token: dict[str, Array], size_px: int, code: int
) -> tuple[Array, Array, dict[str, Array]]:
    """The token set of the turned frame: leaves moved, patches turned, all rows in Morton order again.

    `per_token` holds arrays (N, p, p, ...) of patches and counts. Returns leaf_xy, leaf_size and per_token of the
    turned frame.
    """
    if code == 0:
        return leaf_xy, leaf_size, per_token
    moved = turn_leaves(leaf_xy, leaf_size, size_px, code)
    order = np.argsort(morton(moved[:, 0], moved[:, 1]), kind="stable")
    turned = {name: turn_pixels(values, code, 1, 2)[order] for name, values in per_token.items()}
    return moved[order], leaf_size[order], turned


def leaves_in_square(
    leaf_xy: Array, leaf_size: Array, content_wh: tuple[int, int], corner_xy: Array, side_px: int
) -> NDArray[np.bool_]:
    """Which leaves (N,) bool have their middle in a square of the frame: the part of a tree.

    The leaf that holds the middle of the square is included, so that the part is not empty where leaves are large. A
    leaf that reaches beyond the content counts as if its middle lay on the content's border.
    """
    middle = np.minimum(leaf_xy + leaf_size[:, None] // 2, np.array(content_wh) - 1)
    inside = ((middle >= corner_xy) & (middle < corner_xy + side_px)).all(axis=1)
    at = corner_xy + side_px // 2 - leaf_xy
    kept: NDArray[np.bool_] = inside | ((at >= 0) & (at < leaf_size[:, None])).all(axis=1)
    return kept


def change_picture(values: NDArray[np.float32], rng: np.random.Generator, data: DataConfig) -> NDArray[np.float32]:
    """Augment a whole picture (H, W, C), float32 in [0, 1], as the data section says; `rng` draws what is needed."""
    # Flips and turns that keep the size: eight of a square, four of another rectangle.
    h, w = values.shape[:2]
    if data.flips:
        values = turn_pixels(values, int(rng.integers(DIHEDRAL if h == w else 4)), 0, 1)
    elif data.mirror and rng.random() < 0.5:
        values = np.flip(values, 1)
    # Turn about the middle, border repeated.
    if data.rotate_deg:
        angle = float(rng.uniform(-data.rotate_deg, data.rotate_deg))
        turn = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, 1.0)
        turned = cv2.warpAffine(np.ascontiguousarray(values), turn, (w, h), borderMode=cv2.BORDER_REPLICATE)
        values = np.asarray(turned, np.float32).reshape(h, w, -1)
    # Brightness, contrast and noise.
    if data.jitter:
        brightness, contrast = rng.uniform(-data.jitter, data.jitter, 2)
        values = (values * np.float32(1 + brightness) - np.float32(0.5)) * np.float32(1 + contrast) + np.float32(0.5)
    if data.noise:
        values = values + rng.normal(0.0, data.noise, values.shape).astype(np.float32)
    if data.jitter or data.noise:
        values = np.clip(values, 0, 1)
    return np.ascontiguousarray(values)


def jitter(pixels: Array, rng: np.random.Generator, strength: float) -> NDArray[np.float32]:
    """Random brightness, contrast, gamma and saturation, each at most about `strength` (0..0.9) away from no change.

    All four act on single pixels, so they may be applied to patches. Patches are means over leaves; changing the mean
    differs slightly from the mean of changed pixels.

    Args:
        pixels: (..., 3) uint8.
        rng: Draws four numbers when strength > 0, none otherwise.
        strength: 0 only converts.

    Returns:
        (..., 3) float32 in [0, 1].
    """
    levels = np.arange(256, dtype=np.float64) / 255
    if strength == 0:
        plain: NDArray[np.float32] = levels.astype(np.float32)[pixels]
        return plain
    brightness, contrast, gamma, saturation = rng.uniform(-strength, strength, 4)
    table = np.clip(levels * (1 + brightness), 0, 1) ** np.exp(gamma)
    table = np.clip((table - 0.5) * (1 + contrast) + 0.5, 0, 1).astype(np.float32)
    values: NDArray[np.float32] = table[pixels]
    gray = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values -= gray[..., None]
    values *= np.float32(1 + saturation)
    values += gray[..., None]
    np.clip(values, 0, 1, out=values)
    return values
