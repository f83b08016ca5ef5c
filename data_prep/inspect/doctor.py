"""Checks a folder of slides and masks before a long build: decodes every tile, and gives each fault a remedy."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.masks.masks import POLYGON_SUFFIXES, Mask, find_masks, is_tiled, open_mask
from data_prep.slides.base import DamagedTile, Slide, SlideError
from data_prep.slides.open import MASK_SUFFIXES, SLIDE_SUFFIXES, open_slide, slides_in
from data_prep.slides.tiff import open_tiff
from data_prep.system.files import one_line

Severity = Literal["error", "warning", "note"]
ORDER = ("error", "warning", "note")

_BAND_PX = 64 * 2**20  # pixels of one decoding task
_STEP_PX = 2048
_FACTORS = (2, 4, 8)
_BURDEN_TOLERANCE = 0.01
SLOW_S = 1.0  # to decode a mask
MPP_OF_SCANNERS = (0.05, 4.5)  # um per pixel: from oil immersion at 100x to half of 5x
_PARTS = re.compile(r"_(whole|viable)$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """Something about a slide, or its folder, that its owner should know, and what to do about it.

    An error would make a build fail or be wrong; a warning is probably a mistake; a note is for information.
    """

    slide: str
    severity: Severity
    text: str
    remedy: str


class _Findings(list[Finding]):
    """What was found about one slide."""

    def __init__(self, slide: str) -> None:
        self.slide = slide

    def say(self, severity: Severity, text: str, remedy: str) -> None:
        self.append(Finding(self.slide, severity, text, remedy))


@dataclass(frozen=True)
class Band:
    """Rows of one level of a slide to decode."""

    slide: Path
    level: int
    top_px: int
    rows_px: int


def slides_of(paths: Iterable[Path]) -> list[Path]:
    """List slides; folders become their `slides_in`. Raises SlideError if a path is missing, or no slide is found."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += slides_in(path)
        elif path.exists():
            found.append(path)
        else:
            raise SlideError(f"{path}: no such file or folder")
    if not found:
        raise SlideError(f"{', '.join(map(str, paths))}: no slides here (looked for {', '.join(SLIDE_SUFFIXES)})")
    return found


def examine(path: Path, masks: Path | None, fov: Path | None = None) -> tuple[list[Finding], list[Band], float | None]:
    """What the header of a slide, its mask and its field of view say.

    Returns:
        Findings, the bands to decode (none if it cannot be opened), and the slide's um per pixel.
    """
    # Open it.
    found = _Findings(path.name)
    say = found.say
    if "rescan" in path.stem.lower():
        say("note", "its name says rescan", "see that the mask or annotation is of this scan")
    try:
        slide = open_slide(path)
    except SlideError as error:
        say("error", _without(path, error), "copy it again from its source; compare sizes and checksums")
        return found, [], None
    with slide:
        # What its header and levels say.
        for fault in slide.faults:
            say("error", fault, "copy it again from its source; build warns, build --strict refuses")
        if slide.mpp is None:
            say("warning", "does not say its micrometres per pixel", "keep them in a table; builds go by pixels")
        for finer, coarser in zip(slide.level_sizes_wh, slide.level_sizes_wh[1:], strict=False):
            factors = [a / b for a, b in zip(finer, coarser, strict=True)]
            if not any(all(abs(f - whole) < 0.02 * whole for f in factors) for whole in _FACTORS):
                shown = " and ".join(f"{f:.3f}" for f in factors)
                say("note", f"pyramid factor {shown}, usual are 2, 4 and 8", "nothing; builds are exact all the same")
        if len(slide.level_sizes_wh) == 1 and max(slide.size_wh) > 16384:
            say("warning", "no pyramid", "downscaled frames read all of level 0; convert it with a pyramid")
        hidden = _hidden_levels(path, slide)
        if hidden:
            seen = f"{hidden} levels that OpenSlide does not see (SubIFDs, as OME-TIFF has them)"
            say("warning", seen, "convert it to flat pages to use them")
        if slide.reader == "raster" and max(slide.size_wh) > 8192:
            say("warning", f"a {path.suffix} picture is decoded whole", "convert it to a tiled TIFF")

        # What lies beside it.
        if masks is not None:
            found += _mask_findings(path, slide, masks)
        if fov is not None:
            found += _mask_findings(path, slide, fov, "field of view")
        return found, _bands(path, slide), slide.mpp


def _without(path: Path, error: BaseException) -> str:
    return one_line(error).removeprefix(f"{path}: ")


def _hidden_levels(path: Path, slide: Slide) -> int:
    """Levels in SubIFDs of a TIFF, which OpenSlide leaves out."""
    if path.suffix.lower() not in (".tif", ".tiff", ".svs"):
        return 0
    try:
        with open_tiff(path) as tiff:
            return len(tiff.pages[0].pages or ()) if len(slide.level_sizes_wh) == 1 else 0
    except SlideError:
        return 0


