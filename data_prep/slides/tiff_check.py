"""Checks that the directories of a tiled TIFF fit each other and the levels that OpenSlide shows.

OpenSlide stops at the first directory that it cannot read and says nothing: a slide loses its coarser levels. So
tifffile reads the directories a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.slides.base import SlideError
from data_prep.slides.tiff import open_tiff

_TILE_TAGS = (322, 323, 324, 325)  # width, length, offsets, byte counts
_NEEDED_TAGS = {
    256: "width",
    257: "height",
    258: "bits per sample",
    259: "compression",
    262: "colours",
    322: "tile width",
    323: "tile height",
    324: "tile offsets",
    325: "tile byte counts",
}
_REDUCED = 1
# "46000x32914 [42673,5576 2220x2967] (240x240) -> 555x741 JPEG/RGB": whole scan, part of it, tiles, size of this level.
_APERIO = re.compile(r"(\d+)x(\d+) (?:\[-?\d+,-?\d+ (\d+)x(\d+)\] )?\((\d+)x(\d+)\)(?: -> (\d+)x(\d+))?")


class _TilesError(Exception):
    """A directory that lists too few or too many tiles."""


def structure_faults(path: Path, vendor: str, level_sizes_wh: list[tuple[int, int]]) -> list[str]:
    """Return what does not fit in the directories of a TIFF of vendor "aperio" or "generic-tiff", one line each.

    Each directory with tiles must be a level that OpenSlide shows. It needs as many tiles as its size asks for, all
    inside the file. Aperio's description must give its size.

    Raises:
        SlideError: the number of tiles does not fit the size; what the file shows is mostly made up.
    """
    if vendor not in ("aperio", "generic-tiff"):
        return []
    if path.suffix.lower() == ".svs" and vendor != "aperio":
        return ["its description is not Aperio's although its suffix is .svs: levels and resolution may be missing"]
    try:
        with open_tiff(path) as tiff:
            pages = [(number, page) for number, page in enumerate(tiff.pages) if _is_level(number, page, vendor)]
            return [fault for number, page in pages for fault in _faults(number, page, level_sizes_wh, vendor)]
    except _TilesError as error:
        raise SlideError(f"{path}: {error}") from error
    except SlideError as error:
        return [str(error).removeprefix(f"{path}: ")]
    except Exception as error:  # what tifffile runs into in a broken directory
        return [f"its TIFF directories cannot be read ({type(error).__name__})"]


def _is_level(number: int, page: Any, vendor: str) -> bool:
    """Whether a directory should be a level: it has tiles, and in generic TIFF the mark of a smaller copy."""
    tags = page.tags
    if not any(tag in tags for tag in _TILE_TAGS):
        return False
    return vendor == "aperio" or number == 0 or bool(int(tags.valueof(254, 0)) & _REDUCED)


def _faults(number: int, page: Any, level_sizes_wh: list[tuple[int, int]], vendor: str) -> Iterator[str]:
    missing = [name for tag, name in _NEEDED_TAGS.items() if tag not in page.tags]
    if missing:
        yield f"directory {number} of the file has no {missing[0]}"
        return
    size_wh = int(page.imagewidth), int(page.imagelength)
    tile_wh = int(page.tilewidth), int(page.tilelength)
    shown = f"{size_wh[0]} x {size_wh[1]}"
    if size_wh not in level_sizes_wh:
        yield f"the file holds a level of {shown} pixels that OpenSlide leaves out"
    if vendor == "aperio" and (said := _said(page)) is not None:
        for what, is_wh, said_wh in (("", size_wh, said[0]), ("tiles of ", tile_wh, said[1])):
            if is_wh != said_wh:
                sizes = " x ".join(map(str, is_wh)), " x ".join(map(str, said_wh))
                yield f"directory {number} of the file has {what}{sizes[0]} pixels, its description says {sizes[1]}"
    planes = int(page.samplesperpixel) if int(page.planarconfig) == 2 else 1
    needed = -(-size_wh[0] // max(1, tile_wh[0])) * -(-size_wh[1] // max(1, tile_wh[1])) * planes
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != needed or len(counts) != needed:
        raise _TilesError(f"{len(offsets)} tiles are listed for {shown} pixels, {needed} are needed")
    end = page.parent.filehandle.size
    beyond = sum(offset + count > end for offset, count in zip(offsets, counts, strict=False) if count)
    if beyond:
        yield f"{beyond} of {needed} tiles of {shown} pixels lie beyond the end of the file"


def _said(page: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Sizes of image and tiles in Aperio's description, None where it gives none."""
    found = _APERIO.search(str(page.tags.valueof(270, "")))
    if found is None:
        return None
    numbers = [None if text is None else int(text) for text in found.groups()]
    whole, part, tile, level = ((numbers[i], numbers[i + 1]) for i in (0, 2, 4, 6))
    size = next(pair for pair in (level, part, whole) if pair[0] is not None)
    assert size[0] is not None and size[1] is not None and tile[0] is not None and tile[1] is not None
    return (size[0], size[1]), (tile[0], tile[1])
