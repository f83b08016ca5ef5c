"""Pictures that Pillow decodes whole (PNG, JPEG, ...) and that are then read by region.

Only the decoded picture is kept, as Pillow stores it. Colours are converted per region.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.slides.base import ClosedError, Slide, SlideError, gray_to_rgb, oriented_size, over_white, read_oriented
from data_prep.slides.memory import check_decoded_size
from data_prep.system.files import one_line

_ORIENTATION_TAG = 274
_BYTES_PER_PX = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # all others: 4
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_NO_RANGE = ("I", "F")
_pillow_lock = threading.RLock()


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Lift Pillow's process-wide pixel limit; `check_decoded_size` holds pictures to the available memory instead."""
    with _pillow_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


class RasterImage:
    """One picture on disk, decoded at the first read; `mode` is Pillow's, `size_wh` is as shown."""

    def __init__(self, path: Path, max_raster_gib: float | None = None) -> None:
        """Read the header. Raises SlideError if it is no image, has no usable pixel type, or is too large to decode."""
        self.path = path
        self._image: Image.Image | None = None
        try:
            with _no_pixel_limit():
                self._image = Image.open(path)
            self._orientation = _orientation(path, self._image)
        except Exception as error:  # Pillow's plugins raise nearly anything on a broken header
            self.close()
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: not a readable image: {one_line(error)}") from error
        self.mode = self._image.mode
        self._stored_wh = self._image.size
        self.size_wh = oriented_size(self._stored_wh, self._orientation)
        self._decoded = False
        self._lock = threading.Lock()
        if self.mode in _NO_RANGE:
            self.close()
            raise SlideError(f"{path}: 32-bit pixels have no fixed range; convert the image to 8 or 16 bit")
        width, height = self._stored_wh
        need = width * height * _BYTES_PER_PX.get(self.mode, 4)
        try:
            check_decoded_size(path, need, f"{width} x {height} pixels", max_raster_gib)
        except SlideError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the pixels and the file."""
        if self._image is not None:
            self._image.close()
        self._image = None

    def read(self, x_px: int, y_px: int, w_px: int, h_px: int, raw: bool = False) -> npt.NDArray[Any]:
        """Return a region as shown: (h, w, 3) uint8 RGB, or with `raw` as stored. Raises SlideError for damage."""
        convert = np.asarray if raw else _to_rgb

        def stored(x: int, y: int, w: int, h: int) -> npt.NDArray[Any]:
            with _no_pixel_limit():
                return convert(self._pixels().crop((x, y, x + w, y + h)))

        return read_oriented(stored, self._stored_wh, self._orientation, x_px, y_px, w_px, h_px)

    def _pixels(self) -> Image.Image:
        with self._lock:
            if self._image is None:
                raise ClosedError(f"{self.path}: read after close")
            if not self._decoded:
                try:
                    self._image.load()
                except Exception as error:  # as above
                    raise SlideError(f"{self.path}: damaged or truncated image: {one_line(error)}") from error
                self._decoded = True
            return self._image


class RasterSlide(Slide):
    """PNG, JPEG and other pictures without levels, decoded whole at the first read."""

    reader = "raster"

    def __init__(self, path: Path, max_raster_gib: float | None = None) -> None:
        """Read the header. Raises SlideError if it is no picture, or too large to decode."""
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


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A piece of any mode as (h, w, 3) uint8, transparency over white."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if mode.startswith("I;16"):
        return gray_to_rgb((np.asarray(image) >> 8).astype(np.uint8))
    if mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return over_white(rgba[..., :3], rgba[..., 3], premultiplied=False)
    if mode in ("1", "L"):
        return gray_to_rgb(np.asarray(image.convert("L")))
    return np.asarray(image.convert("RGB"))


def _orientation(path: Path, image: Image.Image) -> int:
    """EXIF orientation, 1 where it is absent or out of range. Decodes nothing."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG":  # Pillow would decode the whole PNG to look for EXIF behind the pixels
        exif = Image.Exif()
        if data := _png_exif(path):
            exif.load(data)
    else:
        exif = image.getexif()
    value = exif.get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(path: Path) -> bytes | None:
    """The eXIf chunk of a PNG, found by its chunk headers. Raises SlideError if the file ends early."""
    size = path.stat().st_size
    found = None
    with path.open("rb") as file:
        at = 8
        while at + 12 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"IEND":
                return found
            if kind == b"eXIf" and at + 12 + length <= size:
                found = file.read(length)
            at += 12 + length
    raise SlideError(f"{path}: truncated PNG: the file ends after {size} bytes without an IEND chunk")
