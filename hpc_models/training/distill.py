"""Losses in which a model learns from itself: from its average, and from itself on larger pictures."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def teacher_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(B,) cross-entropy of logits (B, classes) with the averaged model's class probabilities as targets.

    HIRI-ViT (section 4.5) trains the student on labels and on these targets. No gradient flows to the teacher.
    """
    return F.cross_entropy(logits, teacher_logits.detach().softmax(dim=-1), reduction="none")


def scale_loss(cls: Tensor, larger_cls: Tensor) -> Tensor:
    """(B,) smooth L1 between the class token (B, D) at one size and the normed token at the next larger size.

    Tian et al., ResFormer (CVPR 2023): the larger size teaches, without gradient, through a layer norm without weights.
    """
    target = F.layer_norm(larger_cls.detach(), larger_cls.shape[-1:])
    return F.smooth_l1_loss(cls, target, reduction="none").mean(dim=-1)
