"""One slide to one token file: frame, edges, tree, tokens, file; and whether that is needed at all.

A pure function of slide, mask and options, run by `build` in this process, in a pool or on an MPI rank. Must not import
MPI or torch.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.build.leaf_plan import blur_of, cut_leaves, plan_leaves
from data_prep.build.log import hash_source
from data_prep.build.options import ALGORITHM, BuildOptions, changed_parameter
from data_prep.build.outcome import Hashes, Outcome, Stage, Task
from data_prep.frame import Frame, FrameReader, MaskReader, make_frame
from data_prep.masks.masks import InView, Mask, check_classes, check_mask_size, find_masks, open_mask
from data_prep.slides.base import Slide, SlideError, check_tokens_fit
from data_prep.slides.open import open_slide
from data_prep.system.error_text import one_line
from data_prep.token_files.token_file import StoreError, check_bytes, new_meta, read_meta, token_path, write_tokens
from data_prep.token_files.verify import verify_file
from data_prep.tokens.ceiling import ceiling
from data_prep.tokens.paper_sequences import drop_or_repeat, pack_strip
from data_prep.tokens.token_set import Reader, TokenSet, in_view

CEILING_LOW = 0.8
_HELD_PX = 4096  # frames up to this side are held whole, 48 MiB, since edges and tokens both look at all of it
_BAND_PX = 512


def code_version() -> str:
    """What besides input and parameters decides the bytes: this code's algorithm number and OpenCV."""
    return f"data_prep-{ALGORITHM} opencv-{cv2.__version__}"


def build_one(task: Task, beat: Callable[[str], None] | None = None) -> Outcome:
    """Build one token file unless a valid one from the same input is there; never raises for a bad slide.

    Args:
        task: The slide and its parameters.
        beat: Called with a note after every tile that was read, so that a large slide shows that it moves.

    Returns:
        The outcome. On `failed`, the token file of an earlier run is left as it was and no temporary file remains.
    """
    cv2.setNumThreads(1)  # one process per core: threads of OpenCV inside each would only fight
    started_s = time.perf_counter()
    outcome = Outcome(task.slide.stem, str(task.slide), "failed")
    try:
        _build(task, outcome, beat)
    except (ValueError, OSError, MemoryError) as error:
        outcome.status, outcome.reason = "failed", one_line(error)
    except Exception as error:  # one bad slide must not cost the other thousand
        outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {one_line(error)}"
        outcome.traceback = traceback.format_exc()
    outcome.seconds = round(time.perf_counter() - started_s, 4)
    return outcome


def _build(task: Task, outcome: Outcome, beat: Callable[[str], None] | None) -> None:
    mask_paths = masks_of(task)
    hashes = hash_inputs(task, mask_paths, outcome)
    if valid_already(task, hashes, outcome):
        return
    token_set, meta = make_tokens(task.slide, mask_paths, task.options, outcome, beat)
    write_result(task, token_set, meta, hashes, outcome)


def masks_of(task: Task) -> list[Path]:
    """The files of the mask of the task's slide, see `mask_files`."""
    return mask_files(task.slide, task.options)


def mask_files(slide: Path, options: BuildOptions) -> list[Path]:
    """The files that say what is where on a slide: of its mask, mostly one, then its field of view where one is wanted.

    Returns:
        Paths for `mask_of`; none if no masks are wanted.

    Raises:
        ValueError: There is none.
    """
    if options.masks is None:
        return []
    kinds = f"{slide.stem}.png, .tif, .xml or .geojson"
    paths = find_masks(slide, options.masks, options.mask_kind)
    if not paths:
        raise ValueError(f"{slide}: no mask {kinds} in {options.masks}")
    if options.fov is not None:
        views = find_masks(slide, options.fov)
        if not views:
            raise ValueError(f"{slide}: no field of view {kinds} in {options.fov}")
        paths += views
    return paths


