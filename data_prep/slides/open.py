"""Opens slides of every format and lists the slides of a folder.

OpenSlide says what a slide is. Tiled TIFF and SVS are then decoded faster by tifffile and imagecodecs, if they agree
with OpenSlide. tifffile reads TIFF files that OpenSlide cannot; Pillow reads PNG, JPEG and the like.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from data_prep.slides.base import Slide, SlideError

MASK_SUFFIXES = (".png", ".tif", ".tiff")
PAIP_ENDINGS = {"viable": "_viable", "whole": "_whole"}
READERS = ("auto", "fast", "openslide", "tifffile", "raster")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".jp2", ".webp")
_TIFF_SUFFIXES = (".tif", ".tiff")
# A DICOM slide is many .dcm files, so a folder of them cannot be listed one slide per file; name one file of each.
_VENDORS = (".svs", ".ndpi", ".scn", ".bif", ".mrxs", ".vms", ".vmu", ".svslide", ".czi")
SLIDE_SUFFIXES = (*_VENDORS, *_TIFF_SUFFIXES, *_PICTURES)
_MAGIC = {
    "picture": (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"\x00\x00\x00\x0cjP"),
    "tiff": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "a zip archive": (b"PK",),
    "a gzip archive": (b"\x1f\x8b",),
    "a PDF document": (b"%PDF",),
}


def open_slide(
    path: Path | str, reader: str = "auto", *, strict: bool = False, max_raster_gib: float | None = None
) -> Slide:
    """Open a slide of any supported format, as a context manager.

    Args:
        path: the file.
        reader: "auto" ("fast" where it agrees with OpenSlide, see `data_prep.slides.fast_tiff`), or force "fast",
            "openslide", "tifffile" or "raster" (Pillow, decoded whole).
        strict: raise at a tile that cannot be decoded, and at directories that do not fit; by default such a tile is
            white and noted in `damaged`, and directories are noted in `faults`.
        max_raster_gib: limit on what is decoded whole; default APF_MAX_RASTER_GIB or the available memory.

    Raises:
        SlideError: missing, not an image, damaged, or too large; one line that names the file.
        ValueError: unknown `reader`.
    """
    slide = _open(Path(path), reader, max_raster_gib)
    slide.strict = strict
    if strict and slide.faults:
        slide.close()
        raise SlideError(f"{path}: {slide.faults[0]}")
    return slide


def _open(path: Path, reader: str, max_raster_gib: float | None) -> Slide:
    """Choose the reader. It is imported when a file needs it, so a build of pictures loads no OpenSlide."""
    if reader not in READERS:
        raise ValueError(f"unknown reader {reader!r}; choose from {', '.join(READERS)}")
    kind = _kind(path)
    picture = kind == "picture" and path.suffix.lower() != ".mrxs"  # .mrxs begins with a JPEG
    if reader == "raster" or (reader == "auto" and picture):
        from data_prep.slides.raster import RasterSlide

        return RasterSlide(path, max_raster_gib)
    if reader == "fast":
        from data_prep.slides.fast_tiff import open_fast

        return open_fast(path)
    if reader == "tifffile":
        from data_prep.slides.tiff import TiffSlide

        return TiffSlide(path, max_raster_gib)
    from data_prep.slides.vendors import OpenSlideSlide, vendor_of

    if reader == "openslide":
        return OpenSlideSlide(path)
    vendor = vendor_of(path)
    if kind == "tiff":
        return _open_tiff(path, vendor, max_raster_gib)
    if vendor is not None:
        return OpenSlideSlide(path)
    raise SlideError(f"{path}: not a slide that can be read: it is {kind}")


def _open_tiff(path: Path, vendor: str | None, max_raster_gib: float | None) -> Slide:
    """A TIFF: the fast reader or OpenSlide if a vendor knows it, else tifffile, else Pillow."""
    from data_prep.slides.tiff import TiffSlide, UnsupportedTiffError, shown_otherwise

    if vendor is not None and not (vendor == "generic-tiff" and shown_otherwise(path)):
        return _open_tiff_of(path, vendor)
    # Never hand a broken .svs to tifffile: it would take a thumbnail that survived for the slide.
    if vendor is None and path.suffix.lower() not in _TIFF_SUFFIXES:
        raise SlideError(f"{path}: not a slide that can be read: it is a damaged or truncated TIFF")
    try:
        return TiffSlide(path, max_raster_gib)
    except UnsupportedTiffError as unsupported:
        from data_prep.slides.raster import RasterSlide

        try:
            return RasterSlide(path, max_raster_gib)
        except SlideError:
            raise unsupported from None


def _open_tiff_of(path: Path, vendor: str) -> Slide:
    """A TIFF that OpenSlide reads, with the faults of its directories."""
    from data_prep.slides.fast_tiff import open_fast
    from data_prep.slides.tiff_check import structure_faults
    from data_prep.slides.vendors import OpenSlideSlide

    try:
        slide: Slide = open_fast(path)
    except SlideError:  # not for it; whether the slide is sound is for OpenSlide to say
        slide = OpenSlideSlide(path)
    try:
        slide.faults = tuple(structure_faults(path, vendor, slide.level_sizes_wh))
    except SlideError:
        slide.close()
        raise
    return slide


def _kind(path: Path) -> str:
    """What the first bytes say: "picture", "tiff", or words for the error message."""
    if path.is_dir():
        raise SlideError(f"{path}: a folder, not a slide")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise SlideError(f"{path}: the file is empty")
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), "no image format known here")


def slides_in(folder: Path) -> list[Path]:
    """Slides directly inside a folder, sorted.

    Skips names that begin with a dot, unknown suffixes, and PAIP's masks (`_whole`, `_viable`) beside their slides.
    """
    visible = (p for p in folder.iterdir() if not p.name.startswith("."))
    files = [p for p in visible if p.suffix.lower() in SLIDE_SUFFIXES and p.is_file()]
    return sorted(set(files) - masks_beside(files))


def find_slides(paths: Sequence[Path | str]) -> list[Path]:
    """List slides, sorted and each once: files as given, folders replaced by their `slides_in`.

    Raises:
        SlideError: a path is missing, a folder holds no slide, or two slides would share an output name.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = slides_in(path)
            if not inside:
                raise SlideError(f"{path}: no slides in this folder (looked for {', '.join(SLIDE_SUFFIXES)})")
            found.update({p.resolve(): p for p in inside})
        elif path.exists():
            found.setdefault(path.resolve(), path)
        else:
            raise SlideError(f"{path}: no such file or folder")
    by_stem: dict[str, Path] = {}
    for path in sorted(found.values()):
        other = by_stem.setdefault(path.stem, path)
        if other != path:
            raise SlideError(f"{path}: same name as {other}; slides need different names before the suffix")
    return sorted(found.values())


def masks_beside(files: Collection[Path]) -> set[Path]:
    """PAIP's masks among the files of a folder: `<stem>_whole` and `<stem>_viable` pictures beside `<stem>`."""
    stems = {path.stem.casefold() for path in files}
    ends = tuple(PAIP_ENDINGS.values())
    pictures = [path for path in files if path.suffix.lower() in MASK_SUFFIXES and path.stem.casefold().endswith(ends)]
    return {path for path in pictures if path.stem.casefold().rpartition("_")[0] in stems}
