"""Computes what `python -m data_prep inspect` draws of one slide; `figure` draws it.

Pictures are reduced to at most 2048 x 2048. Leaves, tokens and ceiling are those of a real build.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.build.leaf_plan import cut_leaves, plan_leaves
from data_prep.build.options import BuildOptions
from data_prep.build.outcome import Outcome
from data_prep.build.slide import mask_files, mask_of, mask_reader, rounded_ceiling, seen_part
from data_prep.edges.canny import edge_map
from data_prep.frame import Frame, FrameReader, MaskReader, make_frame
from data_prep.slides.open import open_slide
from data_prep.tokens.token_set import TokenSet, rebuild
from data_prep.tree.split_scores import content_pixels

SHOWN_PX = 2048
_WHOLE_EDGES_PX = 4096  # up to here the edge map is drawn itself, above its density per smallest leaf
_DEFAULT_PX = 4096


@dataclass(frozen=True)
class Look:
    """What there is to draw of one slide.

    Attributes:
        size0_wh: Level-0 size in pixels.
        mpp: um per level-0 pixel, or None.
        found: `blur`, `lo`, `hi`, `edge_pixels` as used.
        shown_px: D, side of the pictures below; R / D is a power of two, or 1.
        content_wh: Part of the shown frame that the slide covers.
        rgb: (D, D, 3) uint8, the frame.
        edges: (D, D) or less, float32 in [0, 1], edges or their density; with variance or entropy the score per pixel
            of each smallest leaf, relative to the largest; None for uniform patching.
        seen: (D, D, 3) uint8, tokens painted back.
        truth: (D, D) uint8 class ids, or None.
        best: (D, D) uint8 class ids of the majority of each cell, or None.
        ceiling: Largest Dice per class that a prediction per cell can reach, in frame pixels, or None.
        outside: (D, D) bool, outside the field of view, or None without a mask.
    """

    name: str
    size0_wh: tuple[int, int]
    mpp: float | None
    options: BuildOptions
    found: dict[str, Any]
    shown_px: int
    content_wh: tuple[int, int]
    rgb: NDArray[np.uint8]
    edges: NDArray[np.float32] | None
    seen: NDArray[np.uint8]
    token_set: TokenSet
    truth: NDArray[np.uint8] | None
    best: NDArray[np.uint8] | None
    ceiling: list[float] | None
    outside: NDArray[np.bool_] | None


def default_resolution(slide_path: Path, patch: int) -> int:
    """The largest p * 2^k that the slide fills, from p to 4096, for a first look. Raises as `open_slide`."""
    with open_slide(slide_path) as slide:
        longest_px = min(max(slide.size_wh), _DEFAULT_PX)
    size_px = max(1, patch)
    while 2 * size_px <= longest_px:
        size_px *= 2
    return size_px


def look_at(slide_path: Path, options: BuildOptions) -> Look:
    """Plan, cut and reduce one slide for showing.

    Raises:
        SlideError: The slide or its mask cannot be read.
        ValueError: There is no mask, or no field of view, for it.
    """
    with ExitStack() as opened:
        # Open, plan and cut as a build does.
        slide = opened.enter_context(open_slide(slide_path))
        frame = make_frame(slide.size_wh, options.resolution, options.aspect)
        reader = FrameReader(slide, frame)
        shown_px = min(options.resolution, SHOWN_PX)
        small = _reduced(frame, slide.size_wh, shown_px)
        mask = None
        if options.masks is not None:
            mask = opened.enter_context(mask_of(slide, mask_files(slide_path, options), options))
        leaves, found = plan_leaves(reader.read, frame, options, Outcome(slide.name, str(slide_path), "done"))
        read_mask = mask_reader(mask, frame, options) if mask else None
        token_set = cut_leaves(reader.read, leaves, frame, options, read_mask)
        if mask is not None and options.fov is not None:
            token_set = seen_part(token_set, slide_path, options.fov)

        # Reduce everything to the size that is shown.
        rgb = FrameReader(slide, small).read(0, 0, shown_px, shown_px)
        edges = None
        if found["counts"] is not None:
            whole = reader.read(0, 0, frame.size_px, frame.size_px) if frame.size_px <= _WHOLE_EDGES_PX else None
            edges = _edges_to_show(whole, found, options.patch, shown_px)
        elif found["scores"] is not None:
            edges = _scores_to_show(found["scores"], frame, shown_px, options.split_on)
        truth = best = ceiling = outside = None
        if mask is not None and token_set.mask_counts is not None:
            truth = MaskReader(mask, small).read(0, 0, shown_px, shown_px)
            outside = truth > options.classes
            truth[outside] = 0
            best = _majority(token_set, shown_px)
            pixels = token_set.mask_counts.sum(axis=(0, 1, 2), dtype=np.int64).tolist()
            ceiling = rounded_ceiling(token_set, pixels)
        return Look(
            name=slide.name,
            size0_wh=slide.size_wh,
            mpp=slide.mpp,
            options=options,
            found=found,
            shown_px=shown_px,
            content_wh=small.content_wh,
            rgb=rgb,
            edges=edges,
            token_set=token_set,
            seen=paint(token_set.tokens, token_set, shown_px),
            truth=truth,
            best=best,
            ceiling=ceiling,
            outside=outside,
        )


def _reduced(frame: Frame, size0_wh: tuple[int, int], shown_px: int) -> Frame:
    """The same frame in fewer pixels; the slide keeps its place in it."""
    scale_x, scale_y = (scale * shown_px / frame.size_px for scale in frame.scale_xy)
    content_wh = (max(1, int(size0_wh[0] * scale_x)), max(1, int(size0_wh[1] * scale_y)))
    return Frame(shown_px, (scale_x, scale_y), content_wh, frame.aspect)


def _edges_to_show(
    whole: NDArray[np.uint8] | None, found: dict[str, Any], patch: int, shown_px: int
) -> NDArray[np.float32]:
    edges: NDArray[np.float32]
    if whole is None:
        counts = found["counts"]
        some = max(1, len(counts) // shown_px)
        starts = np.arange(0, len(counts), some)
        counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
        cell_px = some * patch
        edges = (counts * (2.0 / (cell_px * cell_px))).astype(np.float32)
        return np.minimum(np.float32(1), edges)
    edges = edge_map(whole, found["lo"], found["hi"], found["blur"]).astype(np.float32)
    if len(edges) > shown_px:  # area mean would fade thin lines, so lift it
        edges = 2 * np.asarray(cv2.resize(edges, (shown_px, shown_px), interpolation=cv2.INTER_AREA), np.float32)
    return np.minimum(np.float32(1), edges)


def _scores_to_show(levels: list[NDArray[np.int64]], frame: Frame, shown_px: int, split_on: str) -> NDArray[np.float32]:
    """Scores per pixel of the smallest leaves, or of nodes as small as a shown pixel; for variance their root."""
    depth = min(len(levels) - 1, shown_px.bit_length() - 1)
    each = levels[depth] / np.maximum(1, content_pixels(depth, frame.size_px, frame.content_wh))
    each = np.sqrt(each) if split_on == "variance" else each
    return np.asarray(each / max(1e-9, float(each.max())), np.float32)


def _majority(token_set: TokenSet, shown_px: int) -> NDArray[np.uint8]:
    """Class ids (D, D): a cell takes the class that fills more than half of its content, else 0."""
    assert token_set.mask_counts is not None
    masks = token_set.mask_counts.astype(np.int64)
    on = 2 * masks > token_set.content_counts[..., None]
    ids = np.where(on.any(axis=-1), on.argmax(axis=-1) + 1, 0).astype(np.uint8)
    shown = np.zeros((shown_px, shown_px), np.uint8)
    for class_id in range(1, masks.shape[-1] + 1):
        shown[paint((ids == class_id).astype(np.uint8) * 255, token_set, shown_px) > 127] = class_id
    return shown


def paint(values: NDArray[np.uint8], token_set: TokenSet, shown_px: int) -> NDArray[np.uint8]:
    """Paint per-cell values of leaves, (N, p, p) or (N, p, p, C) uint8, into a picture of side D = `shown_px`.

    R / D is a power of two, or 1. Cells smaller than a pixel are averaged, and so are leaves.
    """
    factor = token_set.size_px // shown_px
    picture = np.zeros((shown_px, shown_px, *values.shape[3:]), np.uint8)
    patch = values.shape[1]
    for side in np.unique(token_set.leaf_size).tolist():
        if side < factor:
            continue
        rows = np.flatnonzero(token_set.leaf_size == side)
        cells = min(patch, side // factor)  # cells per side that can be shown
        step = patch // cells
        blocks = values[rows].reshape(len(rows), cells, step, cells, step, *values.shape[3:])
        few = np.round(blocks.mean(axis=(2, 4))).astype(np.uint8) if step > 1 else blocks[:, :, 0, :, 0]
        xy, sides = token_set.leaf_xy[rows] // factor, token_set.leaf_size[rows] // factor
        where = rebuild(np.ones((len(rows), 1, 1), np.bool_), xy, sides, shown_px)
        picture[where] = rebuild(few, xy, sides, shown_px)[where]
    _paint_small(picture, values, token_set, factor)
    return picture


def _paint_small(picture: NDArray[np.uint8], values: NDArray[np.uint8], token_set: TokenSet, factor: int) -> None:
    """Fill each pixel that holds several whole leaves with their mean."""
    rows = np.flatnonzero(token_set.leaf_size < factor)
    if not len(rows):
        return
    share = (token_set.leaf_size[rows] / factor) ** 2
    means = values[rows].mean(axis=(1, 2)).reshape(len(rows), -1) * share[:, None]
    pixel = token_set.leaf_xy[rows].astype(np.int64) // factor
    flat, which = np.unique(pixel[:, 1] * len(picture) + pixel[:, 0], return_inverse=True)
    sums = np.stack([np.bincount(which, plane) for plane in means.T], 1)
    picture.reshape(-1, *picture.shape[2:])[flat] = np.round(sums).reshape(-1, *picture.shape[2:])