def hash_inputs(task: Task, mask_paths: list[Path], outcome: Outcome) -> Hashes:
    """SHA-256 of slide and mask (of several files, joined by +); also noted in `outcome.sources`.

    Raises:
        OSError: A file cannot be read.
    """
    hashes = []
    for path in [task.slide, *mask_paths]:
        source = hash_source(path, task.known)
        outcome.sources[str(path.resolve())] = (source.sha256, *source.stamp)
        hashes.append(source.sha256)
    return hashes[0], "+".join(hashes[1:]) or None


def valid_already(task: Task, hashes: Hashes, outcome: Outcome) -> bool:
    """Whether a valid file from the same input is there; then `outcome` says so, else why it is built again.

    Raises:
        SlideError: With `strict`, directories of the slide do not fit.
    """
    target = token_path(task.out, task.slide.stem)
    if task.rebuild or not target.exists():
        return False
    why = why_rebuild(target, task.options, *hashes)
    if why is not None:
        outcome.reason = f"rebuilt: {why}"
        return False
    meta = read_meta(target)
    if task.options.strict:  # a file that a build without it made says nothing of odd directories
        if meta["damaged"]:
            outcome.reason = "rebuilt: damaged tiles were filled"
            return False
        open_slide(task.slide, strict=True).close()
    outcome.status, outcome.reason = "skipped", "complete and valid"
    outcome.tokens, outcome.ceiling, outcome.edge_pixels = meta["rows"], meta["ceiling"], meta["edge_pixels"]
    _warn(task.options, meta["rows"], outcome, meta["damaged"] or [])
    return True


