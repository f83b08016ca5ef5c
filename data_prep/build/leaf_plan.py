"""The leaves of a frame that is built in memory, by the rule asked for, and their tokens; must not import MPI or torch.

Large frames take the same rule region by region, see `big_slide`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data_prep.build.options import BuildOptions
from data_prep.build.outcome import Outcome, Stage
from data_prep.edges.canny import blur_for, count_edges
from data_prep.frame import Frame
from data_prep.tokens.token_set import Reader, TokenSet, cut
from data_prep.tree.quadtree import Leaves, budget_tree, budget_tree_of, threshold_tree
from data_prep.tree.split_scores import score_levels
from data_prep.tree.uniform import uniform_leaves

TILE_PX = 2048  # read at once where a frame is built in memory


def blur_of(options: BuildOptions) -> int | None:
    """Side of the Gaussian that a build uses; None for uniform patching."""
    if options.patching == "uniform":
        return None
    return options.blur if options.blur is not None else blur_for(options.resolution)


def plan_leaves(read: Reader, frame: Frame, options: BuildOptions, outcome: Outcome) -> tuple[Leaves, dict[str, Any]]:
    """The leaves of the frame by the rule asked for.

    Returns:
        Leaves in Morton order, and `blur`, `lo`, `hi`, `edge_pixels` as used, the edge `counts` (R/p, R/p), and the
        `scores` of `criteria` for splits by other things than edges. What a rule does not use is None.
    """
    found: dict[str, Any] = dict.fromkeys(("blur", "lo", "hi", "edge_pixels", "counts", "scores"))
    blur = blur_of(options)
    if blur is None:
        return uniform_leaves(frame.size_px, options.patch), found
    found["blur"] = blur
    if options.split_on != "edges":
        with Stage(outcome, "scores"):
            levels = score_levels(read, frame.size_px, frame.content_wh, options.patch, blur, options.split_on)
        with Stage(outcome, "tree"):
            assert options.length is not None  # without it refused, see `BuildOptions`
            return budget_tree_of(levels, options.patch, options.length), found | {"scores": levels}
    with Stage(outcome, "edges"):
        edges = count_edges(
            read,
            frame.size_px,
            frame.content_wh,
            options.patch,
            blur,
            options.thresholds,
            tile_px=TILE_PX,
            percent=options.auto_percent,
        )
    with Stage(outcome, "tree"):
        if options.split_value is not None:
            leaves = threshold_tree(edges.counts, options.patch, options.split_value)
        else:
            assert options.length is not None  # one of the two is given, see `BuildOptions`
            leaves = budget_tree(edges.counts, options.patch, options.length)
    found |= {"lo": int(edges.lo), "hi": int(edges.hi), "edge_pixels": int(edges.edge_pixels)}
    return leaves, found | {"counts": edges.counts}


def cut_leaves(read: Reader, leaves: Leaves, frame: Frame, options: BuildOptions, read_mask: Reader | None) -> TokenSet:
    """The leaves' tokens and counts; with a field of view the last class counts what is outside."""
    whole = cut(
        read,
        leaves,
        options.patch,
        frame.size_px,
        frame.content_wh,
        read_mask=read_mask,
        classes=options.counted,
        tile_px=TILE_PX,
    )
    return whole if options.resample == "mean" else replace(whole, tokens=_interpolated(read, leaves, options.patch))


def _interpolated(read: Reader, leaves: Leaves, patch: int) -> NDArray[np.uint8]:
    """(N, p, p, 3) uint8: every leaf shrunk by OpenCV's bicubic interpolation, which does not look over its border."""
    squares = zip(leaves.xy.tolist(), leaves.size.tolist(), strict=True)
    return np.stack(
        [
            np.asarray(cv2.resize(read(x, y, side, side), (patch, patch), interpolation=cv2.INTER_CUBIC), np.uint8)
            for (x, y), side in squares
        ]
    )
