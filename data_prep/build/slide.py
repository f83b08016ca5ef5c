"""One slide to one token file. `build_one` builds a frame of one region; `steps` uses its parts for larger ones."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.build.log import Hashes, SlideOutcome, SlideTask, hash_inputs
from data_prep.build.options import ALGORITHM, BuildOptions, changed_parameter
from data_prep.edges.canny import auto_thresholds, blur_for
from data_prep.edges.hysteresis import final_counts, light
from data_prep.edges.scan import Reader, RegionScan, RegionSpec, edges_of_maxima, scan_region
from data_prep.frame import Frame, FrameReader, MaskReader, make_frame
from data_prep.masks.masks import InView, Mask, check_classes, check_mask_size, find_masks, open_mask
from data_prep.slides.base import Slide, SlideError
from data_prep.slides.memory import check_tokens_fit
from data_prep.slides.open import open_slide
from data_prep.system.files import one_line
from data_prep.token_files.token_file import StoreError, check_bytes, new_meta, read_meta, token_path, write_tokens
from data_prep.token_files.verify import verify_file
from data_prep.tokens.ceiling import ceiling
from data_prep.tokens.cut import assemble, held, interpolated, region_rows
from data_prep.tokens.paper_sequences import drop_or_repeat, pack_strip
from data_prep.tokens.token_set import TokenSet, in_view
from data_prep.tree.quadtree import Leaves, budget_tree, budget_tree_of, threshold_tree
from data_prep.tree.split_scores import score_levels
from data_prep.tree.uniform import uniform_leaves

CEILING_LOW = 0.8
_HELD_PX = 4096  # frames up to this side are held whole, 48 MiB, since edges and tokens both look at all of it


@dataclass(frozen=True)
class TreeBasis:
    """What a tree was made from; what its rule does not use is None.

    Attributes:
        blur: side of the Gaussian in pixels.
        lo: lower Canny threshold.
        hi: upper Canny threshold.
        edge_pixels: edge pixels of the frame.
        counts: (R / p, R / p) int32, edge pixels per smallest cell; None also where no one holds them all.
        scores: of splits by other things than edges, see `tree.split_scores`.
    """

    blur: int | None = None
    lo: int | None = None
    hi: int | None = None
    edge_pixels: int | None = None
    counts: NDArray[np.int32] | None = None
    scores: list[NDArray[np.int64]] | None = None


class OpenedSlide:
    """A slide, its frame, and readers of the frame's pixels and classes; a context manager.

    Attributes:
        slide: the slide.
        mask: its mask, or None.
        classes: what is counted of it, `options.counted`, or 0.
        frame: where it lies.
        reader: its pixels in the frame.
        read_mask: class ids of the frame, None without a mask; raises SlideError for a class above `classes`.
        notes: about the mask.
        seen: gradients of the regions that this process scanned, (2041,) int64, 0 before the first.
    """

    def __init__(self, slide: Slide, mask: Mask | None, options: BuildOptions) -> None:
        self.slide, self.mask = slide, mask
        self.frame = make_frame(slide.size_wh, options.resolution, options.aspect)
        self.reader = FrameReader(slide, self.frame)
        self.classes = 0 if mask is None else options.counted
        self.read_mask = None if mask is None else _mask_reader(mask, self.frame, self.classes)
        self.notes: tuple[str, ...] = () if mask is None else mask.notes
        self.seen: NDArray[np.int64] | int = 0

    def close(self) -> None:
        """Close slide and mask."""
        if self.mask is not None:
            self.mask.close()
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Laps:
    """Notes how long each stage of a slide took: from the end of the one before to its own."""

    def __init__(self, outcome: SlideOutcome) -> None:
        self.outcome, self.last_s = outcome, time.perf_counter()

    def ended(self, stage: str) -> None:
        now_s = time.perf_counter()
        self.outcome.stage_seconds[stage] = round(now_s - self.last_s, 4)
        self.last_s = now_s


def build_one(task: SlideTask, beat: Callable[[str], None] | None = None) -> SlideOutcome:
    """Build one token file of a frame that is one region, unless a valid one from the same input is there.

    Never raises for a bad slide.

    Args:
        task: The slide and its parameters.
        beat: Called with a note after every part that was read, so that a large slide shows that it moves.

    Returns:
        The outcome. On `failed`, the token file of an earlier run is left as it was and no temporary file remains.
    """
    cv2.setNumThreads(1)  # one process per core: threads of OpenCV inside each would only fight
    started_s = time.perf_counter()
    outcome = SlideOutcome(task.slide.stem, str(task.slide), "failed")
    try:
        mask_paths = check_inputs(task)
        hashes = hash_inputs(task, mask_paths, outcome)
        if not valid_already(task, hashes, outcome):
            with open_inputs(task.slide, mask_paths, task.options) as opened:
                whole, basis = cut_slide(opened, task.options, outcome, beat)
                token_set, meta = finish(opened, whole, basis, task.options, outcome)
            write_result(task, token_set, meta, hashes, outcome)
    except Exception as error:
        note_failure(outcome, error)
    outcome.seconds = round(time.perf_counter() - started_s, 4)
    return outcome


def note_failure(outcome: SlideOutcome, error: Exception) -> None:
    """Say in an outcome why its slide failed: one bad slide must not cost the other thousand."""
    outcome.status, outcome.reason = "failed", one_line(error)
    if not isinstance(error, (ValueError, OSError, MemoryError)):
        outcome.reason = f"{type(error).__name__}: {outcome.reason}"
        outcome.traceback = traceback.format_exc()


# ---------------------------------------------------------------------------------------------------------------------
# Inputs, and whether a token file from them is there


def check_inputs(task: SlideTask) -> list[Path]:
    """The files of the mask of the task's slide, see `mask_files`; raises SlideError for an impossible name."""
    if not task.slide.stem.isprintable():
        raise SlideError(f"{task.slide.name!a}: the name has bytes that are no UTF-8, or line breaks: rename it")
    return mask_files(task.slide, task.options)