def write_result(task: Task, token_set: TokenSet, meta: dict[str, Any], hashes: Hashes, outcome: Outcome) -> None:
    """Write the token file and say that it is done.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    with Stage(outcome, "write"):
        whole = meta | {"source_sha256": hashes[0], "mask_sha256": hashes[1]}
        write_tokens(token_path(task.out, task.slide.stem), token_set, whole)
    outcome.status = "done"


def why_rebuild(path: Path, options: BuildOptions, source_sha256: str, mask_sha256: str | None) -> str | None:
    """Why the token file at `path` cannot stay, or None when it is whole, valid and from the same input."""
    try:
        check_bytes(path)  # first: HDF5 may not come back from a damaged file
        meta = read_meta(path)
    except StoreError as error:
        return str(error).removeprefix(f"{path}: ")
    blur = blur_of(options)
    changed = changed_parameter(meta["params"], options.params(blur, None, None))
    if changed is not None:
        return f"parameter {changed}"
    if meta["source_sha256"] != source_sha256:
        return "the slide's content changed"
    if meta["mask_sha256"] != mask_sha256:
        what = "mask" if options.fov is None else "mask or its field of view"
        return f"the {what} changed" if meta["mask_sha256"] and mask_sha256 else "masks are new or gone"
    faults = verify_file(path)
    return faults[0] if faults else None


def make_tokens(
    slide_path: Path,
    mask_paths: list[Path],
    options: BuildOptions,
    outcome: Outcome,
    beat: Callable[[str], None] | None = None,
) -> tuple[TokenSet, dict[str, Any]]:
    """Everything between the slide and the file.

    Returns:
        Token set and metadata (without hashes). Leaves, ceiling, warnings and stage times go into `outcome`.

    Raises:
        ValueError: The slide cannot be read, or its mask has another size.
    """
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(slide_path, strict=options.strict))
        frame = make_frame(slide.size_wh, options.resolution, options.aspect)
        if options.patching == "uniform":
            check_room(slide_path, (options.resolution // options.patch) ** 2, options)
        reader = FrameReader(slide, frame)
        read = _beating(reader.read, slide.name, beat) if beat else reader.read
        if options.patching == "apf" and frame.size_px <= _HELD_PX:
            with Stage(outcome, "read"):
                read = _held(read, frame)
        read_mask = None
        if mask_paths:
            mask = opened.enter_context(mask_of(slide, mask_paths, options))
            outcome.warnings += mask.notes
            read_mask = mask_reader(mask, frame, options)
        leaves, found = plan_leaves(read, frame, options, outcome)
        check_room(slide_path, len(leaves), options)
        with Stage(outcome, "tokens"):
            whole = cut_leaves(read, leaves, frame, options, read_mask)
        return finish(slide, frame, whole, found, options, outcome, damaged_tiles(slide))


def check_room(slide: Path, tokens: int, options: BuildOptions) -> None:
    """Raise SlideError if so many tokens do not fit in memory."""
    remedy = "raise --split-value, or use --length" if options.split_value is not None else "lower --length"
    if options.patching == "uniform":
        remedy = "lower --resolution, or use --patching apf"
    check_tokens_fit(slide, tokens, options.patch, options.counted if options.masks else 0, remedy)


def mask_of(slide: Slide, mask_paths: list[Path], options: BuildOptions) -> Mask:
    """Open the mask of a slide, of what `mask_files` found for it.

    Raises:
        SlideError: It cannot be read, or has another size than the slide.
    """
    classes = None if options.mask_classes is None else dict(options.mask_classes)
    view_path = None
    if options.fov is not None:
        *mask_paths, view_path = mask_paths
    with ExitStack() as opened:
        mask = opened.enter_context(open_mask(mask_paths, slide.size_wh, classes, kind=options.mask_kind))
        check_mask_size(slide, mask)
        if view_path is not None:
            view = opened.enter_context(open_mask(view_path, slide.size_wh, kind="inside"))
            check_mask_size(slide, view, "field of view")
            mask = InView(mask, view, options.counted)
        opened.pop_all()
        return mask


def mask_reader(mask: Mask, frame: Frame, options: BuildOptions) -> Reader:
    """Class ids of rectangles of the frame; the reader raises SlideError for a class above `options.counted`."""
    read = MaskReader(mask, frame).read

    def checked(x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[np.uint8]:
        ids = read(x_px, y_px, w_px, h_px)
        check_classes(mask.path, ids, options.counted)
        return ids

    return checked


def finish(
    slide: Slide,
    frame: Frame,
    whole: TokenSet,
    found: dict[str, Any],
    options: BuildOptions,
    outcome: Outcome,
    damaged: Mapping[tuple[int, ...], str],
) -> tuple[TokenSet, dict[str, Any]]:
    """Metadata, ceiling and warnings of a finished set of leaves, and the comparison habits `fit` and `packing`.

    Args:
        slide: The slide.
        frame: Its frame.
        whole: One row per leaf; with a field of view its last class counts what lies outside.
        found: `blur`, `lo`, `hi` and `edge_pixels` as used; None where there are none.
        options: Parameters.
        outcome: Gets tokens, edge pixels, ceiling and warnings.
        damaged: (level, x, y, w, h) of the slide's tiles that could not be decoded, and why. The cause goes into the
            log, not into the token file: the words are the decoder's.

    Raises:
        SlideError: Nothing of the slide could be decoded, or nothing of it lies inside its field of view.
    """
    for level, size_wh in enumerate(slide.level_sizes_wh):
        if sum(tile[3] * tile[4] for tile in damaged if tile[0] == level) >= size_wh[0] * size_wh[1]:
            raise SlideError(f"{slide.path}: no tile of level {level} can be decoded")
    leaves = len(whole)
    if options.fov is not None:
        whole = seen_part(whole, slide.path, options.fov)
    meta = new_meta(
        slide=slide.name,
        params=options.params(found["blur"], found["lo"], found["hi"]),
        size0_wh=[int(v) for v in slide.size_wh],
        frame_px=frame.size_px,
        mpp=slide.mpp,
        code_version=code_version(),
        budget_used=round(leaves / options.length, 6) if options.length else None,
        edge_pixels=found["edge_pixels"],
        damaged=[list(tile) for tile in sorted(damaged)],
        content_pixels=None if options.fov is None else int(whole.content_counts.sum(dtype=np.int64)),
    )
    outcome.damaged = [{"tile": list(tile), "cause": damaged[tile]} for tile in sorted(damaged)]
    token_set = _fit(whole, options)
    outcome.tokens, outcome.edge_pixels = len(token_set), found["edge_pixels"]
    if whole.mask_counts is not None:
        meta["mask_pixels"] = whole.mask_counts.sum(axis=(0, 1, 2), dtype=np.int64).tolist()
        meta["ceiling"] = outcome.ceiling = rounded_ceiling(token_set, meta["mask_pixels"])
    outcome.warnings += slide.faults
    _warn(options, leaves, outcome, [(*tile, damaged[tile]) for tile in sorted(damaged)])
    return token_set, meta


def seen_part(whole: TokenSet, slide: Path, fov: Path) -> TokenSet:
    """`in_view`; raises SlideError where nothing is left."""
    seen = in_view(whole)
    if not seen.content_counts.any():
        raise SlideError(f"{slide}: its field of view in {fov} is 0 everywhere")
    return seen


def damaged_tiles(slide: Slide) -> dict[tuple[int, ...], str]:
    """(level, x, y, w, h) of tiles that an open slide could not decode so far, and why."""
    return {tuple(int(v) for v in tile): cause for tile, cause in sorted(slide.causes.items())}


def _held(read: Reader, frame: Frame) -> Reader:
    """`read` from a copy of the frame, so that the slide is decoded once."""
    whole = np.full((frame.size_px, frame.size_px, 3), 255, np.uint8)
    width, height = frame.content_wh
    for top in range(0, height, _BAND_PX):
        rows = min(_BAND_PX, height - top)
        whole[top : top + rows, :width] = read(0, top, width, rows)
    return lambda x_px, y_px, w_px, h_px: whole[y_px : y_px + h_px, x_px : x_px + w_px]


def _beating(read: Reader, name: str, beat: Callable[[str], None]) -> Reader:
    """`read` that tells after every tile how much was read so far; tiles of both passes count."""
    pixels = 0

    def beating(x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[np.uint8]:
        nonlocal pixels
        tile = read(x_px, y_px, w_px, h_px)
        pixels += w_px * h_px
        beat(f"{name}: {pixels / 1e6:,.0f} Mpx read")
        return tile

    return beating


def _fit(whole: TokenSet, options: BuildOptions) -> TokenSet:
    """The two habits of the authors' code, for comparison runs: `--fit drop` and `--packing strip`."""
    token_set = whole
    if options.fit == "drop" and options.length is not None:
        token_set = drop_or_repeat(token_set, options.length, options.seed)
    if options.packing == "strip":
        token_set = replace(token_set, tokens=pack_strip(token_set.tokens))
    return token_set


