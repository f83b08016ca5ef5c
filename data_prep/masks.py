"""Annotation masks: pictures of class ids beside the slide, read by region at level 0. Never imports torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.raster_io import RasterImage
from data_prep.slide_base import Opened, Slide, SlideError
from data_prep.tiff_io import TiffPlane, open_tiff

MASK_SUFFIXES = (".png", ".tif", ".tiff")
_SCAN_PX = 2048


class Mask(Opened):
    """A picture of class ids, 0 = background.

    Stored values are class ids, a palette's indices included; 1-bit pictures hold classes 0 and 1. A mask whose only
    values are 0 and 255, as drawing programs write them, holds classes 0 and 1 too. Colour pictures count only where
    red, green and blue are equal.

    Attributes:
        path: the file.
        size_wh: width and height in pixels.
    """

    _two_valued: bool | None = None

    def read(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Return a region as (h, w) uint8 class ids.

        Raises:
            SlideError: the region leaves the mask, the file is damaged, or its values are no class ids.
        """
        self._check_region(self.size_wh, x_px, y_px, w_px, h_px)
        if self._two_valued is None:
            self._two_valued = self._only_0_and_255()
        ids = self._ids(x_px, y_px, w_px, h_px)
        return (ids != 0).astype(np.uint8) if self._two_valued else ids

    def _ids(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Stored values of a region as (h, w) uint8."""
        values = self._values(x_px, y_px, w_px, h_px)
        if values.ndim == 3:
            if values.shape[2] >= 3 and not (values[..., :1] == values[..., 1:3]).all():
                raise SlideError(f"{self.path}: a colour picture, not a mask of class ids")
            values = values[..., 0]
        if values.dtype == np.bool_:
            return values.astype(np.uint8)
        if values.dtype != np.uint8 and int(values.max()) > 255:
            raise SlideError(f"{self.path}: class id {int(values.max())} is larger than 255")
        return np.ascontiguousarray(values, dtype=np.uint8)

    def _only_0_and_255(self) -> bool:
        """Look through the mask until a value other than 0 and 255 turns up, which is soon where ids are small."""
        width, height = self.size_wh
        found = False
        for y in range(0, height, _SCAN_PX):
            for x in range(0, width, _SCAN_PX):
                ids = self._ids(x, y, min(_SCAN_PX, width - x), min(_SCAN_PX, height - y))
                if ((ids != 0) & (ids != 255)).any():
                    return False
                found = found or bool(ids.any())
        return found

    @abstractmethod
    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        """Samples as stored, (h, w) or (h, w, samples)."""


class _RasterMask(Mask):
    def __init__(self, path: Path, max_raster_gib: float | None) -> None:
        self.path = path
        self._image = RasterImage(path, max_raster_gib)
        self.size_wh = self._image.size_wh

    def close(self) -> None:
        self._image.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        values = self._image.read(x_px, y_px, w_px, h_px, raw=True)
        return values[..., :1] if self._image.mode in ("LA", "La", "PA") else values


class _TiffMask(Mask):
    def __init__(self, path: Path, max_raster_gib: float | None) -> None:
        self.path = path
        self._tiff = open_tiff(path)
        try:
            self._plane = TiffPlane(path, self._tiff.pages[0], 0, max_raster_gib)
        except SlideError:
            self._tiff.close()
            raise
        self.size_wh = self._plane.size_wh

    def close(self) -> None:
        self._plane.close()
        self._tiff.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        values = self._plane.read(x_px, y_px, w_px, h_px)
        if self._plane.bits == 1 and self._plane.photometric == 0:  # 1 bit, white is zero: shown inverted
            values = 1 - values
        return values if self._plane.samples >= 3 else values[..., 0]


def open_mask(path: Path | str, *, max_raster_gib: float | None = None) -> Mask:
    """Open a mask of class ids; tiled TIFF is read by region, everything else is decoded whole.

    Args:
        path: a .png, .tif or .tiff file.
        max_raster_gib: limit on what is decoded whole; default APF_MAX_RASTER_GIB or the available memory.

    Raises:
        SlideError: missing, another format, damaged, or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise SlideError(f"{path}: no such mask file")
    suffix = path.suffix.lower()
    if suffix not in MASK_SUFFIXES:
        raise SlideError(f"{path}: masks must be lossless, one of {', '.join(MASK_SUFFIXES)}")
    return _RasterMask(path, max_raster_gib) if suffix == ".png" else _TiffMask(path, max_raster_gib)


def find_mask(slide_path: Path | str, masks_dir: Path | str) -> Path | None:
    """Return the mask in `masks_dir` with the slide's stem (.png, .tif or .tiff in any case), None if there is none.

    Raises:
        SlideError: `masks_dir` is no folder, or holds several masks of that stem.
    """
    slide_path, masks_dir = Path(slide_path), Path(masks_dir)
    if not masks_dir.is_dir():
        raise SlideError(f"{masks_dir}: no such folder of masks")
    found = sorted(
        path
        for path in masks_dir.iterdir()
        if path.stem == slide_path.stem and path.suffix.lower() in MASK_SUFFIXES and path.is_file()
    )
    if len(found) > 1:
        raise SlideError(f"{masks_dir}: several masks for {slide_path.name}: {', '.join(path.name for path in found)}")
    return found[0] if found else None


def check_mask_size(slide: Slide, mask: Mask) -> None:
    """Raise SlideError, with both sizes, unless the mask has the slide's level-0 size."""
    if mask.size_wh != slide.size_wh:
        (mask_w, mask_h), (slide_w, slide_h) = mask.size_wh, slide.size_wh
        raise SlideError(
            f"{mask.path}: mask is {mask_w} x {mask_h} pixels, its slide {slide.path.name} is {slide_w} x {slide_h}"
        )
