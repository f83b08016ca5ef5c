"""Looks a folder of slides and masks over before a long build: every tile decoded, and what is odd said with a remedy.

Reports what it sees and knows no file by name. Must not import torch or MPI.
"""

from __future__ import annotations

import csv
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.masks.masks import POLYGON_SUFFIXES, Mask, find_masks, open_mask
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
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)%?")
_PARTS = re.compile(r"_(whole|viable)$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """Something about a slide that its owner should know.

    Attributes:
        slide: name of the slide, or of the folder.
        severity: error (a build would fail or be wrong), warning (probably not what is wanted) or note.
        text: what was found.
        remedy: what to do about it.
    """

    slide: str
    severity: Severity
    text: str
    remedy: str


@dataclass(frozen=True)
class Band:
    """Rows of one level of a slide to decode.

    Attributes:
        slide: the slide.
        level: its level.
        top_px: first row.
        rows_px: number of rows.
    """

    slide: Path
    level: int
    top_px: int
    rows_px: int


def slides_of(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders replaced by their `slides_in`.

    Raises:
        SlideError: A path is missing, or no slide is found.
    """
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
    found: list[Finding] = []
    name = path.name

    def say(severity: Severity, text: str, remedy: str) -> None:
        found.append(Finding(name, severity, text, remedy))

    if "rescan" in path.stem.lower():
        say("note", "its name says rescan", "see that the mask or annotation is of this scan")
    try:
        slide = open_slide(path)
    except SlideError as error:
        say("error", _without(path, error), "copy it again from its source; compare sizes and checksums")
        return found, [], None
    with slide:
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
            say(
                "warning",
                f"{hidden} levels that OpenSlide does not see (SubIFDs, as OME-TIFF has them)",
                "convert it to flat pages to use them",
            )
        if slide.reader == "raster" and max(slide.size_wh) > 8192:
            say("warning", f"a {path.suffix} picture is decoded whole", "convert it to a tiled TIFF")
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
    """Decode the tiles of a band; one finding for what is damaged.

    What the fast reader reads is read by OpenSlide as well, which refuses tiles whose data ends before the last block;
    imagecodecs makes up the rest of them.
    """
    name = band.slide.name
    try:
        bad, reader = _damaged(band, "auto")
        if reader == "fast":
            bad |= _damaged(band, "openslide")[0]
    except SlideError as error:
        return [Finding(name, "error", _without(band.slide, error), "copy it again from its source")]
    if not bad:
        return []
    where = ", ".join(f"x={tile.x_px} y={tile.y_px}" for tile in sorted(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    many = f"{len(bad)} tiles" if len(bad) > 1 else "a tile"
    return [
        Finding(
            name,
            "error",
            f"{many} of level {band.level} cannot be decoded: {where}",
            "copy it again; build fills such tiles with white and lists them, build --strict refuses",
        )
    ]


def _damaged(band: Band, reader: str) -> tuple[set[DamagedTile], str]:
    """Tiles of a band that a reader cannot decode, and the reader that it was."""
    with open_slide(band.slide, reader) as slide:
        width = slide.level_sizes_wh[band.level][0]
        for top in range(band.top_px, band.top_px + band.rows_px, _STEP_PX):
            for left in range(0, width, _STEP_PX):
                rows = min(_STEP_PX, band.top_px + band.rows_px - top)
                slide.read(band.level, left, top, min(_STEP_PX, width - left), rows)
        return set(slide.damaged), slide.reader


def _mask_findings(path: Path, slide: Slide, folder: Path, what: str = "mask") -> list[Finding]:
    """Missing, of another size, without class ids, untiled; viable tumour outside of the whole; an empty view."""
    found: list[Finding] = []

    def say(severity: Severity, text: str, remedy: str) -> None:
        found.append(Finding(path.name, severity, text, remedy))

    try:
        files = _mask_files(path, folder) if what == "mask" else _others(path, folder)
    except SlideError as error:
        return [Finding(path.name, "error", one_line(error), "keep one of them")]
    if not files:
        say("error", f"no {what} in {folder}", f"put {path.stem}.tif, .png, .xml or .geojson there")
    for file in files:
        try:
            with open_mask(file, slide.size_wh, kind=None if what == "mask" else "inside") as mask:
                if mask.size_wh != slide.size_wh:
                    sizes = " x ".join(map(str, mask.size_wh)), " x ".join(map(str, slide.size_wh))
                    say(
                        "error",
                        f"{what} {file.name} is {sizes[0]}, the slide {sizes[1]}",
                        "it belongs to another slide or level",
                    )
                    continue
                started_s = time.perf_counter()
                held = _classes(mask.bands(_STEP_PX))
                seconds = time.perf_counter() - started_s
                found += _whole_findings(path, file, mask, seconds, what)
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
    parts = {match[1].lower(): file for file in files if (match := _PARTS.search(file.stem))}
    if what == "mask" and len(parts) == 2 and not any(finding.severity == "error" for finding in found):
        found += _part_findings(path, parts["whole"], parts["viable"], slide.size_wh)
    return found


def _whole_findings(path: Path, file: Path, mask: Mask, seconds: float, what: str = "mask") -> list[Finding]:
    """What the mask itself tells, and masks without tiles that took long, whatever their size."""
    remedy = "python -m data_prep convert makes it tiled, once"
    if mask.notes:
        drawn = file.suffix.lower() in POLYGON_SUFFIXES
        return [
            Finding(
                path.name,
                "note" if drawn else "warning",
                f"{what} {note}",
                "see that this is meant" if drawn else remedy,
            )
            for note in mask.notes
        ]
    picture = file.suffix.lower() in MASK_SUFFIXES
    if picture and seconds > SLOW_S and (file.suffix.lower() == ".png" or not _is_tiled(file)):
        text = f"{what} {file.name} has no tiles and took {seconds:.1f} s to decode, once per process"
        return [Finding(path.name, "warning", text, remedy)]
    return []


def _mask_files(path: Path, masks: Path) -> list[Path]:
    """PAIP's pair of masks if there is one, else the mask of the slide's name."""
    stem = path.stem.casefold()
    parts = [
        p
        for p in sorted(masks.iterdir())
        if p.suffix.lower() in MASK_SUFFIXES and p.stem.casefold() in (f"{stem}_whole", f"{stem}_viable")
    ]
    return parts or _others(path, masks)


def _others(path: Path, folder: Path) -> list[Path]:
    """Masks of a slide's name but for the slide itself, which may lie there too."""
    return [file for file in find_masks(path, folder) if file.resolve() != path.resolve()]


def _is_tiled(file: Path) -> bool:
    with open_tiff(file) as tiff:
        return bool(tiff.pages[0].is_tiled)


def _classes(bands: Iterable[np.ndarray]) -> dict[int, int]:
    """Pixels of every class above 0."""
    total = np.zeros(256, np.int64)
    for band in bands:
        total += np.bincount(band.ravel(), minlength=256)
    return {k: int(total[k]) for k in range(1, 256) if total[k]}


def _part_findings(path: Path, whole: Path, viable: Path, size_wh: tuple[int, int]) -> list[Finding]:
    """Viable tumour lies inside the whole tumour; the other way round the two files are swapped."""
    outside = inside_out = 0
    with open_mask(whole, size_wh) as a, open_mask(viable, size_wh) as b:
        for first, second in zip(a.bands(_STEP_PX), b.bands(_STEP_PX), strict=True):
            outside += int(((second != 0) & (first == 0)).sum())
            inside_out += int(((first != 0) & (second == 0)).sum())
    if outside and not inside_out:
        return [
            Finding(
                path.name,
                "error",
                f"{whole.name} lies inside {viable.name}: are they swapped?",
                "look at both; exchange the names if so",
            )
        ]
    if outside:
        return [
            Finding(
                path.name,
                "warning",
                f"{outside} pixels of {viable.name} lie outside of {whole.name}",
                "look at both; training takes viable over whole",
            )
        ]
    return []


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
        found.append(
            Finding(
                slides[0].parent.name,
                "note",
                f"suffixes in two cases: {', '.join(sorted(suffixes))}",
                "nothing here; scripts with *.svs miss some",
            )
        )
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
                found.append(
                    Finding(
                        path.name,
                        "warning",
                        f"{value:.3f} um per pixel, most have {middle:.3f}",
                        "objects have another size in pixels; is it another scanner?",
                    )
                )
    return found


def read_burdens(path: Path, columns: Sequence[str] = ()) -> dict[str, float]:
    """Tumour burden (viable over whole area) per slide from a CSV: percent or fraction, slides in the first column.

    Args:
        path: The table, with a row of names at the top.
        columns: Names that the column of burdens may have, in any case; empty: the only column of numbers.

    Raises:
        SlideError: The file cannot be read, has no such column, or several columns of numbers and none is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{path}: cannot be read: {one_line(error)}") from error
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    at = _burden_column(path, header, rows, columns)
    found = {
        Path(row[0]).stem.casefold(): float(row[at].rstrip("%"))
        for row in rows
        if len(row) > at and row[0] and _NUMBER.fullmatch(row[at])
    }
    if not found:
        raise SlideError(f"{path}: no numbers in column {header[at]!r}")
    if max(found.values()) > 1.5:
        found = {name: value / 100 for name, value in found.items()}
    return found


def _burden_column(path: Path, header: list[str], rows: list[list[str]], columns: Sequence[str]) -> int:
    wanted = {name.strip().casefold() for name in columns}
    if wanted:
        named = [i for i, name in enumerate(header) if name.casefold() in wanted]
        if len(named) != 1:
            listed = ", ".join(header) or "nothing"
            raise SlideError(f"{path}: {len(named)} columns called {' or '.join(columns)}; its columns are {listed}")
        return named[0]
    numbers = [i for i in range(1, len(header)) if any(len(row) > i and _NUMBER.fullmatch(row[i]) for row in rows)]
    if not numbers:
        raise SlideError(f"{path}: no column of numbers after the names of slides")
    if len(numbers) > 1:
        listed = ", ".join(header[i] for i in numbers)
        raise SlideError(f"{path}: several columns of numbers ({listed}); say with --burden-column which holds burdens")
    return numbers[0]


def check_burden(path: Path, masks: Path, burdens: dict[str, float]) -> list[Finding]:
    """Compare a slide's tumour burden with its masks."""
    wanted = burdens.get(path.stem.casefold())
    if wanted is None:
        return [Finding(path.name, "note", "not in the table of burdens", "nothing, or complete the table")]
    try:
        files = _mask_files(path, masks)
        parts = {match[1].lower(): file for file in files if (match := _PARTS.search(file.stem))}
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
    return [
        Finding(
            path.name,
            "warning",
            f"burden {wanted:.3f} in the table, {burden:.3f} by its masks",
            "trust neither before looking at the masks",
        )
    ]


def died(task: object, cause: str) -> list[Finding]:
    """The finding for a task whose worker died."""
    path = task.slide if isinstance(task, Band) else task
    name = path.name if isinstance(path, Path) else str(path)
    return [Finding(name, "error", f"reading it ended its process: {cause}", "do not build with it; report the file")]
