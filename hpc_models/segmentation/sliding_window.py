"""Large pictures through a network of small ones: overlapping windows, averaged."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover [0, side): evenly spread, no step larger than window * (1 - overlap)."""
    if window >= side:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((side - window) / stride) + 1
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


def _profile(side: int, weighting: str) -> Tensor:
    if weighting == "constant":
        return torch.ones(side)
    x = (torch.arange(side) + 0.5) / side - 0.5
    return torch.exp(-0.5 * (x / 0.125) ** 2).clamp(min=1e-3)


@torch.no_grad()
def sliding_window(
    model: nn.Module,
    image: Tensor,
    window: int,
    overlap: float = 0.25,
    *,
    batch: int = 4,
    weighting: str = "gaussian",
    wanted: Tensor | None = None,
) -> Tensor:
    """Logits of a whole image from overlapping windows, averaged by weight.

    Args:
        model: maps (N, C, h, w) to (N, K, h, w) logits.
        image: (C, H, W), any size; a side shorter than the window is taken whole.
        window: side of a window in pixels.
        overlap: share of the window that neighbours have in common, in [0, 1).
        batch: windows per forward pass.
        weighting: "constant", or "gaussian" with sigma = window / 8: a window's border sees least and counts least.
        wanted: (H, W) bool, pixels whose logits matter. Windows without any are left out; None: all matter.

    Returns:
        (K, H, W) float32 on the device of the image; 0 where no window was.

    Raises:
        ValueError: overlap or weighting out of range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    if weighting not in ("gaussian", "constant"):
        raise ValueError(f"weighting must be gaussian or constant, got {weighting!r}")
    # Where the windows lie, and how much each of their pixels counts.
    h, w = image.shape[-2:]
    wh, ww = min(window, h), min(window, w)
    if (wh, ww) == (h, w):
        return cast(Tensor, model(image[None])[0].float())
    corners = [(y, x) for y in _starts(h, wh, overlap) for x in _starts(w, ww, overlap)]
    if wanted is not None:
        corners = [(y, x) for y, x in corners if wanted[y : y + wh, x : x + ww].any()] or corners[:1]
    weight = (_profile(wh, weighting)[:, None] * _profile(ww, weighting)).to(image.device)
    # Sum logits and weights, batch by batch.
    total: Tensor | None = None
    norm = torch.zeros(h, w, device=image.device)
    for i in range(0, len(corners), batch):
        part = corners[i : i + batch]
        logits = model(torch.stack([image[:, y : y + wh, x : x + ww] for y, x in part])).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], h, w)
        for (y, x), z in zip(part, logits, strict=True):
            total[:, y : y + wh, x : x + ww] += z * weight
            norm[y : y + wh, x : x + ww] += weight
    assert total is not None
    return total / norm.clamp(min=torch.finfo(norm.dtype).tiny)
