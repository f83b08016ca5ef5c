"""Segmentation loss on cells that equals the loss on the painted pixels; imports torch only, no reduction over ranks.

Per-cell logits painted to the frame are constant over a cell, so a sum over pixels is a sum over cells weighted by
counts: BCE is linear in its target, and the three sums of Dice are too. Nothing is approximated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_dice(
    logits: Tensor, mask_counts: Tensor, content_counts: Tensor, bce_weight: float = 0.5, eps: float = 1.0
) -> Tensor:
    """w * BCE + (1 - w) * soft Dice loss of each image (APF's 0.5 and 0.5, eps 1).

    BCE is the mean over content pixels and classes. Soft Dice loss is 1 - (2 I + eps) / (P + T + eps) per class with
    I, P, T summed over the content pixels of the image, averaged over classes.

    Args:
        logits: (B, L, p, p, K).
        mask_counts: (B, L, p, p, K), foreground pixels of each cell and class.
        content_counts: (B, L, p, p), pixels of each cell that are content. Cells with 0 are ignored whatever their
            logits are.
        bce_weight: w.
        eps: smoothing, in pixels.

    Returns:
        (B,) float32. An image without any content gives 0.
    """
    content = content_counts.to(torch.float32)[..., None]
    mask = mask_counts.to(torch.float32)
    z = torch.where(content > 0, logits.to(torch.float32), 0)
    over = (1, 2, 3)
    pixels = content.sum(dim=(1, 2, 3, 4))
    # Per pixel: softplus(z) - y z. Summed over a cell: content * softplus(z) - foreground * z.
    bce = (content * F.softplus(z) - mask * z).sum(dim=over).mean(dim=-1) / pixels.clamp(min=1)
    p = torch.sigmoid(z)
    intersection = (p * mask).sum(dim=over)
    predicted = (p * content).sum(dim=over)
    truth = mask.sum(dim=over)
    dice = 1 - ((2 * intersection + eps) / (predicted + truth + eps)).mean(dim=-1)
    return torch.where(pixels > 0, bce_weight * bce + (1 - bce_weight) * dice, 0)
