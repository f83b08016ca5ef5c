"""Finds the annotation mask of a slide and reads it by region at level 0: pictures of class ids, or polygons."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.masks import KINDS, VIABLE, WHOLE
from data_prep.slides.base import Opened, Slide, SlideError
from data_prep.slides.memory import check_decoded_size
from data_prep.slides.open import MASK_SUFFIXES, PAIP_ENDINGS

POLYGON_SUFFIXES = (".xml", ".geojson", ".json")
FOUND_SUFFIXES = (*MASK_SUFFIXES, ".xml", ".geojson")  # .json beside a slide may be anything
_LARGE_PX = 4096 * 4096  # masks of more pixels should have tiles
_SCAN_PX = 2048
_STRIP_ROWS = 512
_NO_LIMIT_GIB = 1e6


class Mask(Opened):
    """A picture of class ids, 0 = background.

    Stored values are class ids; a palette's indices too. 1-bit pictures hold classes 0 and 1. So do masks with no
    values but 0 and 255, as drawing programs write them. Colour pictures count only where red, green and blue are
    equal.

    Attributes:
        notes: what its user should know, one line each; nothing is wrong with the mask.
    """

    notes: tuple[str, ...] = ()
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

    def bands(self, rows_px: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the mask from top to bottom, `rows_px` rows at a time, (rows, width) uint8. Raises as `read`."""
        width, height = self.size_wh
        for y in range(0, height, rows_px):
            rows = min(rows_px, height - y)
            yield np.hstack([self.read(x, y, min(_SCAN_PX, width - x), rows) for x in range(0, width, _SCAN_PX)])

    def _ids(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Stored values of a region as (h, w) uint8."""
        return self._to_ids(self._values(x_px, y_px, w_px, h_px))

    def _to_ids(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Samples as stored to (h, w) uint8."""
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
        """Look through the mask until another value turns up, which is soon where ids are small."""
        found = False
        for ids in self._pieces():
            if ((ids != 0) & (ids != 255)).any():
                return False
            found = found or bool(ids.any())
        return found

    def _pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The whole mask as stored, in pieces of any shape."""
        width, height = self.size_wh
        for y in range(0, height, _SCAN_PX):
            for x in range(0, width, _SCAN_PX):
                yield self._ids(x, y, min(_SCAN_PX, width - x), min(_SCAN_PX, height - y))

    @abstractmethod
    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        """Samples as stored, (h, w) or (h, w, samples)."""


class _RasterMask(Mask):
    def __init__(self, path: Path, max_raster_gib: float | None) -> None:
        from data_prep.slides.raster import RasterImage  # as all readers: loaded by the masks that need them

        self.path = path
        self._image = RasterImage(path, max_raster_gib)
        self.size_wh = self._image.size_wh
        self.notes = _whole_note(path, self.size_wh)

    def close(self) -> None:
        self._image.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        values = self._image.read(x_px, y_px, w_px, h_px, raw=True)
        return values[..., :1] if self._image.mode in ("LA", "La", "PA") else values


class _TiffMask(Mask):
    def __init__(self, path: Path, max_raster_gib: float | None) -> None:
        from data_prep.slides.tiff import TiffPlane, open_tiff

        self.path = path
        self._tiff = open_tiff(path)
        try:
            self._plane = TiffPlane(path, self._tiff.pages[0], 0, max_raster_gib)
        except SlideError:
            self._tiff.close()
            raise
        self.size_wh = self._plane.size_wh
        if self._plane.tile_wh == (1, 1):
            self.notes = _whole_note(path, self.size_wh)

    def close(self) -> None:
        self._plane.close()
        self._tiff.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        return self._as_shown(self._plane.read(x_px, y_px, w_px, h_px))

    def _as_shown(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._plane.bits == 1 and self._plane.photometric == 0:  # 1 bit, white is zero: shown inverted
            values = 1 - values
        return values if self._plane.samples >= 3 else values[..., 0]


class _StripMask(_TiffMask):
    """A TIFF mask for `bands` only. It decodes strips in turn, twice if the mask may hold only 0 and 255."""

    def __init__(self, path: Path, max_raster_gib: float | None) -> None:
        super().__init__(path, _NO_LIMIT_GIB)
        self.notes = ()
        rows = self._plane.rows_at_once
        self._in_strips = rows > 0
        width, height = self.size_wh
        what = f"strips of {width} x {rows} pixels" if rows else f"{width} x {height} pixels that are turned"
        try:
            check_decoded_size(path, width * (rows or height) * self._plane.samples, what, max_raster_gib)
        except SlideError:
            self.close()
            raise

    def bands(self, rows_px: int) -> Iterator[npt.NDArray[np.uint8]]:
        if not self._in_strips:
            yield from super().bands(rows_px)
            return
        if self._two_valued is None:
            self._two_valued = self._only_0_and_255()
        held = np.zeros((0, self.size_wh[0]), np.uint8)
        for ids in self._pieces():
            held = np.concatenate([held, (ids != 0).astype(np.uint8) if self._two_valued else ids])
            whole = len(held) - len(held) % rows_px
            for y in range(0, whole, rows_px):
                yield held[y : y + rows_px]
            held = held[whole:]
        if len(held):
            yield held

    def _pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        if not self._in_strips:
            yield from super()._pieces()
            return
        for values in self._plane.read_strips(_STRIP_ROWS):
            yield self._to_ids(self._as_shown(values))


class _DrawnMask(Mask):
    """Polygons, drawn where they are asked for."""

    def __init__(
        self, path: Path, size_wh: tuple[int, int], classes: Mapping[str, int | None] | None, kind: str | None
    ) -> None:
        from data_prep.masks.annotations import read_polygons

        self.path, self.size_wh = path, size_wh
        self._two_valued = False
        self._polygons = read_polygons(path, classes, kind)
        self.notes = tuple(f"{path.name}: {note}" for note in self._polygons.notes)

    def close(self) -> None:
        pass

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        return self._polygons.draw(x_px, y_px, w_px, h_px)


class _WholeAndViable(Mask):
    """PAIP's two masks of one slide as one: 1 whole tumour, 2 viable tumour within it."""

    def __init__(self, whole: Mask, viable: Mask) -> None:
        self.path, self.size_wh = viable.path, viable.size_wh
        self._two_valued = False
        self._whole, self._viable = whole, viable
        self.notes = (*whole.notes, *viable.notes)
        if whole.size_wh != viable.size_wh:
            (w, h), (viable_w, viable_h) = whole.size_wh, viable.size_wh
            raise SlideError(f"{viable.path}: mask is {viable_w} x {viable_h} pixels, {whole.path.name} is {w} x {h}")

    def close(self) -> None:
        self._whole.close()
        self._viable.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        ids = np.where(self._whole.read(x_px, y_px, w_px, h_px) != 0, WHOLE, 0).astype(np.uint8)
        ids[self._viable.read(x_px, y_px, w_px, h_px) != 0] = VIABLE
        return ids


class InView(Mask):
    """A mask inside a field of view: pixels whose view is 0 have the class `outside`, which is above all others.

    `close` closes mask and view, which have the same size.
    """

    def __init__(self, mask: Mask, view: Mask, outside: int) -> None:
        self.path, self.size_wh = mask.path, mask.size_wh
        self._two_valued = False
        self._mask, self._view, self._outside = mask, view, outside
        self.notes = (*mask.notes, *view.notes)

    def close(self) -> None:
        """Close both."""
        self._mask.close()
        self._view.close()

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[Any]:
        ids = self._mask.read(x_px, y_px, w_px, h_px)
        check_classes(self.path, ids, self._outside - 1)
        return np.where(self._view.read(x_px, y_px, w_px, h_px) != 0, ids, np.uint8(self._outside))


def check_classes(path: Path, ids: npt.NDArray[np.uint8], classes: int) -> None:
    """Raise SlideError if the mask at `path` has a class above `classes` among `ids`."""
    top = int(ids.max())
    if top > classes:
        raise SlideError(f"{path}: has class {top}, but only classes 1 to {classes} are expected; see --classes")


def _whole_note(path: Path, size_wh: tuple[int, int]) -> tuple[str, ...]:
    """A note about a large mask that is decoded whole."""
    if size_wh[0] * size_wh[1] <= _LARGE_PX:
        return ()
    size = f"{size_wh[0]} x {size_wh[1]} pixels"
    return (f"{path.name}: {size} without tiles: every process decodes it whole; `convert` makes it tiled, once",)


def open_mask(
    path: Path | str | Sequence[Path | str],
    size_wh: tuple[int, int] | None = None,
    classes: Mapping[str, int | None] | None = None,
    *,
    kind: str | None = None,
    max_raster_gib: float | None = None,
    in_bands: bool = False,
) -> Mask:
    """Open a mask of class ids. Tiled TIFF and polygons are read by region, other masks are decoded whole.

    Args:
        path: a .png, .tif or .tiff file; .xml (ImageScope, ASAP), .geojson or .json; or PAIP's masks of whole and
            viable tumour, in this order, as `find_masks` returns them.
        size_wh: level-0 size of the slide in pixels; polygons need it.
        classes: class ids of polygons by name, see `annotations.read_polygons`.
        kind: of polygons, see `annotations.read_polygons`; pictures stay as they are.
        max_raster_gib: limit on what is decoded whole; default APF_MAX_RASTER_GIB or the available memory.
        in_bands: only `Mask.bands` will be called, so an untiled TIFF need not be decoded whole.

    Raises:
        SlideError: missing, another format, damaged, too large, or polygons without `size_wh`.
    """
    if not isinstance(path, (str, Path)):
        if len(path) != 2:
            return open_mask(path[0], size_wh, classes, kind=kind, max_raster_gib=max_raster_gib, in_bands=in_bands)
        with ExitStack() as opened:
            parts = [opened.enter_context(open_mask(part, max_raster_gib=max_raster_gib)) for part in path]
            both = _WholeAndViable(*parts)
            opened.pop_all()
            return both
    path = Path(path)
    if not path.is_file():
        raise SlideError(f"{path}: no such mask file")
    suffix = path.suffix.lower()
    if suffix in POLYGON_SUFFIXES:
        if size_wh is None:
            raise SlideError(f"{path}: polygons do not say how large their slide is; its size is needed")
        return _DrawnMask(path, size_wh, classes, kind)
    if suffix not in MASK_SUFFIXES:
        known = ", ".join((*MASK_SUFFIXES, *POLYGON_SUFFIXES))
        raise SlideError(f"{path}: masks must be lossless or polygons, one of {known}")
    if suffix == ".png":
        return _RasterMask(path, max_raster_gib)
    return _StripMask(path, max_raster_gib) if in_bands and not is_tiled(path) else _TiffMask(path, max_raster_gib)


def is_tiled(path: Path) -> bool:
    """Whether a picture of class ids can be read by region: a TIFF in tiles."""
    from data_prep.slides.tiff import open_tiff

    if path.suffix.lower() == ".png":
        return False
    with open_tiff(path) as tiff:
        return bool(tiff.pages[0].is_tiled)


def find_masks(slide_path: Path | str, masks_dir: Path | str, kind: str | None = None) -> list[Path]:
    """Return the mask files of a slide in `masks_dir`, for `open_mask`: none, one, or PAIP's whole and viable masks.

    A mask has the slide's stem and one of the suffixes .png, .tif, .tiff, .xml, .geojson, all in any case. With `kind`
    PAIP's names come first: "viable" is `<stem>_viable.tif`, "whole" is `<stem>_whole.tif`, "both" is the pair. If they
    are absent, a mask named like the slide is taken. Without `kind` there must be one mask.

    Raises:
        SlideError: `masks_dir` is no folder, or holds several masks of the slide and `kind` does not settle which.
        ValueError: another `kind`.
    """
    # List the files that may be the slide's masks.
    slide_path, masks_dir = Path(slide_path), Path(masks_dir)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind of mask {kind!r}; choose from {', '.join(KINDS)}")
    if not masks_dir.is_dir():
        raise SlideError(f"{masks_dir}: no such folder of masks")
    stem = slide_path.stem.casefold()
    stems = {stem, *(stem + end for end in PAIP_ENDINGS.values())}
    alike = (p for p in masks_dir.iterdir() if p.suffix.lower() in FOUND_SUFFIXES and p.stem.casefold() in stems)
    files = sorted(p for p in alike if p.is_file())  # only these: each of many slides asks for its own
    # Slides and masks may lie in one folder, and a slide is not its own mask.
    plain = [path for path in files if path.stem.casefold() == stem and path.resolve() != slide_path.resolve()]
    named = {key: [p for p in files if p.stem.casefold() == stem + end] for key, end in PAIP_ENDINGS.items()}

    # Choose among them.
    if kind is None:
        return _only(slide_path, masks_dir, sorted([*plain, *named["viable"], *named["whole"]]), named)
    if kind == "both":
        pairs = named["whole"], named["viable"]
        if all(pairs):
            return [path for pair in pairs for path in _only(slide_path, masks_dir, pair)]
        if any(pairs) and not plain:
            have, lack = ("whole", "viable") if pairs[0] else ("viable", "whole")
            raise SlideError(f"{masks_dir}: {slide_path.name} has {named[have][0].name} but no mask of {lack} tumour")
        return _only(slide_path, masks_dir, plain)
    return _only(slide_path, masks_dir, named[kind] or plain)


def _only(
    slide_path: Path, masks_dir: Path, found: list[Path], named: Mapping[str, list[Path]] | None = None
) -> list[Path]:
    if len(found) > 1:
        remedy = "; choose with --mask-kind viable, whole or both" if named and any(named.values()) else ""
        listed = ", ".join(path.name for path in found)
        raise SlideError(f"{masks_dir}: several masks for {slide_path.name}: {listed}{remedy}")
    return found


def check_mask_size(slide: Slide, mask: Mask, what: str = "mask") -> None:
    """Raise SlideError, with both sizes, unless the mask (or field of view: `what`) has the slide's level-0 size."""
    if mask.size_wh != slide.size_wh:
        (mask_w, mask_h), (slide_w, slide_h) = mask.size_wh, slide.size_wh
        raise SlideError(
            f"{mask.path}: {what} is {mask_w} x {mask_h} pixels, its slide {slide.path.name} is {slide_w} x {slide_h}"
        )
