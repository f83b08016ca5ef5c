"""TransUNet R50-ViT-B16: ResNet, vision transformer on its map, convolutional decoder with skips.

Chen et al., TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation (2021), figure 1. Each layer
has the published number of weights, 105,277,081 in all at 224 px and 9 classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.conv import norm2d
from hpc_models.blocks.init import set_norm_eps, set_prior
from hpc_models.blocks.resnet import ResNet
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.picture_model import PictureModel
from hpc_models.segmentation.settings import TransUNetSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.position import resize_table

STRIDE = 16


class ConvNorm(nn.Sequential):
    """3x3 convolution, norm, ReLU. The convolution has a bias only without a norm."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
        super().__init__(conv, norm2d(norm, out_channels), nn.ReLU())


class UpStage(nn.Module):
    """Double the side by bilinear interpolation, join the skip, two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels + skip_channels, out_channels, norm)
        self.conv2 = ConvNorm(out_channels, out_channels, norm)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """(N, C_in, h, w) and (N, C_skip, 2h, 2w) or None to (N, C_out, 2h, 2w)."""
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return cast(Tensor, self.conv2(self.conv1(x if skip is None else torch.cat((x, skip), dim=1))))


class TransUNet(PictureModel):
    """TransUNet on pictures, crops or token sets laid out as a picture.

    The table of positions has (S / 16)^2 rows for pictures of side S, and is interpolated for others. The paper's
    decoder has norm "batch", with statistics that depend on which images share a rank.
    """

    def __init__(self, settings: TransUNetSettings, data: DataShape) -> None:
        super().__init__(settings, data, STRIDE)
        width, widths, norm = settings.width, settings.decoder_widths, settings.norm
        self.side = -(-self.picture_px // STRIDE)
        self.resnet = ResNet(data.in_channels, settings.stem_width, settings.units)
        self.embed = nn.Conv2d(self.resnet.widths[-1], width, 1)
        self.table = nn.Parameter(torch.zeros(1, self.side**2, width))
        self.dropout = settings.dropout
        mlp_dim = settings.mlp_dim or 4 * width
        self.vit = ViTEncoder(width, settings.depth, settings.heads, mlp_dim, qkv_bias=True, dropout=self.dropout)
        set_norm_eps(self.vit, 1e-6)
        for block in self.vit.blocks:
            block.attn.dropout = 0.0  # type: ignore[union-attr,assignment]
        first = 2 * widths[0]
        self.bridge = ConvNorm(width, first, norm)
        skips = [*reversed(self.resnet.widths[:3]), 0]
        steps = pairwise((first, *widths))
        self.ups = nn.ModuleList(UpStage(a, s, b, norm) for (a, b), s in zip(steps, skips, strict=True))
        self.out = nn.Conv2d(widths[-1], data.classes, 3, padding=1)
        self._initialise(settings.prior)
        self.set_checkpointing(settings.checkpointing)

    def _initialise(self, prior: float | None) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for part in (*self.bridge.modules(), *self.ups.modules()):
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        set_prior(self.out.bias, prior)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        units = [unit for stage in self.resnet.stages for unit in stage]  # type: ignore[attr-defined]
        return [*units, *self.vit.blocks, self.bridge, *self.ups]

    def network(self, image: Tensor) -> Tensor:
        """See `PictureModel`."""
        stem, quarter, eighth, last = self.resnet(image)
        x = self.embed(last)
        rows, cols = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + resize_table(self.table, (self.side, self.side), (rows, cols))
        x = F.dropout(x, self.dropout, self.training)
        x, _ = self.vit(x)
        x = x.transpose(1, 2).unflatten(2, (rows, cols))
        x = recompute(self, self.bridge, x)
        for up, skip in zip(self.ups, (eighth, quarter, stem, None), strict=True):
            x = recompute(self, up, x, skip)
        return cast(Tensor, self.out(x))
