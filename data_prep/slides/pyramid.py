"""Writes tiled pyramids in bounded memory: tiles come compressed, and coarser levels wait on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile

from data_prep.system.files import replacing


class TileSpool:
    """Compressed tiles in the order they came, kept in an unnamed file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        self._sizes: list[int] = []

    def add(self, data: bytes) -> None:
        """Take one more."""
        self._sizes.append(self._file.write(data))

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for size in self._sizes:
            yield self._file.read(size)


class LevelOfTiles(NamedTuple):
    """One level to write: its size, um per pixel if known, and its compressed tiles, row by row."""

    size_wh: tuple[int, int]
    mpp: float | None
    tiles: Iterable[bytes]


def row_of_tiles(rows: npt.NDArray[np.uint8], tile_px: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield one row of a picture's tiles, (tile_px, tile_px, ...) each; tiles at the border are filled up with 0."""
    for left in range(0, rows.shape[1], tile_px):
        part = rows[:, left : left + tile_px]
        if part.shape[:2] != (tile_px, tile_px):
            full = np.zeros((tile_px, tile_px, *part.shape[2:]), np.uint8)
            full[: part.shape[0], : part.shape[1]] = part
            part = full
        yield np.ascontiguousarray(part)


def write_pyramid(path: Path, levels: Iterable[LevelOfTiles], tile_px: int, samples: int = 1, **options: Any) -> None:
    """Write a tiled BigTIFF, whole or not at all: flat pages, coarser ones marked as reduced, as OpenSlide wants them.

    Args:
        levels: Finest first; a level's tiles are asked for when the levels before it are written.
        samples: 1 for class ids, 3 for colour.
        options: For `tifffile.TiffWriter.write` at every level; a `description` goes to level 0 only.

    Raises:
        OSError: The file cannot be written; nothing is left of it.
    """
    description = options.pop("description", None)
    with replacing(path) as file, tifffile.TiffWriter(file, bigtiff=True) as out:
        for i, level in enumerate(levels):
            known: dict[str, Any] = (
                {"resolution": (1e4 / level.mpp,) * 2, "resolutionunit": "CENTIMETER"} if level.mpp else {}
            )
            out.write(
                iter(level.tiles),
                shape=(*level.size_wh[::-1], *((samples,) if samples > 1 else ())),
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                subfiletype=int(i > 0),
                description=description if i == 0 else None,
                metadata=None,
                software=False,
                **known,
                **options,
            )
