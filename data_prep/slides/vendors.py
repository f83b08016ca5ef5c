"""Reads what OpenSlide reads: the slides of the scanners' vendors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from data_prep.slides.base import Box, ClosedError, Slide, SlideError, cells_under, over_white, paste, sane_mpp
from data_prep.system.files import one_line

_CHUNK_PX = 1024
_CHUNKS_KEPT = 24  # x 3 MiB
_OPENSLIDE_ERRORS = (openslide.OpenSlideError, OSError)


def vendor_of(path: Path) -> str | None:
    """OpenSlide's name for the format, None if it is none of its own."""
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: OpenSlide: {one_line(error)}") from error
    return vendor


class OpenSlideSlide(Slide):
    """A slide of any format that OpenSlide reads.

    OpenSlide takes the corner of a region in level-0 pixels and divides it by a floating-point factor. Where the factor
    is no integer (TCGA: 2.0005), it interpolates by up to half a level-0 pixel, differently for every region. Such
    levels are read in fixed chunks, so that a pixel has one value.
    """

    reader = "openslide"

    def __init__(self, path: Path) -> None:
        """Open the slide. Raises SlideError if OpenSlide cannot."""
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
        """The file's tile size, or the chunk size where the level is read in fixed chunks. See `Slide.tile_wh`."""
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
        for column, row in cells_under(x_px, y_px, w_px, h_px, (_CHUNK_PX, _CHUNK_PX)):
            paste(out, x_px, y_px, self._chunk(level, column, row), column * _CHUNK_PX, row * _CHUNK_PX)
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

    def _region(self, level: int, corner0_xy: tuple[int, int], where: Box) -> npt.NDArray[np.uint8]:
        """Read through OpenSlide. An error ends its handle, so the region is tried once more with a new one."""
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
    """(h, w, 4) straight-alpha RGBA to RGB over white; one cheap test covers the usual opaque case."""
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB).astype(np.uint8, copy=False)
    if int(rgba.view("<u4").min()) >= 0xFF000000:
        return rgb
    return over_white(rgb, rgba[..., 3], premultiplied=False)
