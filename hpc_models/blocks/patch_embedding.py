"""Patches to token vectors."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Linear map of a flattened patch; the weight has the shape of the equivalent strided convolution."""

    def __init__(self, patch: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, p, p, C) to (B, L, D)."""
        flat = tokens.permute(0, 1, 4, 2, 3).flatten(2)
        return nn.functional.linear(flat, self.proj.weight.flatten(1), self.proj.bias)