def rounded_ceiling(token_set: TokenSet, mask_pixels: list[int]) -> list[float]:
    """The ceiling per class to six digits, as files and figures show it; `mask_pixels` as in `ceiling`."""
    assert token_set.mask_counts is not None
    return [round(d, 6) for d in ceiling(token_set.mask_counts, token_set.content_counts, mask_pixels)]


def _warn(options: BuildOptions, used: int, outcome: Outcome, damaged: Sequence[Sequence[Any]]) -> None:
    """Damage, and the two silent failures of adaptive patching: a tree without edges, one that cannot show the mask."""
    if damaged:
        level, x, y = damaged[0][:3]
        what = f"{len(damaged)} damaged tiles" if len(damaged) > 1 else "a damaged tile"
        why = f": {damaged[0][5]}" if len(damaged[0]) > 5 else ""  # the token file does not tell
        outcome.warnings.append(f"{what} filled with white, first at level {level}, x={x} y={y}{why}")
    if options.split_value is None and options.length is not None and used < 1 + 3 * ((options.length - 1) // 3):
        why = "no edges are left to split at" + (", use --thresholds auto" if options.thresholds != "auto" else "")
        if options.split_on != "edges":
            why = f"no {options.split_on} is left to split at"
        if used == (options.resolution // options.patch) ** 2:
            why = "every leaf has the side of --patch already"
        outcome.warnings.append(f"only {used} of {options.length} leaves used: {why}")
    low = [value for value in outcome.ceiling or [] if value < CEILING_LOW]
    if low:
        remedy = "raise --length or lower --patch"
        outcome.warnings.append(f"ceiling {min(low):.3f}: cells this coarse cannot show the mask; {remedy}")
