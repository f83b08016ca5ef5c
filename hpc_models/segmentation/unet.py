"""U-Net on crops: each token is a tile.

This is the usual rival. With widths (64, 128, 256, 512, 1024) and norm "none" it is the U-Net of Ronneberger et al.
(2015) with padded convolutions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.conv import conv3x3, norm2d
from hpc_models.blocks.init import set_prior
from hpc_models.blocks.network import Network
from hpc_models.segmentation.picture_model import on_tiles, pad_to
from hpc_models.segmentation.settings import UNetSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by norm and ReLU. They have a bias only without a norm."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, standardise: bool = False) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, 1, standardise, bias=norm == "none")
        self.norm1 = norm2d(norm, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, 1, standardise, bias=norm == "none")
        self.norm2 = norm2d(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W)."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Up(nn.Module):
    """2x2 transposed convolution, joined with the skip, double convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, standardise: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels, norm, standardise)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, C_in, h, w) and (N, C_out, 2h, 2w) to (N, C_out, 2h, 2w)."""
        return cast(Tensor, self.conv(torch.cat((skip, self.up(x)), dim=1)))


class UNet(Network):
    """U-Net on crops; with norm "batch", statistics depend on which crops share a rank."""

    def __init__(self, settings: UNetSettings, data: DataShape) -> None:
        super().__init__(settings)
        widths, norm, standardise = settings.widths, settings.norm, settings.standardise
        channels = (data.in_channels, *widths)
        self.downs = nn.ModuleList(DoubleConv(a, b, norm, standardise) for a, b in pairwise(channels))
        self.ups = nn.ModuleList(Up(a, b, norm, standardise) for a, b in pairwise(reversed(widths)))
        self.out = nn.Conv2d(widths[0], data.classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.out:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        set_prior(self.out.bias, settings.prior)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return [*self.downs, *self.ups]

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Logits of every cell, (B, L, p, p, K), with each token as an image of its own.

        A tensor goes to `forward_image`, so that wrappers, which see only `forward`, serve both.
        """
        if isinstance(batch, Tensor):
            return self.forward_image(batch)
        return on_tiles(self, batch)

    def forward_image(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K, H, W) logits; any size."""
        h, w = image.shape[-2:]
        multiple = 1 << (len(self.downs) - 1)
        x = pad_to(self.centred(image), multiple)
        skips = []
        for i, down in enumerate(self.downs):
            x = recompute(self, down, x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, skip in zip(self.ups, reversed(skips[:-1]), strict=True):
            x = recompute(self, up, x, skip)
        return cast(Tensor, self.out(x)[..., :h, :w])
