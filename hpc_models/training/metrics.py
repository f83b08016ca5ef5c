"""Exact hard Dice in frame pixels from per-cell predictions.

Counts are integers, so sums over ranks and slides do not depend on their order. Sum counts, never Dice values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def counts_from_logits(logits: Tensor, mask_counts: Tensor, content_counts: Tensor) -> Tensor:
    """(B, K, 3) int64: intersection, prediction and truth in frame pixels.

    A cell is predicted foreground when its logit is above 0 (probability above 0.5).

    Args:
        logits: (B, L, p, p, K).
        mask_counts: (B, L, p, p, K) foreground pixels; int64 for cells of more than 2^24, beyond float32.
        content_counts: (B, L, p, p) content pixels; cells with 0 are ignored.
    """
    content = _whole(content_counts)[..., None]
    mask = _whole(mask_counts)
    on = (logits > 0) & (content > 0)
    over = (1, 2, 3)
    return torch.stack(
        (torch.where(on, mask, 0).sum(over), torch.where(on, content, 0).sum(over), mask.sum(over)), dim=-1
    )


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


def _whole(counts: Tensor) -> Tensor:
    return counts.round().to(torch.int64) if counts.is_floating_point() else counts.to(torch.int64)
