"""Reads TIFF through tifffile: regions of one page as stored (`TiffPlane`), and slides made of such pages.

A tiled page is read by tile, a page of strips whole.
"""

from __future__ import annotations

import logging
import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from data_prep.slides.base import (
    Slide,
    SlideError,
    cells_under,
    gray_to_rgb,
    oriented_size,
    over_white,
    paste,
    read_oriented,
    sane_mpp,
    to_8_bit,
)
from data_prep.slides.memory import check_decoded_size, check_memory
from data_prep.system.files import one_line

_CACHE_BYTES = 64 * 2**20
_ALIKE_BYTES = 4096
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # faults are raised here, in one line


class UnsupportedTiffError(SlideError):
    """A sound TIFF whose colours or compression tifffile does not decode; Pillow may."""


def open_tiff(path: Path) -> Any:
    """Open a TIFF with a two-dimensional page as a tifffile.TiffFile. Raises SlideError for damaged directories."""
    try:
        tiff = tifffile.TiffFile(path)
    except Exception as error:  # struct, key, index and value errors, all from broken directories
        raise SlideError(f"{path}: not a readable TIFF: {one_line(error)}") from error
    try:
        if not len(tiff.pages):
            raise ValueError("its directory is missing, the file is truncated or damaged")
        if _next_directory(tiff):
            raise ValueError("the file is truncated: it lists more images than it holds")
        page: Any = tiff.pages[0]
        if len(page.shape) < 2 or 0 in page.shape:
            raise ValueError(f"first page has shape {page.shape}")
    except Exception as error:  # as above
        tiff.close()
        raise SlideError(f"{path}: TIFF without a readable image: {one_line(error)}") from error
    return tiff


def _next_directory(tiff: tifffile.TiffFile) -> int:
    """Offset of the directory behind the last readable one; 0 in a complete file."""
    last: Any = tiff.pages[-1]
    form, handle = tiff.tiff, tiff.filehandle
    handle.seek(last.offset)
    count = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))[0]
    handle.seek(last.offset + form.tagnosize + count * form.tagsize)
    raw = handle.read(form.offsetsize)
    return int(struct.unpack(form.offsetformat, raw)[0]) if len(raw) == form.offsetsize else 0


