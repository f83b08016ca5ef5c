"""Segmentation loss on cells that equals the loss on the painted pixels; nothing is approximated.

Painted logits are constant over a cell. BCE and the three sums of Dice are linear in their target, so a sum over pixels
is a sum over cells weighted by counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_dice(
    logits: Tensor, mask_counts: Tensor, content_counts: Tensor, bce_weight: float = 0.5, eps: float = 1.0
) -> Tensor:
    """(B,) float32: w * BCE + (1 - w) * soft Dice loss of each image (APF has w = 0.5 and eps = 1 pixel).

    BCE is the mean over content pixels and classes. Soft Dice loss is 1 - (2 I + eps) / (P + T + eps), the mean over
    classes, with sums over the content pixels of the image. An image without content gives 0.

    Args:
        logits: (B, L, p, p, K).
        mask_counts: (B, L, p, p, K), foreground pixels of each cell and class.
        content_counts: (B, L, p, p), content pixels of each cell. Cells with 0 are ignored.
        bce_weight: w.
        eps: smoothing.
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
