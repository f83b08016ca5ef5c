"""HCT, GMIC's global network and Def-GMIC: three ResNet-22s for mammograms of 3328 x 2560 px.

Taha et al.: Deep is a Luxury We Don't Have (MICCAI 2022), figures 1 and 4 and algorithm 1. GMIC (Shen et al. 2019) has
convolutions only. In the last stages HCT has linear attention, and Def-GMIC deformable convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.attention import make_attention
from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.conv import plain_conv
from hpc_models.blocks.deformable_conv import DeformConv2d
from hpc_models.blocks.linear_attention import Nystrom
from hpc_models.blocks.network import Network
from hpc_models.classification.settings import DefGMICSettings, GMICSettings, HCTSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, images_of

WIDTHS = (16, 32, 64, 128, 256)
BLOCKS_PER_STAGE = 2
BlockShape = tuple[int, int, int, bool]  # channels in and out, stride, whether the block begins its stage


class ResidualConv(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions, with a 1x1 shortcut in a stage's first block.

    `make_conv` makes the first convolution from channels in, channels out, kernel and stride.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, first: bool, make_conv: Callable[..., nn.Module] = plain_conv
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = make_conv(inputs, outputs, 3, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = plain_conv(outputs, outputs, 3)
        self.shortcut = plain_conv(inputs, outputs, 1, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / stride, W / stride), rounded up."""
        y = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return cast(Tensor, self.conv2(F.relu(self.norm2(self.conv1(y)))) + beside)


class ACBlock(nn.Module):
    """Attention over all places of the map, then a 3x3 convolution that sets resolution and channels (algorithm 1)."""

    def __init__(self, inputs: int, outputs: int, stride: int, first: bool, settings: HCTSettings) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.attn = make_attention(inputs, settings.heads, kind=settings.attention, dropout=settings.dropout)
        self.norm2 = nn.BatchNorm2d(inputs)
        self.conv = plain_conv(inputs, outputs, 3, stride)
        self.shortcut = plain_conv(inputs, outputs, 1, stride) if first else None

    def _attend(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.attn, Nystrom):
            tokens = self.attn(tokens, landmarks=max(x.shape[-2:]))
        else:
            tokens = self.attn(tokens)
        return cast(Tensor, tokens.transpose(1, 2).unflatten(2, x.shape[-2:]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / stride, W / stride), rounded up."""
        y = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return cast(Tensor, self.conv(F.relu(self.norm2(self._attend(y) + x))) + beside)


class ResNet22(Network):
    """Stem, five stages of two blocks, and a linear map of the mean over all places. Subclasses choose the blocks."""

    def __init__(self, settings: GMICSettings, data: DataShape) -> None:
        super().__init__(settings)
        self.stem = nn.Conv2d(data.in_channels, WIDTHS[0], 7, 2, 3, bias=False)
        blocks = []
        inputs = WIDTHS[0]
        for stage, (width, stride) in enumerate(zip(WIDTHS, settings.strides, strict=True), 1):
            for place in range(BLOCKS_PER_STAGE):
                first = place == 0
                blocks.append(self.block(settings, stage, (inputs, width, stride if first else 1, first)))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, data.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.start_plain()

    @staticmethod
    def block(_settings: Any, _stage: int, shape: BlockShape) -> nn.Module:
        """A block of a stage; stages count from 1."""
        return ResidualConv(*shape)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return list(self.blocks)

    def feature_map(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to the map (B, 256, H', W') that the head averages.

        Raises:
            ValueError: a picture is too small for the stem.
        """
        if min(image.shape[-2:]) < 5:
            raise ValueError(f"pictures must be at least 5 px wide and high, got {tuple(image.shape[-2:])}")
        x = F.max_pool2d(self.stem(self.centred(image)), 3, 2)
        for block in self.blocks:
            x = recompute(self, block, x)
        return F.relu(self.norm(x))

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        return cast(Tensor, self.head(self.feature_map(images_of(batch)).mean((2, 3))))


class HCT(ResNet22):
    """High-resolution convolutional transformer: AC blocks after the first stages, three in the paper."""

    @staticmethod
    def block(settings: HCTSettings, stage: int, shape: BlockShape) -> nn.Module:
        """Convolutions, then attention."""
        return ResidualConv(*shape) if stage <= settings.conv_stages else ACBlock(*shape, settings)


class GMIC(ResNet22):
    """The first (global) network of GMIC; its strides are all 2 in the comparison with HCT."""


class DefGMIC(ResNet22):
    """GMIC with deformable first convolutions in the blocks of the last two stages.

    The paper says "the last two layers" and 2.89 M weights, which this choice fits.
    """

    @staticmethod
    def block(settings: DefGMICSettings, stage: int, shape: BlockShape) -> nn.Module:
        """Deformable convolutions in the last two stages."""
        deform = partial(DeformConv2d, offset_bias=settings.offset_bias)
        return ResidualConv(*shape, *([deform] if stage > len(WIDTHS) - 2 else []))
