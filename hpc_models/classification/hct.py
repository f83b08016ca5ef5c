"""HCT, GMIC's global network and Def-GMIC: three ResNet-22s for mammograms of 3328 x 2560 px; imports torch only.

Taha et al.: Deep is a Luxury We Don't Have (MICCAI 2022), figures 1 and 4 and algorithm 1. GMIC (Shen et al. 2019) is
convolutions throughout; in its last stages HCT puts linear attention, Def-GMIC deformable convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.deformable_conv import DeformConv2d
from hpc_models.blocks.linear_attention import Nystrom, Performer
from hpc_models.tokens.batch import Batch, images_of

ATTENTIONS = ("performer_relu", "performer_softmax", "nystrom")
WIDTHS = (16, 32, 64, 128, 256)
BLOCKS_PER_STAGE = 2
# Stage (from 1), channels in and out, stride, whether it is the stage's first block.
MakeBlock = Callable[[int, int, int, int, bool], nn.Module]


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class ConvBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; a stage's first block has a 1x1 one as its shortcut.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution.
        first: whether it begins a stage.
        deform: make the first convolution a deformable one.
        offset_bias: see `DeformConv2d`.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, first: bool, deform: bool = False, offset_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1: nn.Module
        if deform:
            self.conv1 = DeformConv2d(inputs, outputs, 3, stride, offset_bias)
        else:
            self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.shortcut = _conv(inputs, outputs, 1, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / stride, W / stride), rounded up."""
        y = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + beside


class ACBlock(nn.Module):
    """Attention over all places of the map, then a 3x3 convolution that sets resolution and channels (algorithm 1).

    Args:
        inputs: channels in, also the attention's width.
        outputs: channels out.
        stride: of the convolution.
        first: whether it begins a stage.
        attention: one of `ATTENTIONS`.
        heads: of the attention.
        dropout: after the attention's output.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, first: bool, attention: str, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.attn: nn.Module
        if attention == "nystrom":
            self.attn = Nystrom(inputs, heads, dropout=dropout)
        else:
            self.attn = Performer(inputs, heads, attention.removeprefix("performer_"), dropout=dropout)
        self.norm2 = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, outputs, 3, stride)
        self.shortcut = _conv(inputs, outputs, 1, stride) if first else None

    def _attend(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.attn, Nystrom):
            tokens = self.attn(tokens, landmarks=max(x.shape[-2:]))
        else:
            tokens = self.attn(tokens)
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / stride, W / stride), rounded up."""
        y = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return self.conv(F.relu(self.norm2(self._attend(y) + x))) + beside


class ResNet22(nn.Module):
    """Stem, five stages of two blocks, and a linear map of the mean over all places; its heirs choose the blocks.

    Args:
        classes: of the head.
        in_channels: of the image.
        strides: of the first block of each stage.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute every block in the backward pass.
        make_block: makes each block.

    Raises:
        ValueError: strides that are not five positive numbers.
    """

    task = "classification"
    inputs = ("images", "tiles")

    def __init__(
        self,
        classes: int,
        in_channels: int,
        strides: Sequence[int],
        normalise: bool,
        checkpointing: bool,
        make_block: MakeBlock,
    ) -> None:
        super().__init__()
        if len(strides) != len(WIDTHS) or min(strides) < 1:
            raise ValueError(f"strides must be {len(WIDTHS)} positive numbers, got {list(strides)}")
        self.normalise, self.checkpoint = normalise, checkpointing
        self.stem = nn.Conv2d(in_channels, WIDTHS[0], 7, 2, 3, bias=False)
        blocks = []
        inputs = WIDTHS[0]
        for stage, (width, stride) in enumerate(zip(WIDTHS, strides, strict=True), 1):
            for place in range(BLOCKS_PER_STAGE):
                first = place == 0
                blocks.append(make_block(stage, inputs, width, stride if first else 1, first))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.start_plain()

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing; results do not change."""
        self.checkpoint = on

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        return list(self.blocks)

    def feature_map(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to the map (B, 256, H', W') that the head averages.

        Raises:
            ValueError: a picture that is smaller than the stem can take.
        """
        if min(image.shape[-2:]) < 5:
            raise ValueError(f"pictures must be at least 5 px wide and high, got {tuple(image.shape[-2:])}")
        x = (image - 0.5) / 0.5 if self.normalise else image
        x = F.max_pool2d(self.stem(x), 3, 2)
        for block in self.blocks:
            x = recompute(self, block, x)
        return F.relu(self.norm(x))

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        return self.head(self.feature_map(images_of(batch)).mean((2, 3)))


class HCT(ResNet22):
    """High-resolution convolutional transformer: AC blocks after the first stages.

    Args:
        classes: of the head.
        in_channels: of the image.
        attention: one of `ATTENTIONS`.
        conv_stages: stages of plain convolutions, 1 to 4; the paper's model has 3.
        heads: attention heads.
        dropout: after the attention's output.
        strides: of the first block of each stage.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute every block in the backward pass.

    Raises:
        ValueError: unknown attention, or numbers out of range.
    """

    def __init__(
        self,
        classes: int = 2,
        in_channels: int = 1,
        attention: str = "performer_relu",
        conv_stages: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        normalise: bool = True,
        checkpointing: bool = False,
    ) -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if conv_stages not in range(1, len(WIDTHS)):
            raise ValueError(f"conv_stages must be 1 to {len(WIDTHS) - 1}, got {conv_stages}")

        def block(stage: int, inputs: int, outputs: int, stride: int, first: bool) -> nn.Module:
            if stage <= conv_stages:
                return ConvBlock(inputs, outputs, stride, first)
            return ACBlock(inputs, outputs, stride, first, attention, heads, dropout)

        super().__init__(classes, in_channels, strides, normalise, checkpointing, block)


def _conv_block(_stage: int, inputs: int, outputs: int, stride: int, first: bool) -> nn.Module:
    return ConvBlock(inputs, outputs, stride, first)


class GMIC(ResNet22):
    """The first (global) network of GMIC, without its patches of interest; GMIC's own strides are 1, 2, 2, 2, 2.

    Args:
        classes: of the head.
        in_channels: of the image.
        strides: of the first block of each stage; all 2 in the comparison with HCT.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute every block in the backward pass.
    """

    def __init__(
        self,
        classes: int = 2,
        in_channels: int = 1,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        normalise: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(classes, in_channels, strides, normalise, checkpointing, _conv_block)


class DefGMIC(ResNet22):
    """GMIC with deformable first convolutions in the blocks of the last two stages.

    Which convolutions are deformable is not published in full: "the last two layers", and 2.89 M weights fit.

    Args:
        classes: of the head.
        in_channels: of the image.
        strides: of the first block of each stage.
        offset_bias: whether the offsets' convolutions have a bias.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute every block in the backward pass.
    """

    def __init__(
        self,
        classes: int = 2,
        in_channels: int = 1,
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        offset_bias: bool = True,
        normalise: bool = True,
        checkpointing: bool = False,
    ) -> None:

        def block(stage: int, inputs: int, outputs: int, stride: int, first: bool) -> nn.Module:
            deform = stage > len(WIDTHS) - 2
            return ConvBlock(inputs, outputs, stride, first, deform, offset_bias)

        super().__init__(classes, in_channels, strides, normalise, checkpointing, block)
