"""Exact pixel Dice from cells, and the best a tree allows. NumPy only; needs counts, no pixels and no model.

Inside a cell every pixel gets the same prediction, so intersection and sizes are sums of the cells' counts: the Dice
of the painted full-size mask, without painting it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def pixel_dice_from_cells(
    pred: NDArray[np.bool_], mask_counts: NDArray[Any], content_counts: NDArray[Any]
) -> tuple[Counts, Counts, Counts]:
    """Intersection, prediction and truth in frame pixels, per class.

    Args:
        pred: (N, p, p, K) bool, the cell is predicted to be class k + 1.
        mask_counts: (N, p, p, K) content pixels of that class in the cell.
        content_counts: (N, p, p) content pixels of the cell; predictions on padding do not count.

    Returns:
        I, P, T, each (K,) int64; Dice is 2 I / (P + T), see `dice`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if pred.shape != mask_counts.shape or pred.shape[:-1] != content_counts.shape:
        raise ValueError(
            f"shapes differ: prediction {pred.shape}, mask {mask_counts.shape}, content {content_counts.shape}"
        )
    cells = (0, 1, 2)
    on = pred.astype(bool)
    inter = np.where(on, mask_counts, 0).sum(axis=cells, dtype=np.int64)
    size = np.where(on, content_counts[..., None], 0).sum(axis=cells, dtype=np.int64)
    return inter, size, mask_counts.sum(axis=cells, dtype=np.int64)


def dice(inter: Counts, size: Counts, truth: Counts) -> NDArray[np.float64]:
    """2 I / (P + T) per class; 1.0 where prediction and truth are both empty (nothing to find, nothing claimed)."""
    total = size + truth
    return np.where(total > 0, 2.0 * inter / np.maximum(total, 1), 1.0)


def ceiling(
    mask_counts: NDArray[Any], content_counts: NDArray[Any], mask_pixels: Sequence[int] | None = None
) -> list[float]:
    """Largest Dice per class that any on/off prediction of the cells can reach: no model can pass it.

    A set of cells with Dice D is improved by a cell with m of c pixels in the class iff 2 m > D c, so the best set is
    {2 m > D c} at its own D. Starting from the majority (2 m > c) and repeating, D only grows, and stops at the best
    (Dinkelbach's method for ratios), after a handful of rounds.

    Args:
        mask_counts: (N, p, p, K) content pixels of class k + 1 in the cell.
        content_counts: (N, p, p) content pixels of the cell.
        mask_pixels: K, content pixels of the class in the whole frame, where tokens were dropped; None: those in the
            cells.

    Returns:
        K numbers between 0 and 1.
    """
    mask, content = mask_counts.astype(np.int64), content_counts.astype(np.int64)[..., None]
    best, on = np.full(mask.shape[-1], -1.0), 2 * mask > content
    while True:
        inter, size, truth = pixel_dice_from_cells(on, mask_counts, content_counts)
        reached = dice(inter, size, truth if mask_pixels is None else np.asarray(mask_pixels, np.int64))
        if (reached <= best).all():
            return [float(d) for d in best]
        best = np.maximum(reached, best)
        on = 2 * mask > best * content


def boundary_leaves(mask_counts: NDArray[Any], content_counts: NDArray[Any]) -> NDArray[np.bool_]:
    """Which leaves hold pixels of more than one class, with what is in none as a class of its own.

    A boundary of the mask runs through them. Of uniform patches of side p they are roughly what a tree with smallest
    patch p must keep to show the mask without a loss, so that the rest is about what it could save at most: only where
    boundaries happen to lie on a coarser grid of cells do larger leaves show them as well.

    Args:
        mask_counts: (N, p, p, K) content pixels of class k + 1 in the cell.
        content_counts: (N, p, p) content pixels of the cell.

    Returns:
        (N,) bool.
    """
    held = mask_counts.sum(axis=(1, 2), dtype=np.int64)
    rest = content_counts.sum(axis=(1, 2), dtype=np.int64) - held.sum(axis=1)
    several: NDArray[np.bool_] = (held > 0).sum(axis=1) + (rest > 0) > 1
    return several
