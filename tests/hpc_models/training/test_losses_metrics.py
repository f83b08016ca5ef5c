"""Cell losses and metrics equal those of the painted full-size picture."""

import math

import numpy as np
import pytest
import torch

from hpc_models.training.losses import bce_dice
from hpc_models.training.metrics import dice, dice_per_slide, dice_pooled
from tests.helpers.trees import painted, random_batch

CASES = [
    {"seed": 0, "size_px": 64, "p": 4, "classes": 1},
    {"seed": 1, "size_px": 64, "p": 4, "classes": 3, "content_wh": (64, 37)},
    {"seed": 2, "size_px": 64, "p": 8, "classes": 2, "content_wh": (19, 64)},
    {"seed": 3, "size_px": 32, "p": 2, "classes": 1, "content_wh": (1, 1)},
]


def case(spec):
    batch, mask, content = random_batch(**spec)
    generator = torch.Generator().manual_seed(spec["seed"])
    logits = 3 * torch.randn(batch["mask_counts"].shape, generator=generator)
    return batch, mask, content, logits


def pixel_loss(z, y, content):
    """Textbook loss on the (R, R, K) picture, float64, content pixels only."""
    z, y = z[content], y[content].astype(np.float64)
    p = 1 / (1 + np.exp(-z))
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    soft_dice = (2 * (p * y).sum(0) + 1) / (p.sum(0) + y.sum(0) + 1)
    return 0.5 * bce + 0.5 * (1 - soft_dice.mean())


@pytest.mark.parametrize("spec", CASES)
def test_loss_equals_the_loss_on_pixels(spec):
    batch, mask, content, logits = case(spec)
    loss = bce_dice(logits, batch["mask_counts"], batch["content_counts"])
    for b in range(2):
        z = painted(logits[b].numpy().astype(np.float64), batch, b, spec["size_px"])
        assert abs(float(loss[b]) - pixel_loss(z, mask[b], content)) < 1e-6


def test_loss_ignores_padding_whatever_stands_there():
    batch, _, _, logits = case(CASES[1])
    expected = bce_dice(logits, batch["mask_counts"], batch["content_counts"])
    logits = logits.masked_fill(batch["content_counts"][..., None] == 0, math.nan).requires_grad_()
    loss = bce_dice(logits, batch["mask_counts"], batch["content_counts"])
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[batch["content_counts"] == 0] == 0).all()


def test_loss_of_an_image_without_content_is_zero_and_finite():
    batch, _, _, logits = case(CASES[0])
    batch["mask_counts"][1] = 0
    batch["content_counts"][1] = 0
    loss = bce_dice(logits.requires_grad_(), batch["mask_counts"], batch["content_counts"])
    assert loss[1] == 0 and loss[0] > 0
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_perfect_and_worst_predictions():
    batch, _, _ = random_batch(4, 32, 2, images=1, split=1.1)  # leaves of 2 px: a cell is a pixel
    on = torch.where(batch["mask_counts"] > 0, 40.0, -40.0)
    assert bce_dice(on, batch["mask_counts"], batch["content_counts"])[0] < 1e-6
    assert bce_dice(-on, batch["mask_counts"], batch["content_counts"])[0] > 20


def test_dice_of_empty_cases_and_the_two_averages():
    counts = torch.tensor([[[0, 0, 0]], [[0, 5, 0]], [[0, 0, 5]], [[2, 4, 6]]])
    assert dice(counts)[:, 0].tolist() == [1.0, 0.0, 0.0, 0.4]
    assert dice_per_slide(counts).tolist() == [1.0, 0.0, 0.0, 0.4]
    assert dice_pooled(counts).item() == pytest.approx(2 * 2 / (9 + 11))