def mask_files(slide: Path, options: BuildOptions) -> list[Path]:
    """The files that say what is where on a slide: of its mask, mostly one, then its field of view where one is wanted.

    Returns:
        Paths for `open_inputs`; none if no masks are wanted.

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


def open_inputs(slide_path: Path, mask_paths: list[Path], options: BuildOptions) -> OpenedSlide:
    """Open a slide and, of what `mask_files` found for it, its mask and field of view.

    Raises:
        SlideError: One of them cannot be read, or the mask has another size than the slide.
    """
    with ExitStack() as opened:
        slide = opened.enter_context(open_slide(slide_path, strict=options.strict))
        mask = None
        if mask_paths:
            classes = None if options.mask_classes is None else dict(options.mask_classes)
            of_mask = mask_paths if options.fov is None else mask_paths[:-1]
            mask = opened.enter_context(open_mask(of_mask, slide.size_wh, classes, kind=options.mask_kind))
            check_mask_size(slide, mask)
            if options.fov is not None:
                view = opened.enter_context(open_mask(mask_paths[-1], slide.size_wh, kind="inside"))
                check_mask_size(slide, view, "field of view")
                mask = InView(mask, view, options.counted)
        opened.pop_all()
        return OpenedSlide(slide, mask, options)


def _mask_reader(mask: Mask, frame: Frame, classes: int) -> Reader:
    read = MaskReader(mask, frame).read

    def checked(x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[np.uint8]:
        ids = read(x_px, y_px, w_px, h_px)
        check_classes(mask.path, ids, classes)
        return ids

    return checked


def valid_already(task: SlideTask, hashes: Hashes, outcome: SlideOutcome) -> bool:
    """Whether a valid file from the same input is there; then `outcome` says so, else why it is built again.

    Raises:
        SlideError: With `strict`, directories of the slide do not fit.
    """
    target = token_path(task.out, task.slide.stem)
    if task.rebuild or not target.exists():
        return False
    why = _why_rebuild(target, task.options, *hashes)
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


def _why_rebuild(path: Path, options: BuildOptions, source_sha256: str, mask_sha256: str | None) -> str | None:
    """Why the token file at `path` cannot stay, or None when it is whole, valid and from the same input."""
    try:
        check_bytes(path)  # first: HDF5 may not come back from a damaged file
        meta = read_meta(path)
    except StoreError as error:
        return str(error).removeprefix(f"{path}: ")
    changed = changed_parameter(meta["params"], options.params(blur_of(options), None, None))
    if changed is not None:
        return f"parameter {changed}"
    if meta["source_sha256"] != source_sha256:
        return "the slide's content changed"
    if meta["mask_sha256"] != mask_sha256:
        what = "mask" if options.fov is None else "mask or its field of view"
        return f"the {what} changed" if meta["mask_sha256"] and mask_sha256 else "masks are new or gone"
    faults = verify_file(path)
    return faults[0] if faults else None


def code_version() -> str:
    """What besides input and parameters decides the bytes: this code's algorithm number and OpenCV."""
    return f"data_prep-{ALGORITHM} opencv-{cv2.__version__}"


# ---------------------------------------------------------------------------------------------------------------------
# A frame of one region: leaves and tokens


def blur_of(options: BuildOptions) -> int | None:
    """Side of the Gaussian that a build uses; None for uniform patching."""
    if options.patching == "uniform":
        return None
    return options.blur if options.blur is not None else blur_for(options.resolution)


