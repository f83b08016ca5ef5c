"""Writes a synthetic slide and its mask as pyramids, tile by tile in bounded memory.

Level 0 streams into the file by rows of tiles. Half-size rows of a coarser level are kept until they fill a row of its
tiles; these are compressed at once and wait in an unnamed file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from data_prep.slides.pyramid import LevelOfTiles, TileSpool, row_of_tiles, write_pyramid
from data_prep.synth.pictures import BACKGROUND, SynthSlide
from data_prep.system.progress import Progress

_SMALLEST_PX = 1024  # no level is made below this side

Array = NDArray[np.uint8]


@dataclass
class _PyramidLevel:
    """One level of a pyramid: takes rows of pixels, gives compressed tiles, and halves the rows for the next level."""

    size_wh: tuple[int, int]
    tile_px: int
    add: Callable[[bytes], None]
    encode: Callable[[Array], bytes]
    halve: Callable[[Array], Array]
    above: _PyramidLevel | None

    def __post_init__(self) -> None:
        self._rows: list[Array] = []
        self._count = self._seen = 0

    def take(self, rows: Array) -> None:
        """Take the next rows, an even number of them except at the end."""
        self._rows.append(rows)
        self._count += len(rows)
        self._seen += len(rows)
        while self._count >= self.tile_px or (self._seen == self.size_wh[1] and self._count):
            held = np.concatenate(self._rows) if len(self._rows) > 1 else self._rows[0]
            now, rest = held[: self.tile_px], held[self.tile_px :]
            self._rows, self._count = ([rest] if len(rest) else []), len(rest)
            self._finish(now)

    def _finish(self, rows: Array) -> None:
        for tile in row_of_tiles(rows, self.tile_px):
            self.add(self.encode(tile))
        if self.above is not None:
            width, height = self.above.size_wh
            half = self.halve(rows)[: height - self.above._seen, :width]
            if len(half):
                self.above.take(half)


def _half_mean(rows: Array) -> Array:
    h, w = rows.shape[0] // 2 * 2, rows.shape[1] // 2 * 2
    out: Any = cv2.resize(rows[:h, :w], (w // 2, h // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(out)


def _half_nearest(rows: Array) -> Array:
    return np.ascontiguousarray(rows[: len(rows) // 2 * 2 : 2, : rows.shape[1] // 2 * 2 : 2])


def _flat_once(encode: Callable[[Array], bytes]) -> Callable[[Array], bytes]:
    """An encoder of tiles that compresses the same flat tile only once."""
    flat: dict[bytes, bytes] = {}

    def encoded(tile: Array) -> bytes:
        if not (tile == tile[0, 0]).all():
            return encode(tile)
        key = tile[0, 0].tobytes()
        if key not in flat:
            flat[key] = encode(tile)
        return flat[key]

    return encoded


def level_sizes(size_wh: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of the pyramid's levels, factor 2, finest first."""
    sizes = [size_wh]
    while min(sizes[-1]) // 2 >= _SMALLEST_PX:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def write_slide(
    slide: SynthSlide,
    path: Path,
    mask_path: Path | None = None,
    *,
    tile_px: int = 512,
    quality: int = 87,
    mpp: float = 0.5,
) -> None:
    """Write a slide, and its mask if a path is given; each is there whole or not at all.

    Both are tiled BigTIFF pyramids of factor 2 that OpenSlide and QuPath open. The slide is JPEG (4:2:0), the mask
    deflate with a pyramid by nearest pixel.

    Args:
        tile_px: Side of the file's tiles, a multiple of 16, at least 64.
        quality: JPEG quality, 1 to 100.
        mpp: Micrometres per pixel, for the resolution tags.

    Raises:
        OSError: Disk full, folder missing, ...
        ValueError: Impossible sizes.
    """
    if tile_px < 64 or tile_px % 16:
        raise ValueError(f"a tile of {tile_px} px: must be a multiple of 16, at least 64")
    if not 1 <= quality <= 100 or not mpp > 0:
        raise ValueError(f"quality {quality}, mpp {mpp}: quality must be 1 to 100, mpp above 0")

    # The coarser levels, which wait in spools, from the coarsest on.
    sizes = level_sizes(slide.size_wh)
    colours = [TileSpool(path.parent) for _ in sizes[1:]]
    masks = [TileSpool(path.parent) for _ in sizes] if mask_path is not None else []
    jpeg = _flat_once(lambda tile: bytes(imagecodecs.jpeg8_encode(tile, level=quality, subsampling="420")))
    flate = _flat_once(lambda tile: bytes(imagecodecs.zlib_encode(tile.tobytes(), level=6)))
    above = mask_above = None
    for i in range(len(sizes) - 1, 0, -1):
        above = _PyramidLevel(sizes[i], tile_px, colours[i - 1].add, jpeg, _half_mean, above)
        if masks:
            mask_above = _PyramidLevel(sizes[i], tile_px, masks[i].add, flate, _half_nearest, mask_above)

    # Level 0, which feeds them while it is written.
    tiles: list[bytes] = []
    base = _PyramidLevel(sizes[0], tile_px, tiles.append, jpeg, _half_mean, above)
    mask_base = _PyramidLevel(sizes[0], tile_px, masks[0].add, flate, _half_nearest, mask_above) if masks else None

    def level_0() -> Iterator[bytes]:
        width, height = slide.size_wh
        with Progress(round(width * height / 1e6), "synth", "Mpx") as progress:
            done = 0
            for top in range(0, height, tile_px):
                rgb, ids = _row(slide, top, min(tile_px, height - top), tile_px)
                base.take(rgb)
                if mask_base is not None:
                    mask_base.take(ids)
                yield from tiles
                tiles.clear()
                now = round((top + len(rgb)) * width / 1e6)
                progress.update(now - done)
                done = now

    # Both files.
    mpps = [mpp * 2**i for i in range(len(sizes))]
    tiles_of: list[Iterable[bytes]] = [level_0(), *colours]
    levels = [LevelOfTiles(*level) for level in zip(sizes, mpps, tiles_of, strict=True)]
    write_pyramid(path, levels, tile_px, 3, compression="jpeg", photometric="ycbcr", subsampling=(2, 2))
    if mask_path is not None:
        levels = [LevelOfTiles(*level) for level in zip(sizes, mpps, masks, strict=True)]
        write_pyramid(mask_path, levels, tile_px, compression="deflate", photometric="minisblack")


def _row(slide: SynthSlide, top: int, rows: int, tile_px: int) -> tuple[Array, Array]:
    """One row of tiles, (rows, W, 3) and (rows, W)."""
    width = slide.size_wh[0]
    rgb = np.empty((rows, width, 3), np.uint8)
    rgb[:] = BACKGROUND
    ids = np.zeros((rows, width), np.uint8)
    for left in range(0, width, tile_px):
        w = min(tile_px, width - left)
        if not slide.is_background(left, top, w, rows):
            rgb[:, left : left + w], ids[:, left : left + w] = slide.tile(left, top, w, rows)
    return rgb, ids
