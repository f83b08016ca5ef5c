"""Test slides of any size: tissue made of real texture on a white background, with a mask.

The picture of a rectangle depends on the seed and its coordinates only, so `data_prep.synth.tiff` writes it tile by
tile. Texture and mask come from the bundled kidney fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FIELD_PX = 1024
OVERLAP_PX = 128  # neighbouring fields are blended over so many pixels
STEP_PX = FIELD_PX - OVERLAP_PX
BACKGROUND = (243, 241, 245)  # what a scanner takes for white
_COARSE_PX = 512  # grid of the tissue outline
_FULL = 0.9  # share of a field that must be tissue
_SOFT = 0.06  # height of the ramp at the tissue's rim, in units of the outline's noise
_FIELDS = Path(__file__).resolve().parents[1] / "sample_data" / "glomeruli24"

# Weight of a field along one side; the weights of two neighbours add up to OVERLAP_PX.
_UP = np.arange(OVERLAP_PX, dtype=np.uint32)
_RAMP = np.concatenate([_UP, np.full(FIELD_PX - 2 * OVERLAP_PX, OVERLAP_PX, np.uint32), OVERLAP_PX - _UP])

RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class SynthSlide:
    """A slide that exists only as a recipe.

    Attributes:
        size_wh: width and height in pixels, 256 to 262144.
        seed: another seed, another slide.
        tissue: share of the area that is tissue, 0.01 to 0.95.
    """

    size_wh: tuple[int, int]
    seed: int = 0
    tissue: float = 0.35

    def __post_init__(self) -> None:
        if min(self.size_wh) < 256 or max(self.size_wh) > 262144:
            raise ValueError(f"a slide of {self.size_wh[0]} x {self.size_wh[1]} pixels: sides must be 256 to 262144")
        if not 0.01 <= self.tissue <= 0.95:
            raise ValueError(f"a tissue share of {self.tissue}: must be 0.01 to 0.95")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: must be 0 or more")

    def tile(self, x: int, y: int, w: int, h: int) -> tuple[RGB, NDArray[np.uint8]]:
        """A rectangle as (h, w, 3) RGB and (h, w) class ids (1 = glomerulus), also beyond the slide's far ends.

        A pixel is the same in every rectangle.
        """
        height = self._outline(x, y, w, h)
        rgb = np.empty((h, w, 3), np.uint8)
        rgb[:] = BACKGROUND
        ids = np.zeros((h, w), np.uint8)
        if float(height.max()) <= 0:
            return rgb, ids
        texture, classes = self._texture(x, y, w, h)
        inside = height > 0
        ids[inside] = classes[inside]
        cover = np.clip(height * np.float32(256 / _SOFT), 0, 256).astype(np.uint16)[..., None]
        if int(cover.min()) == 256:
            return texture, ids
        mixed = texture.astype(np.uint16) * cover + rgb.astype(np.uint16) * (256 - cover)
        return (mixed >> 8).astype(np.uint8), ids

    def is_background(self, x: int, y: int, w: int, h: int) -> bool:
        """Whether a rectangle certainly has no tissue: bilinear heights stay below the grid points around them."""
        coarse = _coarse(self.size_wh, self.seed, self.tissue)
        a, b = x // _COARSE_PX, y // _COARSE_PX
        c, d = (x + w - 1) // _COARSE_PX + 2, (y + h - 1) // _COARSE_PX + 2
        return float(coarse[b:d, a:c].max()) <= 0

    def _outline(self, x: int, y: int, w: int, h: int) -> NDArray[np.float32]:
        """Height over the tissue's rim, bilinear between the points of a coarse grid; above 0 is tissue."""
        coarse = _coarse(self.size_wh, self.seed, self.tissue)
        across, left, columns = _weights(x, w, coarse.shape[1])
        down, top, rows = _weights(y, h, coarse.shape[0])
        height: Any = down @ coarse[top : top + rows, left : left + columns] @ across.T
        return np.asarray(height, np.float32)

    def _texture(self, x: int, y: int, w: int, h: int) -> tuple[RGB, NDArray[np.uint8]]:
        """Fields in rows and columns, turned and tinted at random, blended where they overlap."""
        total = np.zeros((h, w, 3), np.uint32)
        ids = np.zeros((h, w), np.uint8)
        for j in range((y - OVERLAP_PX) // STEP_PX, (y + h - 1) // STEP_PX + 1):
            for i in range((x - OVERLAP_PX) // STEP_PX, (x + w - 1) // STEP_PX + 1):
                left, top = i * STEP_PX, j * STEP_PX
                x0, x1, y0, y1 = max(x, left), min(x + w, left + FIELD_PX), max(y, top), min(y + h, top + FIELD_PX)
                if x0 >= x1 or y0 >= y1:
                    continue
                rgb, classes, table = _field(self.seed, i, j)
                there = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
                here = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
                ramp_x, ramp_y = _RAMP[there[1]], _RAMP[there[0]]
                weight = ramp_y[:, None] * ramp_x
                tinted: Any = cv2.LUT(np.ascontiguousarray(rgb[there]), table)
                total[here] += tinted * weight[..., None]
                nearest = weight * 4 > OVERLAP_PX * OVERLAP_PX  # where this field has most to say
                ids[here] = np.where(nearest, classes[there], ids[here])
        return (total // (OVERLAP_PX * OVERLAP_PX)).astype(np.uint8), ids


@lru_cache(1)
def _fields() -> list[tuple[RGB, NDArray[np.uint8]]]:
    """The bundled fields that are full of tissue, with their masks."""
    found = []
    for path in sorted((_FIELDS / "images").glob("*.jpg")):
        picture: Any = cv2.imread(str(path))
        mask: Any = cv2.imread(str(_FIELDS / "masks" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        if picture is None or mask is None or picture.shape != (FIELD_PX, FIELD_PX, 3):
            raise ValueError(f"{path}: not a field of {FIELD_PX} x {FIELD_PX} pixels with a mask beside it")
        small: Any = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
        if float((small.min(2) < 225).mean()) > _FULL:
            found.append((np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)), (mask > 0).astype(np.uint8)))
    if not found:
        raise ValueError(f"{_FIELDS}: no texture; the sample images of this repository are missing")
    return found


@lru_cache(1024)
def _field(seed: int, i: int, j: int) -> tuple[RGB, NDArray[np.uint8], NDArray[np.uint8]]:
    """The field at column i, row j of the mosaic: views of a bundled one, turned, and the table that tints it."""
    rng = np.random.default_rng([seed, i + 2**20, j + 2**20])
    fields = _fields()
    rgb, ids = fields[int(rng.integers(len(fields)))]
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    gain = rng.uniform(0.96, 1.04, 3)  # stain and section thickness vary
    table = np.clip(255 - (255 - np.arange(256))[:, None] * gain, 0, 255).astype(np.uint8)
    turned = [np.rot90(part[:, ::-1] if flip else part, turns) for part in (rgb, ids)]
    return turned[0], turned[1], table[:, None, :]


@lru_cache(4)
def _coarse(size_wh: tuple[int, int], seed: int, tissue: float) -> NDArray[np.float32]:
    """Heights at the points of a coarse grid: smooth noise with fine detail, less towards the slide's edge."""
    shape = tuple(-(-side // _COARSE_PX) + 2 for side in size_wh[::-1])
    rng = np.random.default_rng([seed, *size_wh])
    height = np.zeros(shape, np.float32)
    for octave in range(4):
        sigma = max(shape) / 10 / 2.2**octave
        if sigma < 0.4 and octave:
            break
        noise: Any = cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), (0, 0), max(0.4, sigma))
        height += noise / max(float(noise.std()), 1e-6) * 0.5**octave
    grid = [np.linspace(-1, 1, n) for n in shape]
    height -= (1.5 * np.maximum(np.abs(grid[0])[:, None], np.abs(grid[1])[None]) ** 6).astype(np.float32)
    inner = height[:-1, :-1]
    fine: Any = cv2.resize(inner, None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR)
    return np.asarray(height - np.float32(np.quantile(fine, 1 - tissue)))


def _weights(start: int, count: int, points: int) -> tuple[NDArray[np.float32], int, int]:
    """Bilinear weights (count, points needed) of pixels along one axis, the first point, and the number of points."""
    at = np.arange(start, start + count)
    first = int(np.clip(at[0] // _COARSE_PX, 0, points - 2))
    cell = np.clip(at // _COARSE_PX, 0, points - 2) - first
    part = np.clip((at - (cell + first) * _COARSE_PX) / _COARSE_PX, 0, 1).astype(np.float32)
    out = np.zeros((count, int(cell[-1]) + 2), np.float32)
    out[np.arange(count), cell] = 1 - part
    out[np.arange(count), cell + 1] += part
    return out, first, out.shape[1]
