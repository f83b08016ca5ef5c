"""Converts masks of every kind to tiled, deflated BigTIFF with a pyramid, in bounded memory.

A mask in strips, as PAIP's are, is decoded whole for every read, and OpenSlide cannot open it. Polygons are drawn anew
for every read. Converted once, both are read by tile.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.masks.masks import FOUND_SUFFIXES, POLYGON_SUFFIXES, Mask, check_mask_size, open_mask
from data_prep.slides.base import SlideError
from data_prep.slides.open import PAIP_ENDINGS, open_slide, slides_in
from data_prep.slides.pyramid import LevelOfTiles, TileSpool, row_of_tiles, write_pyramid
from data_prep.slides.tiff import TiffPlane, open_tiff
from data_prep.system.files import sha256_of

Beat = Callable[[float], None] | None
TILE_PX = 512
_FORMAT = 1  # goes up when the same mask gives other bytes


class Conversion(NamedTuple):
    """One mask to convert: its file, the file to write, and its slide (None if there is none; polygons need it)."""

    source: Path
    target: Path
    slide: Path | None


def plan(sources: Sequence[Path], out: Path, slides: Path | None) -> list[Conversion]:
    """List what is to convert: files as given, folders replaced by the masks directly inside them.

    Args:
        out: folder of the converted masks, `<stem>.tif` each.
        slides: folder of the slides; a mask's slide has its stem (without PAIP's `_viable` or `_whole`), in any case.

    Raises:
        SlideError: something is missing, nothing is there to convert, or two masks would become one file.
    """
    # List the masks and the slides.
    found: list[Path] = []
    for path in sources:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in FOUND_SUFFIXES and p.is_file())
            inside = [p for p in inside if not p.name.startswith(".")]
            if not inside:
                raise SlideError(f"{path}: no masks in this folder (looked for {', '.join(FOUND_SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SlideError(f"{path}: no such file or folder")
    if slides is not None and not slides.is_dir():
        raise SlideError(f"{slides}: no such folder of slides")
    by_stem = {path.stem.casefold(): path for path in slides_in(slides)} if slides is not None else {}

    # Give every mask its file and its slide.
    targets: dict[str, Path] = {}
    jobs = []
    for source in dict.fromkeys(found):
        target = out / f"{source.stem}.tif"
        other = targets.setdefault(target.name.casefold(), source)
        if other != source:
            raise SlideError(f"{source}: would become {target}, and so would {other}")
        if target.exists() and target.samefile(source):
            raise SlideError(f"{source}: would be replaced by its own conversion; choose another folder")
        stem = source.stem.casefold()
        short = next((stem.removesuffix(end) for end in PAIP_ENDINGS.values() if stem.endswith(end)), stem)
        jobs.append(Conversion(source, target, by_stem.get(stem, by_stem.get(short))))
    return jobs


def convert_mask(
    job: Conversion,
    classes: Mapping[str, int | None] | None = None,
    kind: str | None = None,
    beat: Beat = None,
    note: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> bool:
    """Convert one mask, unless a whole file is there that was made from the same bytes in the same way.

    Args:
        classes: class ids of polygons, see `annotations.read_polygons`.
        kind: "viable" or "whole": that class of polygons only, as 1.
        beat: called with the finished part, 0 to 1, after every row of tiles.
        note: called with each of `Mask.notes`.

    Returns:
        True if it was converted, False if it was there.

    Raises:
        SlideError: the mask or its slide cannot be read, or they differ in size.
        OSError: the file cannot be written; nothing is left of it.
    """
    drawn = job.source.suffix.lower() in POLYGON_SUFFIXES
    if drawn and job.slide is None:
        raise SlideError(
            f"{job.source}: polygons do not say how large their slide is, and no slide of that name was found;"
            " give its folder with --slides"
        )
    # Is it done already?
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(job.slide)) if job.slide is not None else None
        made = {
            "made_by": f"data_prep convert {_FORMAT}",
            "source": job.source.name,
            "sha256": sha256_of(job.source),
            "slide_wh": list(slide.size_wh) if slide else None,
            "mpp": slide.mpp if slide else None,
            "classes": dict(classes) if drawn and classes is not None else None,
            "kind": kind if drawn else None,
        }
        if is_complete(job.target, made):
            return False

        # Convert it.
        size_wh = slide.size_wh if slide else None
        mask = opened.enter_context(open_mask(job.source, size_wh, classes, kind=kind, in_bands=True))
        if slide is not None:
            check_mask_size(slide, mask)
        for text in mask.notes:
            note(text)
        write_mask(job.target, mask, made, slide.mpp if slide else None, beat)
    return True


def is_complete(path: Path, made: Mapping[str, Any]) -> bool:
    """Whether `path` is a whole TIFF that says it was made from `made`."""
    if not path.is_file():
        return False
    try:
        with open_tiff(path) as tiff:
            for page in tiff.pages:
                TiffPlane(path, page, 0)
            return bool(json.loads(tiff.pages[0].description) == made)
    except ValueError:
        return False


def level_sizes(size_wh: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of the levels, each half of the previous one, down to one tile."""
    sizes = [size_wh]
    while max(sizes[-1]) > TILE_PX:
        width, height = sizes[-1]
        sizes.append((max(1, width // 2), max(1, height // 2)))
    return sizes


def write_mask(path: Path, mask: Mask, made: Mapping[str, Any], mpp: float | None, beat: Beat) -> None:
    """Write a mask as a tiled pyramid. A pixel of a coarser level is the level-0 pixel under its centre.

    Level 0 passes through once, a row of tiles at a time, and the coarser levels gather their rows meanwhile. `made`
    says how it was made and becomes the image description; `mpp` is in um per level-0 pixel; `beat` is as in
    `convert_mask`.

    Raises:
        SlideError: the mask cannot be read.
        OSError: the file cannot be written; nothing is left of it.
    """

    def levels() -> Iterator[LevelOfTiles]:
        coarser = [_CoarseMask(size, mask.size_wh, path.parent) for size in level_sizes(mask.size_wh)[1:]]
        yield LevelOfTiles(mask.size_wh, mpp, _base(mask, coarser, beat))
        for level in coarser:
            scale = mask.size_wh[0] / level.size_wh[0]
            yield LevelOfTiles(level.size_wh, mpp * scale if mpp else None, level.tiles)

    about = json.dumps(made, sort_keys=True)
    write_pyramid(path, levels(), TILE_PX, compression="adobe_deflate", photometric="minisblack", description=about)


def _base(mask: Mask, coarser: list[_CoarseMask], beat: Beat) -> Iterator[bytes]:
    """Compressed tiles of level 0; the coarser levels take what they need of each band."""
    y = 0
    for ids in mask.bands(TILE_PX):
        for level in coarser:
            level.add(ids, y)
        yield from _compressed(ids)
        y += len(ids)
        if beat:
            beat(y / mask.size_wh[1])


def _compressed(band: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    return (zlib.compress(tile.tobytes(), 6) for tile in row_of_tiles(band, TILE_PX))


class _CoarseMask:
    """A coarser level, gathered from bands of level 0 and kept as compressed tiles until it is written."""

    def __init__(self, size_wh: tuple[int, int], size0_wh: tuple[int, int], folder: Path) -> None:
        self.size_wh = size_wh
        self._columns, self._rows = (_under_centres(n, n0) for n, n0 in zip(size_wh, size0_wh, strict=True))
        self._band = np.zeros((TILE_PX, size_wh[0]), np.uint8)
        self._filled = 0
        self.tiles = TileSpool(folder)

    def add(self, ids: npt.NDArray[np.uint8], y: int) -> None:
        """Take what this level needs of the rows of level 0 from `y` on."""
        first, last = np.searchsorted(self._rows, [y, y + len(ids)])
        for start in range(int(first), int(last)):
            self._band[self._filled] = ids[self._rows[start] - y, self._columns]
            self._filled += 1
            if self._filled == TILE_PX or start == self.size_wh[1] - 1:
                for tile in _compressed(self._band[: self._filled]):
                    self.tiles.add(tile)
                self._filled = 0


def _under_centres(size: int, size0: int) -> npt.NDArray[np.int64]:
    """Level-0 pixel under the centre of each of `size` pixels: floor((i + 1/2) * size0 / size)."""
    return np.asarray((2 * np.arange(size, dtype=np.int64) + 1) * size0 // (2 * size))
