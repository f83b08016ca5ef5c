"""ResNet-50 with group norm and standardised weights (BiT), the front of hybrid transformers.

Kolesnikov et al., Big Transfer (ECCV 2020); TransUNet (Chen et al. 2021) takes its stages of 3, 4 and 9 units.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.conv import StdConv2d

GROUPS = 32


class Unit(nn.Module):
    """Bottleneck of 1x1, 3x3 (with the stride) and 1x1 convolutions, each with group norm, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        middle = out_channels // 4
        self.conv1 = StdConv2d(in_channels, middle, 1)
        self.norm1 = nn.GroupNorm(min(GROUPS, middle), middle, eps=1e-6)
        self.conv2 = StdConv2d(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(min(GROUPS, middle), middle, eps=1e-6)
        self.conv3 = StdConv2d(middle, out_channels, 1)
        self.norm3 = nn.GroupNorm(min(GROUPS, out_channels), out_channels, eps=1e-6)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = StdConv2d(in_channels, out_channels, 1, stride) if changes else None
        self.shortcut_norm = nn.GroupNorm(out_channels, out_channels) if changes else None  # a group per channel

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Stem and three stages: maps of 1/2, 1/4, 1/8 and 1/16 of the side, with 1, 4, 8 and 16 times `width` channels."""

    def __init__(self, in_channels: int = 3, width: int = 64, units: tuple[int, int, int] = (3, 4, 9)) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, width, 7, 2)
        self.norm = nn.GroupNorm(min(GROUPS, width), width, eps=1e-6)
        channels = [width, 4 * width, 8 * width, 16 * width]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Unit(channels[i] if j == 0 else channels[i + 1], channels[i + 1], 2 if i and j == 0 else 1)
                for j in range(count)
            )
            for i, count in enumerate(units)
        )
        self.widths = channels
        self.checkpoint = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, H, W), sides multiples of 16, to the four maps, finest first."""
        x = F.relu(self.norm(self.conv(x)))
        maps = [x]
        for i, stage in enumerate(self.stages):
            if i == 0:
                x = F.max_pool2d(x, 3, 2)  # one pixel short, as there is no padding: upstream fills its skip with zeros
            for unit in stage:  # type: ignore[attr-defined]
                x = recompute(self, unit, x)
            maps.append(x if i else F.pad(x, (0, 1, 0, 1)))
        return maps
