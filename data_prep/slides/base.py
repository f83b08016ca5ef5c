"""What every slide reader offers, the errors it raises, and the pixel arithmetic that readers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from data_prep.system.files import one_line

Box = tuple[int, int, int, int]
Stored = Callable[[int, int, int, int], npt.NDArray[Any]]
MPP_RANGE = (0.02, 50.0)  # um per pixel; outside it the number is a printer's resolution or noise


class SlideError(ValueError):
    """An image that cannot be used; the message is one line that names the file and the cause."""


class ClosedError(SlideError):
    """Read after close."""


class DamagedTile(NamedTuple):
    """A part of a slide that could not be decoded, in pixels of its level."""

    level: int
    x_px: int
    y_px: int
    w_px: int
    h_px: int


class Opened(ABC):
    """An open file: a context manager with a path, and a size (level 0, in pixels, after orientation)."""

    path: Path
    size_wh: tuple[int, int]

    @property
    def name(self) -> str:
        """File name without its last suffix."""
        return self.path.stem

    @abstractmethod
    def close(self) -> None:
        """Release the file and the memory; reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_region(self, size_wh: tuple[int, int], x_px: int, y_px: int, w_px: int, h_px: int) -> None:
        width, height = size_wh
        if w_px < 1 or h_px < 1 or x_px < 0 or y_px < 0 or x_px + w_px > width or y_px + h_px > height:
            raise SlideError(
                f"{self.path}: region x={x_px} y={y_px} w={w_px} h={h_px} is not inside the {width} x {height} pixels"
            )


class Slide(Opened):
    """One input image, read by region at any of its levels as 8-bit RGB.

    Attributes:
        size_wh: level-0 width and height in pixels, after orientation.
        mpp: micrometres per level-0 pixel, None where the file does not say or says nonsense.
        level_sizes_wh: width and height of each level, finest first.
        reader: "fast" (`data_prep.slides.fast_tiff`), "openslide", "tifffile" or "raster".
        strict: raise at a tile that cannot be decoded; else fill it with white and note it in `damaged`.
        faults: contradictions in the file's directories, one line each; pixels that it shows may be wrong.
    """

    mpp: float | None
    level_sizes_wh: list[tuple[int, int]]
    reader: str
    strict: bool = True
    faults: tuple[str, ...] = ()
    _causes: Mapping[DamagedTile, str] = MappingProxyType({})

    @property
    def causes(self) -> dict[DamagedTile, str]:
        """Why each damaged tile could not be decoded: one line in the words of the decoder."""
        return dict(self._causes)

    @property
    def damaged(self) -> list[DamagedTile]:
        """Tiles that could not be decoded so far, sorted."""
        return sorted(self._causes)

    def tile_wh(self, level: int) -> tuple[int, int]:
        """Return the size of the file's own tiles, to which reads can be aligned; (1, 1) if it has none."""
        self._check_level(level)
        return 1, 1

    def read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Return a region, in pixels of its level, as (h, w, 3) uint8 RGB; transparency is laid over white.

        Raises:
            SlideError: the region leaves the level, or the file cannot be decoded there.
        """
        self._check_level(level)
        self._check_region(self.level_sizes_wh[level], x_px, y_px, w_px, h_px)
        try:
            return self._read(level, x_px, y_px, w_px, h_px)
        except SlideError as error:
            if self.strict or isinstance(error, ClosedError) or not all(self._tile_grid(level)):
                raise
        return self._read_by_tile(level, x_px, y_px, w_px, h_px)

    def parts(
        self,
        level: int,
        x_px: int,
        y_px: int,
        w_px: int,
        h_px: int,
        done: Box | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[npt.NDArray[np.uint8], int, int]]:
        """Yield a region in pieces that cover each pixel once: (pixels, x, y of their top left). Saves a copy.

        A piece may reach beyond the region, even beyond the level; its pixels there mean nothing. Do not write to a
        piece. `done` is a rectangle (x0, y0, x1, y1) of the level: nobody asks for its pixels again once these are
        read. The other arguments and the errors are those of `read`.
        """
        yield self.read(level, x_px, y_px, w_px, h_px), x_px, y_px

    def _read_by_tile(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Read a region with damage tile by tile, so that only bad tiles are white."""
        tile_w, tile_h = self._tile_grid(level)
        width, height = self.level_sizes_wh[level]
        out = np.full((h_px, w_px, 3), 255, np.uint8)
        for column, row in cells_under(x_px, y_px, w_px, h_px, (tile_w, tile_h)):
            left, top = column * tile_w, row * tile_h
            tile = DamagedTile(level, left, top, min(tile_w, width - left), min(tile_h, height - top))
            x0, y0 = max(x_px, left), max(y_px, top)
            x1, y1 = min(x_px + w_px, left + tile.w_px), min(y_px + h_px, top + tile.h_px)
            if tile not in self._causes:
                try:
                    paste(out, x_px, y_px, self._read(level, x0, y0, x1 - x0, y1 - y0), x0, y0)
                except SlideError as error:
                    self._causes = {**self._causes, tile: one_line(error.__cause__ or error)}
        return out

    def _tile_grid(self, level: int) -> tuple[int, int]:  # noqa: ARG002
        """Sides of the tiles that can fail one by one; (0, 0) if only the whole file can fail."""
        return 0, 0

    @abstractmethod
    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """`read` with checked arguments."""

    def _check_level(self, level: int) -> None:
        if not 0 <= level < len(self.level_sizes_wh):
            raise SlideError(f"{self.path}: has no level {level}, only 0 to {len(self.level_sizes_wh) - 1}")


