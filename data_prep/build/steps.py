"""One large slide as steps that any worker can do: begin, scan, edges, light, plan, tree, tokens, write.

A step is a pure function of the slide and of the results of earlier steps, which lie in the slide's scratch folder;
`data_prep.build.run` says which steps are possible. README.md of data_prep draws the way and says why each step is
exact. Must not import MPI or torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_prep.build.log import SlideOutcome, SlideTask, Step, StepResult, hash_inputs, stamp_of
from data_prep.build.options import BuildOptions
from data_prep.build.scratch import (
    BusyError,
    Scratch,
    ScratchError,
    discard,
    remove_scratch,
    scratch_key,
    scratch_sides,
)
from data_prep.build.slide import (
    OpenedSlide,
    TreeBasis,
    blur_of,
    build_one,
    check_inputs,
    check_room,
    code_version,
    damaged_tiles,
    finish,
    mask_files,
    note_failure,
    open_inputs,
    region_spec,
    valid_already,
    write_result,
)
from data_prep.edges.canny import MAX_MAGNITUDE, auto_thresholds
from data_prep.edges.hysteresis import final_counts, light, pack_edges, unpack_edges
from data_prep.edges.scan import Maxima, RegionSpec, edges_of_maxima, scan_region
from data_prep.slides.base import Slide, SlideError
from data_prep.tokens.cut import Rows, assemble, region_rows
from data_prep.tree.quadtree import Leaves, Nodes, candidates, first_nodes, pyramid, tree_of

_STEPS = 4  # goes up when steps leave other results behind, so that those of older code are not gone on with
_SLIDES_OPEN = 2


def run_step(step: Step, beat: Callable[[str], None] | None = None) -> StepResult:
    """Do one step; never raises for a bad slide.

    Args:
        step: The step.
        beat: Called with a note now and then while a frame of one region is built.
    """
    cv2.setNumThreads(1)  # one process per core: threads of OpenCV inside each would only fight
    started_s = time.perf_counter()
    result = StepResult(SlideOutcome(step.task.slide.stem, str(step.task.slide), "failed"), side_px=step.side_px)
    try:
        if step.kind == "begin":
            _begin(step, result, beat)
        else:
            if step.kind != "hash":  # results of different pixels must not mix
                _check_unchanged(step)
            _STEP_OF[step.kind](step, result)
            result.outcome.stage_seconds = {step.kind: round(time.perf_counter() - started_s, 4)}
    except Exception as error:
        note_failure(result.outcome, error)
        result.ended = True
        if isinstance(error, SlideError):  # trying again would not help; a full disk or a lost node is another matter
            if step.folder is not None:
                discard(step.folder)
        elif not result.outcome.traceback and step.folder is not None and step.folder.is_dir():
            result.outcome.reason += "; what was done is kept, the same command goes on from there"
    if not result.ended:
        result.outcome.status = "done"
    return result


def _check_unchanged(step: Step) -> None:
    """Raise SlideError where the slide or its mask is not what the slide's steps began with."""
    if _scratch(step).folder != step.folder:
        raise SlideError(f"{step.task.slide}: it or its mask changed while it was built: build again")
    if not step.folder.is_dir():
        raise SlideError(f"{step.folder}: was removed while {step.task.slide} was built: build again")


_last_tree: dict[tuple[Path, int], Leaves] = {}  # by folder and time


_open_slides: dict[tuple[Any, ...], OpenedSlide] = {}


def _opened_slide(step: Step) -> tuple[OpenedSlide, RegionSpec]:
    """The slide of a step and its regions; the last few slides stay open, since the next step is often of one of them.

    Raises:
        SlideError: The slide or its mask cannot be read, or they have different sizes.
        ValueError: There is no mask for it.
    """
    task = step.task
    mask_paths = mask_files(task.slide, task.options)
    key = (*((str(path), stamp_of(path)) for path in [task.slide, *mask_paths]), replace(task.options, tile_px=None))
    opened = _open_slides.pop(key, None)
    if opened is None:
        while len(_open_slides) >= _SLIDES_OPEN:
            _open_slides.pop(next(iter(_open_slides))).close()
        opened = open_inputs(task.slide, mask_paths, task.options)
    _open_slides[key] = opened
    return opened, region_spec(opened, task.options, step.side_px)


