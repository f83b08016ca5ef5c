"""Large pictures and slides of real texture, put together from the bundled kidney fields."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from tests.helpers.repository import GLOMERULI

TILE_PX = 512


def texture() -> list[np.ndarray]:
    """The bundled kidney fields, 1024 x 1024 RGB."""
    paths = sorted((GLOMERULI / "images").iterdir())
    return [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in paths]


def mosaic_block(fields: list[np.ndarray], row: int, column: int) -> np.ndarray:
    """Field number (row, column) of an endless mosaic, flipped so that neighbours differ."""
    number = 7 * row + column
    field = fields[number % len(fields)]
    return field[:: -1 if (number // 3) % 2 else 1, :: -1 if number % 2 else 1]


def mosaic(side_px: int) -> np.ndarray:
    """The top left corner of the mosaic, of whole fields."""
    fields = texture()
    count = max(1, side_px // 1024)
    return np.vstack([np.hstack([mosaic_block(fields, r, c) for c in range(count)]) for r in range(count)])


def write_mosaic(path: Path, side_px: int) -> None:
    """A JPEG-tiled TIFF of the mosaic, one tile in memory at a time."""
    import tifffile

    fields = texture()
    per_field = 1024 // TILE_PX

    def tiles() -> Iterator[np.ndarray]:
        for row in range(side_px // TILE_PX):
            for column in range(side_px // TILE_PX):
                block = mosaic_block(fields, row // per_field, column // per_field)
                y, x = row % per_field * TILE_PX, column % per_field * TILE_PX
                yield np.ascontiguousarray(block[y : y + TILE_PX, x : x + TILE_PX])

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side_px, side_px, 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 90},
        bigtiff=True,
        metadata=None,
    )