def _bands(path: Path, slide: Slide) -> list[Band]:
    bands = []
    for level, (width, height) in enumerate(slide.level_sizes_wh):
        rows = max(_STEP_PX, _BAND_PX // width // _STEP_PX * _STEP_PX)
        bands += [Band(path, level, top, min(rows, height - top)) for top in range(0, height, rows)]
    return bands


def decode(band: Band) -> list[Finding]:
    """Decode the tiles of a band; one finding for all damage.

    OpenSlide reads again what the fast reader read: it refuses tiles whose data end before the last block, where
    imagecodecs makes up the rest.
    """
    found = _Findings(band.slide.name)
    try:
        bad, reader = _damaged(band, "auto")
        if reader == "fast":
            bad |= _damaged(band, "openslide")[0]
    except SlideError as error:
        found.say("error", _without(band.slide, error), "copy it again from its source")
        return found
    if bad:
        where = ", ".join(f"x={tile.x_px} y={tile.y_px}" for tile in sorted(bad)[:3])
        many = f"{len(bad)} tiles" if len(bad) > 1 else "a tile"
        text = f"{many} of level {band.level} cannot be decoded: {where}" + (", ..." if len(bad) > 3 else "")
        remedy = "copy it again; build fills such tiles with white and lists them, build --strict refuses"
        found.say("error", text, remedy)
    return found


def _damaged(band: Band, reader: str) -> tuple[set[DamagedTile], str]:
    """Tiles of a band that a reader cannot decode, and the reader's name."""
    with open_slide(band.slide, reader) as slide:
        width = slide.level_sizes_wh[band.level][0]
        for top in range(band.top_px, band.top_px + band.rows_px, _STEP_PX):
            for left in range(0, width, _STEP_PX):
                rows = min(_STEP_PX, band.top_px + band.rows_px - top)
                slide.read(band.level, left, top, min(_STEP_PX, width - left), rows)
        return set(slide.damaged), slide.reader


def _mask_findings(path: Path, slide: Slide, folder: Path, what: str = "mask") -> list[Finding]:
    """Faults of a slide's masks, or of its field of view."""
    # Find the files.
    found = _Findings(path.name)
    say = found.say
    try:
        files = _mask_files(path, folder) if what == "mask" else find_masks(path, folder)
    except SlideError as error:
        say("error", one_line(error), "keep one of them")
        return found
    if not files:
        say("error", f"no {what} in {folder}", f"put {path.stem}.tif, .png, .xml or .geojson there")

    # Read each, and look at its size and classes.
    for file in files:
        try:
            with open_mask(file, slide.size_wh, kind=None if what == "mask" else "inside") as mask:
                if mask.size_wh != slide.size_wh:
                    sizes = " x ".join(map(str, mask.size_wh)), " x ".join(map(str, slide.size_wh))
                    text = f"{what} {file.name} is {sizes[0]}, the slide {sizes[1]}"
                    say("error", text, "it belongs to another slide or level")
                    continue
                started_s = time.perf_counter()
                held = _classes(mask.bands(_STEP_PX))
                _tell_of_whole(found, file, mask, time.perf_counter() - started_s, what)
        except SlideError as error:
            say("error", f"{what} {file.name}: {_without(file, error)}", "see how it was made")
            continue
        if not held and what == "mask":
            say("warning", f"mask {file.name} is empty", "see that this is meant")
        elif not held:
            say("error", f"{what} {file.name} is empty: nothing of the slide would count", "see how it was made")
        elif max(held) > 13 and what == "mask":
            ids = ", ".join(map(str, sorted(held)[:5]))
            say("warning", f"mask {file.name} holds classes {ids} ...", "is it a mask of ids?")

    # Hold whole and viable tumour against each other.
    parts = _parts(files)
    if what == "mask" and len(parts) == 2 and not any(finding.severity == "error" for finding in found):
        _tell_of_parts(found, parts["whole"], parts["viable"], slide.size_wh)
    return found


def _tell_of_whole(found: _Findings, file: Path, mask: Mask, seconds: float, what: str) -> None:
    """The mask's own notes, and a warning about an untiled mask that took long, whatever its size."""
    remedy = "python -m data_prep convert makes it tiled, once"
    drawn = file.suffix.lower() in POLYGON_SUFFIXES
    for note in mask.notes:
        found.say("note" if drawn else "warning", f"{what} {note}", "see that this is meant" if drawn else remedy)
    if not mask.notes and not drawn and seconds > SLOW_S and not is_tiled(file):
        slow = f"{what} {file.name} has no tiles and took {seconds:.1f} s to decode, once per process"
        found.say("warning", slow, remedy)


def _parts(files: Iterable[Path]) -> dict[str, Path]:
    """PAIP's masks among the files: "whole" and "viable"."""
    return {match[1].lower(): file for file in files if (match := _PARTS.search(file.stem))}


def _mask_files(path: Path, masks: Path) -> list[Path]:
    """PAIP's pair of masks if there is one, else the mask of the slide's name."""
    stems = (f"{path.stem}_whole".casefold(), f"{path.stem}_viable".casefold())
    beside = (p for p in sorted(masks.iterdir()) if p.suffix.lower() in MASK_SUFFIXES)
    return [p for p in beside if p.stem.casefold() in stems] or find_masks(path, masks)


def _classes(bands: Iterable[np.ndarray]) -> dict[int, int]:
    """Pixels of every class above 0."""
    total = np.zeros(256, np.int64)
    for band in bands:
        total += np.bincount(band.ravel(), minlength=256)
    return {k: int(total[k]) for k in range(1, 256) if total[k]}


def _tell_of_parts(found: _Findings, whole: Path, viable: Path, size_wh: tuple[int, int]) -> None:
    """Viable tumour lies inside the whole tumour; the other way round the two files are swapped."""
    outside = inside_out = 0
    with open_mask(whole, size_wh) as a, open_mask(viable, size_wh) as b:
        for first, second in zip(a.bands(_STEP_PX), b.bands(_STEP_PX), strict=True):
            outside += int(((second != 0) & (first == 0)).sum())
            inside_out += int(((first != 0) & (second == 0)).sum())
    if outside and not inside_out:
        text = f"{whole.name} lies inside {viable.name}: are they swapped?"
        found.say("error", text, "look at both; exchange the names if so")
    elif outside:
        text = f"{outside} pixels of {viable.name} lie outside of {whole.name}"
        found.say("warning", text, "look at both; training takes viable over whole")


def over_the_folder(slides: list[Path], mpps: dict[Path, float | None]) -> list[Finding]:
    """What only shows when slides are compared: equal stems, mixed suffixes, an odd resolution."""
    found = []
    by_stem = defaultdict(list)
    for path in slides:
        by_stem[path.stem.casefold()].append(path)
    for same in by_stem.values():
        if len(same) > 1:
            names = ", ".join(path.name for path in same)
            found.append(Finding(same[0].name, "error", f"same name before the suffix: {names}", "rename all but one"))
    suffixes = Counter(path.suffix for path in slides)
    if len({suffix.lower() for suffix in suffixes}) < len(suffixes):
        text = f"suffixes in two cases: {', '.join(sorted(suffixes))}"
        found.append(Finding(slides[0].parent.name, "note", text, "nothing here; scripts with *.svs miss some"))
    return found + _resolution_findings(slides, mpps)


def _resolution_findings(slides: list[Path], mpps: dict[Path, float | None]) -> list[Finding]:
    """Slides of another resolution than most, and resolutions that no scanner has."""
    found = []
    known = sorted(value for value in mpps.values() if value)
    low, high = MPP_OF_SCANNERS
    absurd = {path: value for path, value in mpps.items() if value and not low <= value <= high}
    remedy = "see where it comes from: a printer's resolution, a default, or that of another level"
    if len(absurd) == len(known) > 1 and known[0] == known[-1]:
        what = f"all {len(known)} slides that say it have {known[0]:.3f} um per pixel, which no slide scanner has"
        return [Finding(slides[0].parent.name, "warning", what, remedy)]
    for path, odd in absurd.items():
        found.append(Finding(path.name, "warning", f"{odd:.3f} um per pixel, which no slide scanner has", remedy))
    if known:
        middle = known[len(known) // 2]
        for path, value in mpps.items():
            if value and abs(value - middle) > 0.1 * middle:
                text = f"{value:.3f} um per pixel, most have {middle:.3f}"
                remedy = "objects have another size in pixels; is it another scanner?"
                found.append(Finding(path.name, "warning", text, remedy))
    return found


def check_burden(path: Path, masks: Path, burdens: dict[str, float]) -> list[Finding]:
    """Compare a slide's tumour burden with its masks."""
    wanted = burdens.get(path.stem.casefold())
    if wanted is None:
        return [Finding(path.name, "note", "not in the table of burdens", "nothing, or complete the table")]
    try:
        parts = _parts(_mask_files(path, masks))
        if len(parts) < 2:
            return []
        with open_slide(path) as slide:
            size_wh = slide.size_wh
        areas = {}
        for part, file in parts.items():
            with open_mask(file, size_wh) as mask:
                areas[part] = sum(_classes(mask.bands(_STEP_PX)).values())
    except SlideError:  # told elsewhere
        return []
    burden = areas["viable"] / areas["whole"] if areas["whole"] else 0.0
    if abs(burden - wanted) <= _BURDEN_TOLERANCE:
        return []
    text = f"burden {wanted:.3f} in the table, {burden:.3f} by its masks"
    return [Finding(path.name, "warning", text, "trust neither before looking at the masks")]


def died(task: object, cause: str) -> list[Finding]:
    """The finding for a task whose worker died."""
    path = task.slide if isinstance(task, Band) else task
    name = path.name if isinstance(path, Path) else str(path)
    return [Finding(name, "error", f"reading it ended its process: {cause}", "do not build with it; report the file")]