def sane_mpp(mpp_x: object, mpp_y: object) -> float | None:
    """Return the mean of two micrometres-per-pixel values, None unless both are plausible and within 10 %."""
    try:
        values = [float(str(raw)) for raw in (mpp_x, mpp_y)]
    except ValueError:
        return None
    if not all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in values) or max(values) > 1.1 * min(values):
        return None
    return values[0] if values[0] == values[1] else sum(values) / 2


def cells_under(x: int, y: int, w: int, h: int, cell_wh: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield column and row of every grid cell that a rectangle touches, row by row; the grid starts at (0, 0)."""
    for row in range(y // cell_wh[1], (y + h - 1) // cell_wh[1] + 1):
        for column in range(x // cell_wh[0], (x + w - 1) // cell_wh[0] + 1):
            yield column, row


def paste(out: npt.NDArray[Any], x: int, y: int, piece: npt.NDArray[Any], left: int, top: int) -> None:
    """Copy the overlap of `piece`, whose top left is (left, top), into `out`, whose top left is (x, y)."""
    x0, x1 = max(x, left), min(x + out.shape[1], left + piece.shape[1])
    y0, y1 = max(y, top), min(y + out.shape[0], top + piece.shape[0])
    out[y0 - y : y1 - y, x0 - x : x1 - x] = piece[y0 - top : y1 - top, x0 - left : x1 - left]


def oriented_size(stored_wh: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return width and height as shown, for an EXIF / TIFF orientation 1 to 8."""
    return (stored_wh[1], stored_wh[0]) if orientation >= 5 else stored_wh


def read_oriented(
    read_stored: Stored, stored_wh: tuple[int, int], orientation: int, x_px: int, y_px: int, w_px: int, h_px: int
) -> npt.NDArray[Any]:
    """Read a region, given in shown coordinates, from an image that is stored in another orientation.

    Args:
        read_stored: (x, y, w, h) in stored pixels -> (h, w, ...) array.
        stored_wh: stored width and height.
        orientation: EXIF / TIFF tag 274, 1 to 8 (1 = as stored).

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
        mixed = np.minimum(rgb.astype(np.uint16) + (255 - cover), 255)
    else:
        mixed = (rgb * cover + 255 * (255 - cover) + 127) // 255  # at most 255 * 255 + 127
    return np.asarray(mixed, np.uint8)


def to_8_bit(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Bring unsigned samples of `bits` bits to 8: keep the top 8 of more, stretch fewer to 0 to 255."""
    if bits > 8:
        values = values >> (bits - 8)
    elif bits < 8:
        values = values.astype(np.uint16) * 255 // (2**bits - 1)
    return values.astype(np.uint8, copy=False)


def gray_to_rgb(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Repeat (h, w) gray to (h, w, 3)."""
    return np.repeat(gray[:, :, None], 3, axis=2)