class TiffPlane:
    """One page of an open TIFF file.

    Attributes:
        size_wh: width and height as shown, after the orientation tag.
        samples: samples per pixel.
        bits: bits per sample, at most 16, unsigned.
        photometric: TIFF photometric interpretation.
        tile_wh: tile size as shown, (1, 1) where the page is not tiled.
    """

    def __init__(self, path: Path, page: Any, fill: int, max_raster_gib: float | None = None) -> None:
        """Check that a page of an open file can be read; `fill` is the sample of tiles that the file leaves out.

        Raises:
            SlideError: unusual layout, samples without a fixed range, data beyond the end of the file, or too large.
        """
        self._path, self._page, self._fill = path, page, fill
        self.samples = int(page.samplesperpixel)
        self.photometric = int(page.photometric)
        self.bits = int(page.bitspersample)
        self._stored_wh = (int(page.imagewidth), int(page.imagelength))
        orientation = page.tags.valueof(274, 1)
        self._orientation = orientation if orientation in range(1, 9) else 1
        self.size_wh = oriented_size(self._stored_wh, self._orientation)
        self._separate = self.samples > 1 and int(page.planarconfig) == 2
        self._cache: OrderedDict[int, npt.NDArray[Any] | None] = OrderedDict()
        self._cache_bytes = 0
        self._alike: tuple[bytes, npt.NDArray[Any]] | None = None
        self._whole: npt.NDArray[Any] | None = None
        self._lock = threading.RLock()
        self.tile_wh = (1, 1)
        if page.is_tiled:
            self.tile_wh = oriented_size((int(page.tilewidth), int(page.tilelength)), self._orientation)
        self._check(max_raster_gib)

    def _check(self, max_raster_gib: float | None) -> None:
        page, path = self._page, self._path
        if page.dtype is None or page.dtype.kind not in "ub" or page.dtype.itemsize > 2:
            kind = page.dtype if page.dtype is not None else f"{page.bitspersample} bits per sample"
            raise SlideError(f"{path}: pixels of type {kind} have no fixed range; convert to 8 or 16 bit")
        try:
            page.decode(None, 0)
        except Exception as error:  # raised by tifffile's stand-in for a missing codec
            raise UnsupportedTiffError(f"{path}: TIFF cannot be decoded: {one_line(error)}") from error
        if int(page.imagedepth) != 1:
            raise SlideError(f"{path}: a volume of {page.imagedepth} slices, not a flat image")
        width, height = self._stored_wh
        unit_wh = (int(page.tilewidth), int(page.tilelength)) if page.is_tiled else (width, height)
        what = f"{width} x {height} pixels" + (f" in tiles of {unit_wh[0]} x {unit_wh[1]}" if page.is_tiled else "")
        check_decoded_size(path, math.prod(unit_wh) * self.samples * page.dtype.itemsize, what, max_raster_gib)
        count = math.prod(page.chunked)
        ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
        file_bytes = page.parent.filehandle.size
        if len(ends) < count:
            raise SlideError(f"{path}: truncated TIFF: {len(ends)} of {count} tiles or strips are listed")
        if ends and max(ends) > file_bytes:
            raise SlideError(f"{path}: truncated TIFF: pixels reach to byte {max(ends)}, the file has {file_bytes}")

    def read(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        """Return the stored samples of a region as shown, (h, w, samples); bool pages come as uint8 0 / 1.

        Raises:
            SlideError: damaged pixels or a compression that is not supported.
        """
        return read_oriented(self._stored, self._stored_wh, self._orientation, x_px, y_px, w_px, h_px)

    @property
    def rows_at_once(self) -> int:
        """Rows of the smallest band that `read_strips` can yield: a strip; 0 where the page is tiled or turned."""
        if self._page.is_tiled or self._orientation != 1:
            return 0
        return min(int(self._page.rowsperstrip) or self._stored_wh[1], self._stored_wh[1])

    def read_strips(self, rows_px: int) -> Iterator[npt.NDArray[Any]]:
        """Yield an untiled page from top to bottom, (rows, width, samples), in whole strips of about `rows_px` rows.

        It keeps nothing, so a page may be larger than the memory. Raises as `read`.
        """
        width, height = self._stored_wh
        step = self.rows_at_once * max(1, rows_px // self.rows_at_once)
        for y in range(0, height, step):
            yield self._assemble(0, y, width, min(step, height - y))

    def _stored(self, x: int, y: int, w: int, h: int) -> npt.NDArray[Any]:
        if not self._page.is_tiled:
            with self._lock:
                if self._whole is None:
                    self._whole = self._assemble(0, 0, *self._stored_wh)
            return self._whole[y : y + h, x : x + w]
        return self._assemble(x, y, w, h)

    def _assemble(self, x: int, y: int, w: int, h: int) -> npt.NDArray[Any]:
        """Decode the tiles or strips under a stored rectangle into one array."""
        page = self._page
        dtype = np.uint8 if page.dtype.kind == "b" else page.dtype.newbyteorder("=")
        out = np.full((h, w, self.samples), self._fill, dtype)
        if page.is_tiled:
            unit_w, unit_h = int(page.tilewidth), int(page.tilelength)
        else:
            unit_w, unit_h = self._stored_wh[0], min(int(page.rowsperstrip) or self._stored_wh[1], self._stored_wh[1])
        across, down = -(-self._stored_wh[0] // unit_w), -(-self._stored_wh[1] // unit_h)
        for plane in range(self.samples if self._separate else 1):
            target = out[:, :, plane : plane + 1] if self._separate else out
            for column, row in cells_under(x, y, w, h, (unit_w, unit_h)):
                unit = self._unit((plane * down + row) * across + column)
                if unit is not None:
                    paste(target, x, y, unit, column * unit_w, row * unit_h)
        return out

    def _unit(self, index: int) -> npt.NDArray[Any] | None:
        """Decoded tile or strip (rows, columns, samples), None where the file leaves it out; the last few are kept."""
        page = self._page
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            try:
                handle = page.parent.filehandle
                data = None
                if page.databytecounts[index]:
                    handle.seek(page.dataoffsets[index])
                    data = handle.read(page.databytecounts[index])
                decoded = self._decoded(data, index)
            except Exception as error:  # imagecodecs has one exception class per codec
                check_memory(error, 2 * math.prod(page.chunks) * page.dtype.itemsize)
                raise SlideError(f"{self._path}: tile or strip {index} cannot be decoded: {one_line(error)}") from error
            if page.is_tiled:
                self._keep(index, decoded)
            return decoded

    def _decoded(self, data: bytes | None, index: int) -> npt.NDArray[Any] | None:
        """Decode one tile or strip. Background tiles, compressed to the same few bytes, are decoded once."""
        page = self._page
        inner = False
        if page.is_tiled and not self._separate:
            width, height = self._stored_wh
            row, column = divmod(index, -(-width // page.tilewidth))
            inner = (column + 1) * page.tilewidth <= width and (row + 1) * page.tilelength <= height
        small = inner and data is not None and len(data) <= _ALIKE_BYTES  # others are cut to the page's size
        if small and self._alike is not None and self._alike[0] == data:
            return self._alike[1]
        unit = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        found: npt.NDArray[Any] | None = None if unit is None else unit[0]
        if small and data is not None and found is not None:
            self._alike = (data, found)
        return found

    def _keep(self, index: int, unit: npt.NDArray[Any] | None) -> None:
        self._cache[index] = unit
        self._cache_bytes += 0 if unit is None else unit.nbytes
        while self._cache_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cache_bytes -= 0 if old is None else old.nbytes

    def close(self) -> None:
        """Drop decoded pixels; the file is the caller's to close."""
        self._whole = self._alike = None
        self._cache.clear()
        self._cache_bytes = 0


class TiffSlide(Slide):
    """TIFF files that OpenSlide does not open: strips, 16 bit, separate planes, unusual compressions."""

    reader = "tifffile"

    def __init__(self, path: Path, max_raster_gib: float | None = None) -> None:
        """Open the file and its pyramid. Raises SlideError if it has no colours that make RGB, or is too large."""
        self.path = path
        self._tiff = open_tiff(path)
        try:
            pages = self._pyramid()
            self._colour = _Colour(path, pages[0])
            self._planes = [TiffPlane(path, page, self._colour.white, max_raster_gib) for page in pages]
        except Exception as error:
            self._tiff.close()
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: TIFF directory cannot be read: {one_line(error)}") from error
        self.level_sizes_wh = [plane.size_wh for plane in self._planes]
        self.size_wh = self.level_sizes_wh[0]
        self.mpp = _tiff_mpp(pages[0])

    def close(self) -> None:
        """Close the file and drop decoded pixels."""
        for plane in self._planes:
            plane.close()
        self._tiff.close()

    def tile_wh(self, level: int) -> tuple[int, int]:
        """As `Slide.tile_wh`."""
        self._check_level(level)
        return self._planes[level].tile_wh

    def _tile_grid(self, level: int) -> tuple[int, int]:
        width, height = self.tile_wh(level)
        return (width, height) if width > 1 else (0, 0)

    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        return self._colour.to_rgb(self._planes[level].read(x_px, y_px, w_px, h_px))

    def _pyramid(self) -> list[Any]:
        """Level 0 and all reduced pages of its kind that one factor along both axes makes smaller."""
        series = self._tiff.series[0]
        if any(axis not in "YXS" for axis in series.axes) and len(series.pages) > 1:
            raise SlideError(f"{self.path}: a stack with axes {series.axes}, not one flat image")
        base = self._tiff.pages[0]
        if len(series.levels) > 1:
            candidates = [level.pages[0] for level in series.levels[1:]]
        else:
            candidates = [page for page in self._tiff.pages[1:] if int(page.tags.valueof(254, 0)) & 1]
        pages = [base]
        for page in candidates:
            kind = (page.samplesperpixel, page.bitspersample, int(page.photometric), page.is_tiled)
            same = kind == (base.samplesperpixel, base.bitspersample, int(base.photometric), base.is_tiled)
            width, height = int(page.imagewidth), int(page.imagelength)
            factor = base.imagewidth / width
            if same and width < pages[-1].imagewidth and abs(base.imagelength / factor - height) < 2:
                pages.append(page)
        return pages


class _Colour:
    """Turns the stored samples of a TIFF page into RGB; `white` is the sample of tiles that the file leaves out."""

    def __init__(self, path: Path, page: Any) -> None:
        self._bits = int(page.bitspersample)
        self._photometric = int(page.photometric)
        self._palette: npt.NDArray[np.uint8] | None = None
        colours = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}.get(self._photometric)
        if colours is None or int(page.samplesperpixel) < colours:
            layout = getattr(page.photometric, "name", page.photometric)
            raise UnsupportedTiffError(f"{path}: TIFF colours {layout} x {page.samplesperpixel} are not supported")
        if self._photometric == 6 and int(page.compression) not in (6, 7):
            raise UnsupportedTiffError(f"{path}: TIFF in YCbCr is only supported with JPEG compression")
        if self._photometric == 3:
            if page.colormap is None:
                raise SlideError(f"{path}: palette image without a colour map")
            self._palette = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        self._colours = colours
        self.white = 2**self._bits - 1 if self._photometric in (1, 2, 6) else 0
        extra = [int(kind) for kind in page.extrasamples]
        self._alpha = colours if extra and extra[0] in (1, 2) else None
        self._premultiplied = bool(extra) and extra[0] == 1

    def to_rgb(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """(h, w, samples) as stored to (h, w, 3) uint8."""
        if self._palette is not None:
            return np.asarray(self._palette[samples[..., 0]])
        values = to_8_bit(samples, self._bits)
        if self._photometric == 0:
            values = 255 - values
        if self._colours == 1:
            rgb = gray_to_rgb(values[..., 0])
        elif self._colours == 4:
            rgb = np.asarray(Image.fromarray(np.ascontiguousarray(values[..., :4]), "CMYK").convert("RGB"))
        else:
            rgb = np.ascontiguousarray(values[..., :3])
        if self._alpha is not None:
            return over_white(rgb, values[..., self._alpha], self._premultiplied)
        return rgb


def _tiff_mpp(page: Any) -> float | None:
    """Micrometres per pixel from the resolution tags, None where they are absent or a printer's."""
    unit_um = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof(296, 2)))
    values = [page.tags.valueof(tag) for tag in (282, 283)]
    if unit_um is None or any(value is None or value[0] <= 0 for value in values):
        return None
    return sane_mpp(*(unit_um * value[1] / value[0] for value in values))


def shown_otherwise(path: Path) -> bool:
    """Whether OpenSlide opens this tiled TIFF but shows it differently: not 8 bit, rotated, or planes as pages."""
    with open_tiff(path) as tiff:
        page = tiff.pages[0]
        axes = tiff.series[0].axes
        return bool(page.bitspersample != 8 or page.tags.valueof(274, 1) != 1 or axes not in ("YX", "YXS", "SYX"))
