"""HRNet: maps of several resolutions side by side that exchange what they know.

Wang et al., Deep High-Resolution Representation Learning (TPAMI 2020), the classification form of section 4.4.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.conv import conv_norm


def conv_bn(a: int, b: int, kernel: int, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm and, with `act`, ReLU."""
    return nn.Sequential(*conv_norm(a, b, kernel, stride), *([nn.ReLU()] if act else []))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, channels, 3), conv_bn(channels, channels, 3, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return F.relu(x + self.body(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions that widen four times, and a shortcut."""

    def __init__(self, a: int, planes: int) -> None:
        super().__init__()
        out = 4 * planes
        self.body = nn.Sequential(conv_bn(a, planes, 1), conv_bn(planes, planes, 3), conv_bn(planes, out, 1, act=False))
        self.shortcut = conv_bn(a, out, 1, act=False) if a != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4 planes, H, W)."""
        return F.relu(self.shortcut(x) + self.body(x))


class FuseBlock(nn.Module):
    """Four basic blocks on every resolution, then every resolution is the sum of all, brought to its size."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(Basic(w) for _ in range(4))) for w in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._path(widths, j, i) for j in range(len(widths))) for i in range(len(widths))
        )

    @staticmethod
    def _path(widths: tuple[int, ...], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:  # coarser: 1x1, made larger in forward
            return conv_bn(widths[source], widths[target], 1, act=False)
        steps: list[nn.Module] = [conv_bn(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, conv_bn(widths[source], widths[target], 3, 2, act=False))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps finest first to the same."""
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        out = []
        for i, paths in enumerate(self.fuse):
            size = maps[i].shape[-2:]
            parts = []
            for j, path in enumerate(paths.children()):
                y = path(maps[j])
                parts.append(y if y.shape[-2:] == size else F.interpolate(y, size=size, mode="nearest"))
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            out.append(F.relu(total))
        return out


class HRNetBody(nn.Module):
    """HRNet without its linear head: (B, C_in, H, W) to (B, 2048, h, w).

    The finest branch has `width` channels (18 for W18), and each coarser branch twice as many. The stem is two strided
    3x3 convolutions.
    """

    def __init__(self, in_channels: int, width: int, stem: bool) -> None:
        super().__init__()
        self.stem = None
        if stem:
            self.stem = nn.Sequential(conv_bn(in_channels, 64, 3, 2), conv_bn(64, 64, 3, 2))
            in_channels = 64
        self.first = nn.Sequential(Bottleneck(in_channels, 64), *(Bottleneck(256, 64) for _ in range(3)))
        widths = tuple(width << i for i in range(4))
        self.starts = nn.ModuleList(
            [
                nn.ModuleList([conv_bn(256, widths[0], 3), conv_bn(256, widths[1], 3, 2)]),
                nn.ModuleList([conv_bn(widths[1], widths[2], 3, 2)]),
                nn.ModuleList([conv_bn(widths[2], widths[3], 3, 2)]),
            ]
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(FuseBlock(widths[: i + 2]) for _ in range(modules)) for i, modules in enumerate((1, 4, 3))
        )
        planes = (32, 64, 128, 256)
        self.widen = nn.ModuleList(Bottleneck(w, p) for w, p in zip(widths, planes, strict=True))
        self.join = nn.ModuleList(self._join(4 * planes[i], 4 * planes[i + 1]) for i in range(3))
        self.last = nn.Sequential(nn.Conv2d(1024, 2048, 1), nn.BatchNorm2d(2048), nn.ReLU())

    @staticmethod
    def _join(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, 2048, H / 32, W / 32), or H / 8 and W / 8 without a stem."""
        x = self.first(x if self.stem is None else self.stem(x))
        maps = [start(x) for start in self.starts[0].children()]
        for i, stage in enumerate(self.stages):
            if i:
                maps = [*maps, next(self.starts[i].children())(maps[-1])]
            for module in stage.children():
                maps = module(maps)
        y = self.widen[0](maps[0])
        for i, join in enumerate(self.join):
            y = self.widen[i + 1](maps[i + 1]) + join(y)
        return cast(Tensor, self.last(y))
