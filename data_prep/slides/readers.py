"""The three slide readers: OpenSlide, tifffile, and pictures decoded whole. Never imports torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from data_prep.slides.base import ClosedError, Slide, SlideError, sane_mpp
from data_prep.slides.pixels import gray_to_rgb, over_white, to_8_bit
from data_prep.slides.raster import RasterImage
from data_prep.slides.tiff import TiffPlane, UnsupportedTiffError, open_tiff
from data_prep.system.files import one_line

_CHUNK_PX = 1024
_CHUNKS_KEPT = 24  # x 3 MiB
_OPENSLIDE_ERRORS = (openslide.OpenSlideError, OSError)


class OpenSlideSlide(Slide):
    """Everything OpenSlide reads.

    OpenSlide is asked for a region of a coarser level in level-0 pixels, and divides them by a floating-point factor.
    Where that is no integer (TCGA: 2.0005), the result lies up to half a level-0 pixel off and is interpolated,
    differently for every region. Such levels are therefore read in fixed chunks, so that a pixel has one value.
    """

    reader = "openslide"

    def __init__(self, path: Path) -> None:
        """Open the slide.

        Raises:
            SlideError: OpenSlide cannot open it.
        """
        self.path = path
        self._lock = threading.Lock()
        self._handle: openslide.OpenSlide | None = None
        self._closed = False
        handle = self._open()
        self.level_sizes_wh = [(int(w), int(h)) for w, h in handle.level_dimensions]
        self.size_wh = self.level_sizes_wh[0]
        self._downsamples = [float(d) for d in handle.level_downsamples]
        properties = handle.properties
        self.mpp = sane_mpp(
            properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)
        )
        self._tiles = []
        for level in range(len(self.level_sizes_wh)):
            keys = [f"openslide.level[{level}].tile-{side}" for side in ("width", "height")]
            width, height = (properties.get(key, "1") for key in keys)
            self._tiles.append((int(width), int(height)))
        self._chunks: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint8]] = OrderedDict()

    def close(self) -> None:
        """Close the handle and drop cached chunks."""
        with self._lock:
            self._closed = True
            self._drop()
            self._chunks.clear()

    def tile_wh(self, level: int) -> tuple[int, int]:
        """As `Slide.tile_wh`; the chunk size where the level is read in fixed chunks."""
        self._check_level(level)
        return self._tiles[level] if self._whole_factor(level) else (_CHUNK_PX, _CHUNK_PX)

    def _tile_grid(self, level: int) -> tuple[int, int]:
        width, height = self.tile_wh(level)
        return (width, height) if width > 1 else (_CHUNK_PX, _CHUNK_PX)

    def _whole_factor(self, level: int) -> int:
        factor = self._downsamples[level]
        return int(factor) if factor.is_integer() else 0

    def _open(self) -> openslide.OpenSlide:
        if self._closed:
            raise ClosedError(f"{self.path}: read after close")
        if self._handle is None:
            try:
                self._handle = openslide.OpenSlide(self.path)
            except _OPENSLIDE_ERRORS as error:
                raise SlideError(f"{self.path}: OpenSlide cannot open it: {one_line(error)}") from error
        return self._handle

    def _drop(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._handle = None

    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        factor = self._whole_factor(level)
        if factor:
            return self._region(level, (x_px * factor, y_px * factor), (x_px, y_px, w_px, h_px))
        out = np.empty((h_px, w_px, 3), np.uint8)
        for row in range(y_px // _CHUNK_PX, (y_px + h_px - 1) // _CHUNK_PX + 1):
            for column in range(x_px // _CHUNK_PX, (x_px + w_px - 1) // _CHUNK_PX + 1):
                chunk = self._chunk(level, column, row)
                left, top = column * _CHUNK_PX, row * _CHUNK_PX
                x0, x1 = max(x_px, left), min(x_px + w_px, left + _CHUNK_PX)
                y0, y1 = max(y_px, top), min(y_px + h_px, top + _CHUNK_PX)
                part = chunk[y0 - top : y1 - top, x0 - left : x1 - left]
                out[y0 - y_px : y1 - y_px, x0 - x_px : x1 - x_px] = part
        return out

    def _chunk(self, level: int, column: int, row: int) -> npt.NDArray[np.uint8]:
        key = (level, column, row)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        left, top = column * _CHUNK_PX, row * _CHUNK_PX
        width, height = self.level_sizes_wh[level]
        where = (left, top, min(_CHUNK_PX, width - left), min(_CHUNK_PX, height - top))
        factor = self._downsamples[level]
        chunk = self._region(level, (round(left * factor), round(top * factor)), where)
        with self._lock:
            self._chunks[key] = chunk
            while len(self._chunks) > _CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        return chunk

    def _region(
        self, level: int, corner0_xy: tuple[int, int], where: tuple[int, int, int, int]
    ) -> npt.NDArray[np.uint8]:
        """Read through OpenSlide; an error ends its handle, so the region is tried once more with a new one."""
        failure: BaseException | None = None
        for _ in range(2):
            with self._lock:
                handle = self._open()
            try:
                return _flatten(np.asarray(handle.read_region(corner0_xy, level, where[2:])))
            except _OPENSLIDE_ERRORS as error:
                failure = error
                with self._lock:
                    if self._handle is handle:
                        self._drop()
        x, y, w, h = where
        cause = one_line(failure) if failure else "unknown"
        raise SlideError(
            f"{self.path}: cannot read level {level}, region x={x} y={y} w={w} h={h}: {cause}"
        ) from failure


def _flatten(rgba: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(h, w, 4) straight-alpha RGBA to RGB over white; one cheap test where everything is opaque, which is usual."""
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB).astype(np.uint8, copy=False)
    if int(rgba.view("<u4").min()) >= 0xFF000000:
        return rgb
    return over_white(rgb, rgba[..., 3], premultiplied=False)


class TiffSlide(Slide):
    """TIFF files that OpenSlide does not open: strips, 16 bit, separate planes, unusual compressions."""

    reader = "tifffile"

    def __init__(self, path: Path, max_raster_gib: float | None = None) -> None:
        """Open the file and its pyramid, if it has one.

        Raises:
            SlideError: not readable, a colour layout without meaning as RGB, or too large to decode.
        """
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
        """Level 0 and those reduced pages of the same kind that are smaller by one factor along both axes."""
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
    """Turns the stored samples of a TIFF page into RGB.

    Attributes:
        white: stored sample that shows as white (a palette's first colour), for tiles that the file leaves out.
    """

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
            rgb: npt.NDArray[np.uint8] = self._palette[samples[..., 0]]
            return rgb
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


class RasterSlide(Slide):
    """PNG, JPEG and other pictures without levels, decoded whole at the first read."""

    reader = "raster"

    def __init__(self, path: Path, max_raster_gib: float | None = None) -> None:
        """Open the picture, header only.

        Raises:
            SlideError: no picture, or too large to decode.
        """
        self.path = path
        self._image = RasterImage(path, max_raster_gib)
        self.size_wh = self._image.size_wh
        self.level_sizes_wh = [self.size_wh]
        self.mpp = None

    def close(self) -> None:
        """Drop the decoded pixels."""
        self._image.close()

    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        return self._image.read(x_px, y_px, w_px, h_px)
