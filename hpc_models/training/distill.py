"""Losses in which a model learns from itself: from its average, and from itself on larger pictures; torch only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def teacher_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the class probabilities of the averaged model as targets, of each image.

    HIRI-ViT (section 4.5) trains the student on labels and on these; the weight of the sum is not known, ours is a
    setting.

    Args:
        logits: (B, classes) of the student.
        teacher_logits: (B, classes) of the average of the student; no gradient flows there.

    Returns:
        (B,).
    """
    return F.cross_entropy(logits, teacher_logits.detach().softmax(dim=-1), reduction="none")


def scale_loss(cls: Tensor, larger_cls: Tensor) -> Tensor:
    """Smooth L1 between the class token at one size and the normed class token at the next larger one.

    Tian et al., ResFormer (CVPR 2023): the larger size teaches, without gradient, through a layer norm that has no
    weights.

    Args:
        cls: (B, D) at this size.
        larger_cls: (B, D) at the next larger size.

    Returns:
        (B,), the mean over channels.
    """
    target = F.layer_norm(larger_cls.detach(), larger_cls.shape[-1:])
    return F.smooth_l1_loss(cls, target, reduction="none").mean(dim=-1)