def _corner(step: Step, size_px: int) -> tuple[int, int]:
    row, column = divmod(step.index, size_px // step.side_px)
    return column * step.side_px, row * step.side_px


def _scratch(step: Step) -> Scratch:
    task = step.task
    return Scratch(task.out, task.slide.stem, scratch_key(_about(task), step.side_px))


def _about(task: SlideTask) -> dict[str, Any]:
    """What decides the results of a slide's steps. A slide or mask that changes makes them another slide's."""
    return {
        "params": task.options.params(blur_of(task.options), None, None),
        "files": [
            [str(path.resolve()), *stamp_of(path)] for path in [task.slide, *mask_files(task.slide, task.options)]
        ],
        "code": [code_version(), _STEPS],
        "strict": task.options.strict,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The steps


def _begin(step: Step, result: StepResult, beat: Callable[[str], None] | None) -> None:
    """Skip what is valid, build a small frame at once, or find the regions and what an earlier run left of them."""
    task = step.task
    if step.side_px >= task.options.resolution and not _begun_sides(task):
        result.outcome = build_one(task, beat)
        result.ended = True
        remove_scratch(task.out, task.slide.stem)
        return
    mask_paths = check_inputs(task)
    if (task.out / f"{task.slide.stem}.tokens.h5").exists() and not task.rebuild:
        result.hashes = hash_inputs(task, mask_paths, result.outcome)
        if valid_already(task, result.hashes, result.outcome):
            result.ended = True
            remove_scratch(task.out, task.slide.stem)
            return
    result.side_px = (_begun_sides(task) or [step.side_px])[-1]
    scratch = Scratch(task.out, task.slide.stem, scratch_key(_about(task), result.side_px))
    other = scratch.worked_on_by()
    if other is not None:
        raise BusyError(f"{task.slide}: {other} is building it into {task.out}; wait for it, or stop it")
    if remove_scratch(task.out, task.slide.stem, scratch.folder) and not result.outcome.reason:
        result.outcome.reason = "results of an interrupted build with other parameters or another slide were removed"
    scratch.begin()
    result.folder = scratch.folder
    side, size_px = result.side_px, task.options.resolution
    _, spec = _opened_slide(replace(step, side_px=side))
    columns, rows = (-(-end // side) for end in spec.end_wh)
    result.regions = tuple(y * (size_px // side) + x for y in range(rows) for x in range(columns))
    for kind, leaves_behind in (("scan", "scan"), ("edges", "edges"), ("plan", "plan"), ("tokens", "rows")):
        result.have[kind] = {i for i in result.regions if scratch.has(f"{leaves_behind}-{i}")}
    # A scan is of use only with its edges, or with the maxima that they come from.
    result.have["scan"] = {i for i in result.have["scan"] if scratch.has(f"maxima-{i}") or i in result.have["edges"]}
    if task.options.thresholds != "auto":  # scans find the edges too
        result.have["edges"] = set(result.regions)
    for kind in ("limits", "light", "tree"):
        result.have[kind] = {0} if scratch.has(kind) else set()


def _begun_sides(task: SlideTask) -> list[int]:
    """Sides of regions of an earlier build that may be gone on with: all, if no side is asked for."""
    if task.options.tile_px is not None or task.options.patching == "uniform":
        return []
    return scratch_sides(task.out, task.slide.stem, _about(task))


def _hash(step: Step, result: StepResult) -> None:
    result.hashes = hash_inputs(step.task, mask_files(step.task.slide, step.task.options), result.outcome)


def _scan(step: Step, result: StepResult) -> None:
    opened, spec = _opened_slide(step)
    scratch, i = _scratch(step), step.index
    decoded = getattr(opened.slide, "decoded_px", 0)
    scan = scan_region(
        opened.reader.read, opened.read_mask, spec, *_corner(step, spec.size_px), opened.reader.parts, opened.seen
    )
    if scan.maxima is not None:
        scratch.save(f"maxima-{i}", **vars(scan.maxima))
    if scan.hist is not None:
        opened.seen = scan.hist + opened.seen
    if scan.edges is not None:
        scratch.save(f"edges-{i}", **pack_edges(scan.edges))
    hist = {} if scan.hist is None else {"hist": scan.hist}
    scratch.save(f"scan-{i}", **_damaged(opened.slide), **scan.squares(), **hist)  # last: what is there is whole
    result.counted = {
        "blocks_total": scan.blocks_total,
        "blocks_skipped": scan.blocks_skipped,
        "decoded_px": getattr(opened.slide, "decoded_px", 0) - decoded,
    }


def _limits(step: Step, result: StepResult) -> None:  # noqa: ARG001
    """Thresholds of the whole frame."""
    scratch = _scratch(step)
    if step.task.options.thresholds != "auto":
        lo, hi = step.task.options.thresholds
    else:
        hist = np.zeros(MAX_MAGNITUDE + 1, np.int64)
        for i in step.regions:
            hist += scratch.load(f"scan-{i}", "hist")["hist"]
        lo, hi = auto_thresholds(hist, step.task.options.auto_percent)
    scratch.save("limits", lo_hi=np.array([lo, hi], np.int64))


def _edges(step: Step, result: StepResult) -> None:
    opened, spec = _opened_slide(step)
    scratch, i = _scratch(step), step.index
    lo, hi = scratch.load("limits")["lo_hi"].tolist()
    corner_xy = _corner(step, spec.size_px)
    try:
        maxima = Maxima(**scratch.load(f"maxima-{i}"))
    except ScratchError:
        if scratch.has(f"edges-{i}"):  # a build of the same slide on another host was here first
            return
        raise
    found = edges_of_maxima(maxima, spec, *corner_xy, lo, hi)
    if found is None:  # another contrast than elsewhere, so what the scan kept is not enough
        decoded = getattr(opened.slide, "decoded_px", 0)
        again = replace(spec, thresholds=(lo, hi), classes=0)
        found = scan_region(opened.reader.read, None, again, *corner_xy, opened.reader.parts).edges
        assert found is not None
        result.counted = {"decoded_px": getattr(opened.slide, "decoded_px", 0) - decoded, "regions_scanned_twice": 1}
    scratch.save(f"edges-{i}", **pack_edges(found))
    scratch.drop(f"maxima-{i}")


def _light(step: Step, result: StepResult) -> None:  # noqa: ARG001
    """Which components that cross borders of regions are edges."""
    scratch = _scratch(step)
    keys = ("rectangle", "sides", "n_open", "cell_xy")
    borders = [unpack_edges(scratch.load(f"edges-{i}", *keys), counts=False) for i in step.regions]
    lit = light(borders, step.task.options.resolution)
    start = np.cumsum([0, *map(len, lit)])
    scratch.save("light", regions=np.array(step.regions, np.int64), start=start, lit=np.concatenate([*lit, []]) != 0)


def _plan(step: Step, result: StepResult) -> None:  # noqa: ARG001
    """Edge pixels of a region, and the nodes of its subtree that the tree may split."""
    scratch, i, options = _scratch(step), step.index, step.task.options
    edges = unpack_edges(scratch.load(f"edges-{i}"))
    found = scratch.load("light")
    at = int(np.searchsorted(found["regions"], i))
    counts = final_counts(edges, found["lit"][found["start"][at] : found["start"][at + 1]])
    n = options.resolution // step.side_px
    row, column = divmod(i, n)
    nodes = candidates(counts, *_rule(options), origin=(n.bit_length() - 1, column, row))
    scratch.save(
        f"plan-{i}", total=counts.sum(dtype=np.int64), depth=nodes.depth, x=nodes.x, y=nodes.y, count=nodes.count
    )


def _rule(options: BuildOptions) -> tuple[int, int | None]:
    """(count to exceed, nodes to keep) of the tree that is asked for."""
    if options.split_value is not None:
        return options.split_value, None
    assert options.length is not None  # one of the two is given, see `BuildOptions`
    return 0, (options.length - 1) // 3


def _tree(step: Step, result: StepResult) -> None:  # noqa: ARG001
    """The leaves: candidates of the regions and of the few nodes above them, merged in the order of the rule."""
    scratch, options = _scratch(step), step.task.options
    n = options.resolution // step.side_px
    totals = np.zeros((n, n), np.int64)
    for i in step.regions:
        totals[divmod(i, n)] = int(scratch.load(f"plan-{i}", "total")["total"])
    above, keep = _rule(options)

    def parts() -> Iterator[Nodes]:
        for depth, level in enumerate(pyramid(totals)[:-1]):
            y, x = np.nonzero(level > above)
            yield Nodes(np.full(len(x), depth, np.int64), x, y, level[y, x].astype(np.int64))
        for i in step.regions:
            yield Nodes(**scratch.load(f"plan-{i}", "depth", "x", "y", "count"))

    internal = first_nodes(parts(), keep if keep is not None else options.resolution**2)
    leaves = tree_of(internal, (options.resolution // options.patch).bit_length() - 1, options.patch)
    check_room(step.task.slide, len(leaves), options.counted if options.masks else 0, options)
    scratch.save("tree", xy=leaves.xy, size=leaves.size, edge_pixels=totals.sum())


def _tokens(step: Step, result: StepResult) -> None:
    opened, spec = _opened_slide(step)
    scratch, i = _scratch(step), step.index
    decoded = getattr(opened.slide, "decoded_px", 0)
    rows = region_rows(
        scratch.load(f"scan-{i}", "sums", "mask_sums"),
        _leaves(scratch),
        spec,
        _corner(step, spec.size_px),
        opened.reader.read,
        opened.read_mask,
    )
    scratch.save(f"rows-{i}", **_damaged(opened.slide), **rows)
    result.counted = {"decoded_px": getattr(opened.slide, "decoded_px", 0) - decoded}


def _leaves(scratch: Scratch) -> Leaves:
    """The tree of a slide, read once per process however many regions there are."""
    key = (scratch.folder, scratch.stamp("tree"))
    if key not in _last_tree:
        _last_tree.clear()
        _last_tree[key] = Leaves(**scratch.load("tree", "xy", "size"))
    return _last_tree[key]


def _damaged(slide: Slide) -> dict[str, Any]:
    """Tiles that could not be decoded so far, (n, 5) int64, and why, (n,) text, as arrays to keep."""
    found = damaged_tiles(slide)
    tiles, causes = np.array(list(found), np.int64), np.array(list(found.values()), np.str_)
    return {"damaged": tiles.reshape(-1, 5), "causes": causes}


def _write(step: Step, result: StepResult) -> None:
    opened, spec = _opened_slide(step)
    scratch, options = _scratch(step), step.task.options
    tree = scratch.load("tree")
    lo, hi = scratch.load("limits")["lo_hi"].tolist()
    damaged: dict[tuple[int, ...], str] = {}

    def rows() -> Iterator[Rows]:
        for i in step.regions:
            part = scratch.load(f"rows-{i}")
            for found in (part, scratch.load(f"scan-{i}", "damaged", "causes")):
                tiles, causes = found.pop("damaged").tolist(), found.pop("causes").tolist()
                damaged.update(zip(map(tuple, tiles), causes, strict=True))
            yield part

    whole = assemble(Leaves(tree["xy"], tree["size"]), rows(), spec)
    basis = TreeBasis(spec.blur, lo, hi, int(tree["edge_pixels"]))
    result.outcome.warnings += opened.notes
    token_set, meta = finish(opened, whole, basis, options, result.outcome, damaged)
    assert step.hashes is not None
    write_result(step.task, token_set, meta, step.hashes, result.outcome)
    result.ended = True
    scratch.remove()


_STEP_OF = {
    "hash": _hash,
    "scan": _scan,
    "limits": _limits,
    "edges": _edges,
    "light": _light,
    "plan": _plan,
    "tree": _tree,
    "tokens": _tokens,
    "write": _write,
}