def region_spec(opened: OpenedSlide, options: BuildOptions, side_px: int) -> RegionSpec:
    """What the regions of a slide's frame have in common."""
    return RegionSpec(
        opened.frame.size_px,
        opened.frame.content_wh,
        options.patch,
        blur_of(options),
        options.thresholds,
        side_px,
        opened.classes,
        options.auto_percent,
    )


def cut_slide(
    opened: OpenedSlide, options: BuildOptions, outcome: SlideOutcome, beat: Callable[[str], None] | None = None
) -> tuple[TokenSet, TreeBasis]:
    """Leaves by the rule asked for, and their tokens.

    Returns:
        One row per leaf, with a field of view of which the last class counts what lies outside; and what the tree was
        made from. Warnings and stage times go into `outcome`.

    Raises:
        SlideError: The slide cannot be read, or so many tokens do not fit in memory.
    """
    laps = _Laps(outcome)
    outcome.warnings += opened.notes
    spec = region_spec(opened, options, options.resolution)
    read: Reader = opened.reader.read
    read_mask = opened.read_mask
    if beat is not None:
        read = _beating(read, opened.slide.path.stem, beat)
    # Edges, scores and tokens look at the same pixels: those of a small frame are decoded once.
    if options.patching == "apf" and spec.size_px <= _HELD_PX:
        read = held(read, spec.content_wh)
        read_mask = None if read_mask is None else held(read_mask, spec.content_wh)
        laps.ended("read")
    # The leaves.
    sums, basis = {}, TreeBasis(spec.blur)
    if options.patching == "uniform":
        check_room(opened.slide.path, (options.resolution // options.patch) ** 2, opened.classes, options)
        leaves = uniform_leaves(spec.size_px, spec.patch)
    elif options.split_on != "edges":
        assert spec.blur is not None and options.length is not None  # without it refused, see `BuildOptions`
        levels = score_levels(read, spec.size_px, spec.content_wh, spec.patch, spec.blur, options.split_on)
        leaves, basis = budget_tree_of(levels, spec.patch, options.length), replace(basis, scores=levels)
        laps.ended("scores")
    else:
        scan, basis = _find_edges(read, read_mask, spec)
        laps.ended("edges")
        sums, leaves = scan.squares(), tree_of_edges(basis, options)
        laps.ended("tree")
    check_room(opened.slide.path, len(leaves.size), opened.classes, options)
    # Their tokens.
    whole = assemble(leaves, [region_rows(sums, leaves, spec, (0, 0), read, read_mask)], spec)
    if options.resample != "mean":
        whole = replace(whole, tokens=interpolated(read, leaves, spec))
    laps.ended("tokens")
    return whole, basis


def _find_edges(read: Reader, read_mask: Reader | None, spec: RegionSpec) -> tuple[RegionScan, TreeBasis]:
    """The edges of a frame that is one region, and what else its scan left."""
    scan = scan_region(read, read_mask, spec, 0, 0)
    edges = scan.edges
    if spec.thresholds != "auto":
        lo, hi = spec.thresholds
    else:
        assert scan.hist is not None and scan.maxima is not None
        lo, hi = auto_thresholds(scan.hist, spec.auto_percent)
        edges = edges_of_maxima(scan.maxima, spec, 0, 0, lo, hi)
    if edges is None:  # its lower part has another contrast than its upper one, so what the scan kept is not enough
        edges = scan_region(read, None, replace(spec, thresholds=(lo, hi)), 0, 0).edges
        assert edges is not None
    counts = final_counts(edges, light([edges], spec.size_px)[0])
    return scan, TreeBasis(spec.blur, lo, hi, int(counts.sum(dtype=np.int64)), counts)


def tree_of_edges(basis: TreeBasis, options: BuildOptions) -> Leaves:
    """The leaves by the counts of edge pixels."""
    assert basis.counts is not None
    if options.split_value is not None:
        return threshold_tree(basis.counts, options.patch, options.split_value)
    assert options.length is not None  # one of the two is given, see `BuildOptions`
    return budget_tree(basis.counts, options.patch, options.length)


def check_room(slide: Path, tokens: int, classes: int, options: BuildOptions) -> None:
    """Raise SlideError if so many tokens do not fit in memory."""
    remedy = "raise --split-value, or use --length" if options.split_value is not None else "lower --length"
    if options.patching == "uniform":
        remedy = "lower --resolution, or use --patching apf"
    check_tokens_fit(slide, tokens, options.patch, classes, remedy)


def _beating(read: Reader, name: str, beat: Callable[[str], None]) -> Reader:
    """`read` that tells how much was read so far, at once and after every part."""
    pixels = 0

    def beating(x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[np.uint8]:
        nonlocal pixels
        part = read(x_px, y_px, w_px, h_px)
        pixels += w_px * h_px
        beat(f"{name}: {pixels / 1e6:,.0f} Mpx read")
        return part

    beat(f"{name}: 0 Mpx read")
    return beating


# ---------------------------------------------------------------------------------------------------------------------
# From leaves to the file


def finish(
    opened: OpenedSlide,
    whole: TokenSet,
    basis: TreeBasis,
    options: BuildOptions,
    outcome: SlideOutcome,
    damaged: Mapping[tuple[int, ...], str] | None = None,
) -> tuple[TokenSet, dict[str, Any]]:
    """Metadata, ceiling and warnings of a finished set of leaves, and the comparison habits `fit` and `packing`.

    Args:
        opened: The slide.
        whole: One row per leaf; with a field of view its last class counts what lies outside.
        basis: What the tree was made from.
        options: Parameters.
        outcome: Gets tokens, edge pixels, ceiling and warnings.
        damaged: (level, x, y, w, h) of the slide's tiles that could not be decoded, and why; None: as this process saw
            it. The cause goes into the log, not into the token file: the words are the decoder's.

    Raises:
        SlideError: Nothing of the slide could be decoded, or nothing of it lies inside its field of view.
    """
    slide = opened.slide
    damaged = damaged_tiles(slide) if damaged is None else damaged
    for level, size_wh in enumerate(slide.level_sizes_wh):
        if sum(tile[3] * tile[4] for tile in damaged if tile[0] == level) >= size_wh[0] * size_wh[1]:
            raise SlideError(f"{slide.path}: no tile of level {level} can be decoded")
    leaves = len(whole.tokens)
    if options.fov is not None:
        whole = seen_part(whole, slide.path, options.fov)
    meta = new_meta(
        slide=slide.path.stem,
        params=options.params(basis.blur, basis.lo, basis.hi),
        size0_wh=[int(v) for v in slide.size_wh],
        frame_px=opened.frame.size_px,
        mpp=slide.mpp,
        code_version=code_version(),
        budget_used=round(leaves / options.length, 6) if options.length else None,
        edge_pixels=basis.edge_pixels,
        damaged=[list(tile) for tile in sorted(damaged)],
        content_pixels=None if options.fov is None else int(whole.content_counts.sum(dtype=np.int64)),
    )
    outcome.damaged = [{"tile": list(tile), "cause": damaged[tile]} for tile in sorted(damaged)]
    token_set = whole
    if options.fit == "drop" and options.length is not None:
        token_set = drop_or_repeat(token_set, options.length, options.seed)
    if options.packing == "strip":
        token_set = replace(token_set, tokens=pack_strip(token_set.tokens))
    outcome.tokens, outcome.edge_pixels = len(token_set.tokens), basis.edge_pixels
    if whole.mask_counts is not None:
        meta["mask_pixels"] = whole.mask_counts.sum(axis=(0, 1, 2), dtype=np.int64).tolist()
        meta["ceiling"] = outcome.ceiling = rounded_ceiling(token_set, meta["mask_pixels"])
    outcome.warnings += slide.faults
    _warn(options, leaves, outcome, [(*tile, damaged[tile]) for tile in sorted(damaged)])
    return token_set, meta


def damaged_tiles(slide: Slide) -> dict[tuple[int, ...], str]:
    """(level, x, y, w, h) of tiles that an open slide could not decode so far, and why."""
    return {tuple(int(v) for v in tile): cause for tile, cause in sorted(slide.causes.items())}


def seen_part(whole: TokenSet, slide: Path, fov: Path) -> TokenSet:
    """`in_view`; raises SlideError where nothing is left."""
    seen = in_view(whole)
    if not seen.content_counts.any():
        raise SlideError(f"{slide}: its field of view in {fov} is 0 everywhere")
    return seen


def rounded_ceiling(token_set: TokenSet, mask_pixels: list[int]) -> list[float]:
    """The ceiling per class to six digits, as files and figures show it; `mask_pixels` as in `ceiling`."""
    assert token_set.mask_counts is not None
    return [round(d, 6) for d in ceiling(token_set.mask_counts, token_set.content_counts, mask_pixels)]


def _warn(options: BuildOptions, used: int, outcome: SlideOutcome, damaged: Sequence[Sequence[Any]]) -> None:
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


def write_result(
    task: SlideTask, token_set: TokenSet, meta: dict[str, Any], hashes: Hashes, outcome: SlideOutcome
) -> None:
    """Write the token file and say that it is done.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    laps = _Laps(outcome)
    whole = meta | {"source_sha256": hashes[0], "mask_sha256": hashes[1]}
    write_tokens(token_path(task.out, task.slide.stem), token_set, whole)
    laps.ended("write")
    outcome.status = "done"
