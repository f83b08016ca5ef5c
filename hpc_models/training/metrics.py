"""Exact hard Dice from counts of frame pixels, accuracy and AUC.

Counts are integers, so sums over ranks and slides do not depend on their order. Sum counts, never Dice values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dice(counts: Tensor) -> Tensor:
    """2 I / (P + T) for counts (..., 3), float64; 1.0 where prediction and truth are both empty."""
    i, p, t = counts.to(torch.float64).unbind(-1)
    return torch.where(p + t > 0, 2 * i / (p + t).clamp(min=1), 1.0)


def dice_per_slide(counts: Tensor) -> Tensor:
    """Mean over classes of each slide's Dice: (N, K, 3) counts to (N,) float64; their mean is the headline."""
    return dice(counts).mean(dim=-1)


def dice_pooled(counts: Tensor) -> Tensor:
    """Dice of all slides seen as one picture, mean over classes: (N, K, 3) to a float64 scalar."""
    return dice(counts.sum(dim=0)).mean()


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows of (N, classes) whose largest entry is at the label (N,)."""
    return float((probabilities.argmax(dim=-1) == labels).double().mean())


def auc(probabilities: Tensor, labels: Tensor) -> float | None:
    """Area under the ROC curve, exact: the chance that a positive scores above a negative, ties counting one half.

    Two classes are scored by class 1. More give the mean over classes of each against the rest. A class without
    positives or negatives is left out; None: all are.

    Args:
        probabilities: (N, classes).
        labels: (N,) int64.
    """
    classes = probabilities.shape[-1]
    areas = []
    for c in [1] if classes == 2 else range(classes):
        positive = labels == c
        p, n = int(positive.sum()), int((~positive).sum())
        if p and n:
            _, group, sizes = torch.unique(probabilities[:, c].double(), return_inverse=True, return_counts=True)
            ends = sizes.cumsum(0)
            midrank = ends.double() - (sizes.double() - 1) / 2  # ranks from 1; equal scores share their mean rank
            areas.append((float(midrank[group][positive].sum()) - p * (p + 1) / 2) / (p * n))
    return sum(areas) / len(areas) if areas else None
