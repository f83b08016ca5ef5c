"""UNETR's convolutional decoder for any power-of-two patch size, built from residual blocks.

MONAI's UNETR has P = 16 and four doublings. With k = log2(P) doublings the same rule gives every P: skip i of k - 1
rises from the token grid by k - i doublings to width f * 2^i. The image itself is the finest skip (Hatamizadeh et al.
2022, figure 1).
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import maybe_recompute
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape

SLOPE = 0.01


class ResBlock(nn.Module):
    """Two 3x3 convolutions with instance norm and a shortcut, 1x1 where the width changes (nnU-Net's residual unit)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm2d(out_channels)
        self.norm2 = nn.InstanceNorm2d(out_channels)
        changes = in_channels != out_channels
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1, bias=False) if changes else None
        self.norm3 = nn.InstanceNorm2d(out_channels) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        y = self.norm2(self.conv2(y))
        if self.conv3 is not None and self.norm3 is not None:
            x = self.norm3(self.conv3(x))
        return F.leaky_relu(y + x, SLOPE)


def double(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """2x2 transposed convolution with stride 2, no bias: doubles the side."""
    return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)


class ProjectUp(nn.Module):
    """Raise a tapped hidden state from the token grid to the height of its skip: one doubling, then `steps` more."""

    def __init__(self, width: int, out_channels: int, steps: int) -> None:
        super().__init__()
        self.first = double(width, out_channels)
        self.steps = nn.ModuleList(
            nn.Sequential(double(out_channels, out_channels), ResBlock(out_channels, out_channels))
            for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, g, g) to (B, C, g * 2^(1 + steps), ...)."""
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x


class UpBlock(nn.Module):
    """Double the side, join the skip, mix."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = double(in_channels, out_channels)
        self.mix = ResBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, C_in, h, w) and (B, C_out, 2h, 2w) to (B, C_out, 2h, 2w)."""
        return cast(Tensor, self.mix(torch.cat((self.up(x), skip), dim=1)))


class ConvDecoder(nn.Module):
    """Token grid and its skips to logits at `patch` times the grid's side; `feature_size` channels at the finest."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        k, f = data.patch.bit_length() - 1, settings.feature_size
        self.image = ResBlock(data.in_channels, f)
        self.projections = nn.ModuleList(ProjectUp(settings.width, f << i, k - 1 - i) for i in range(1, k))
        channels = [settings.width, *(f << i for i in range(k - 1, -1, -1))]
        self.ups = nn.ModuleList(UpBlock(a, b) for a, b in pairwise(channels))
        self.out = nn.Conv2d(f, data.classes, 1)
        self.checkpoint = False

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return [self.image, *self.projections, *self.ups]

    def forward(self, image: Tensor, taps: list[Tensor], last: Tensor) -> Tensor:
        """Decode to (B, K, g*P, g*P) logits.

        Args:
            image: (B, C, g*P, g*P), the picture of the tokens.
            taps: k - 1 hidden states (B, D, g, g), finest skip first.
            last: (B, D, g, g), normed output of the encoder.
        """
        skips = [maybe_recompute(self, self.image, image)]
        skips += [maybe_recompute(self, project, tap) for project, tap in zip(self.projections, taps, strict=True)]
        x = last
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = maybe_recompute(self, up, x, skip)
        return cast(Tensor, self.out(x))
