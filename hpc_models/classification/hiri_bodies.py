"""PVTv2, DaViT and HRNet as classifiers, each plain and with HIRI-ViT's five stages and two branches (its Table IX).

The plain bodies follow their papers and have the published numbers of weights. How HIRI-ViT's authors widen them to 448
pixels is known from the text alone. The five-stage forms here are RECONSTRUCTIONS: HR-stem, a new first stage of HR
blocks at stride 4, HR blocks at stride 8 instead of the body's own first stage, then the body's other stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.init import init_linears
from hpc_models.blocks.network import Network
from hpc_models.blocks.sdpa import attend, merge_heads, split_heads
from hpc_models.classification.hiri_blocks import ChannelNorm, Downsample, HRBlock, ReducedAttention, Stem
from hpc_models.classification.hrnet import HRNetBody
from hpc_models.classification.settings import HIRIBodySettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, cut_patches, images_of, join_patches


class DepthwiseMLP(nn.Module):
    """Linear, depth-wise 3x3 convolution, GELU, Linear on a channel-first map (PVTv2's feed-forward)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return cast(Tensor, self.fc2(F.gelu(self.dwconv(self.fc1(x)))))


class PVTBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, channels: int, heads: int, ratio: int, reduction: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.attn = ReducedAttention(channels, heads, reduction)
        self.mlp = DepthwiseMLP(channels, ratio * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PVTStage(nn.Module):
    """Overlapping patch embedding, blocks, norm: stage `place` of PVTv2-B2, from 0."""

    WIDTHS, DEPTHS, HEADS = (64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8)
    RATIOS, REDUCTIONS = (8, 8, 4, 4), (8, 4, 2, 1)

    def __init__(self, before: int, place: int) -> None:
        super().__init__()
        channels, kernel, step = self.WIDTHS[place], 3 if place else 7, 2 if place else 4
        self.embed = nn.Sequential(nn.Conv2d(before, channels, kernel, step, kernel // 2), ChannelNorm(channels))
        self.blocks = nn.ModuleList(
            PVTBlock(channels, self.HEADS[place], self.RATIOS[place], self.REDUCTIONS[place])
            for _ in range(self.DEPTHS[place])
        )
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / step, W / step)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))


class WindowAttention(nn.Module):
    """Attention within windows of 7 x 7 pixels, or, with `channelwise`, of channels to channels (DaViT).

    Ding et al., DaViT (ECCV 2022), equations 2 and 3: channel attention has groups of 32 channels, and scales by the
    root of a group's width.
    """

    def __init__(self, channels: int, heads: int, channelwise: bool, window: int = 7) -> None:
        super().__init__()
        self.heads, self.channelwise, self.window = heads, channelwise, window
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        # Channels to channels.
        if self.channelwise:
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)
            # Channels are the tokens and pixels their features. The scale still counts the channels of a group.
            scores = (q * q.shape[2] ** -0.5) @ k.transpose(-1, -2)
            out = (scores.softmax(dim=-1) @ v).permute(0, 3, 1, 2).flatten(2)
            return cast(Tensor, self.proj(out).transpose(1, 2).unflatten(2, x.shape[-2:]))
        # Pixels to pixels of their window.
        h, w = x.shape[-2:]
        n = self.window
        x = F.pad(x, (0, -w % n, 0, -h % n))
        windows = cut_patches(x, n)
        tokens = windows.flatten(2, 3).flatten(0, 1)
        out = self.proj(merge_heads(attend(*split_heads(self.qkv(tokens), self.heads))))
        return join_patches(out.view_as(windows), x.shape[-2] // n, x.shape[-1] // n)[..., :h, :w]


class DaViTBlock(nn.Module):
    """Convolutional position, attention, convolutional position, MLP, each added; then the same across channels."""

    def __init__(self, channels: int, heads: int, channelwise: bool) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = (nn.Conv2d(channels, channels, 3, padding=1, groups=channels) for _ in range(2))
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.attn = WindowAttention(channels, heads, channelwise)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = x + self.cpe1(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.cpe2(x)
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class DaViTStage(nn.Module):
    """Norm and 2x2 strided convolution (or nothing), then pairs of a spatial and a channel block."""

    def __init__(self, before: int | None, channels: int, depth: int) -> None:
        super().__init__()
        self.down = None
        if before is not None:
            self.down = nn.Sequential(ChannelNorm(before), nn.Conv2d(before, channels, 2, 2))
        heads = channels // 32
        self.blocks = nn.ModuleList(DaViTBlock(channels, heads, bool(i % 2)) for i in range(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / 2, W / 2)."""
        if self.down is not None:
            # An odd side is padded, so that no pixel is lost.
            x = self.down(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))
        for block in self.blocks:
            x = block(x)
        return x


def _pvt(hiri: bool, channels: int) -> tuple[list[nn.Module], int]:
    widths = PVTStage.WIDTHS
    first = PVTStage(channels, 0)
    rest = [PVTStage(widths[i - 1], i) for i in range(1, 4)]
    return [*(_hiri_front(channels, widths[0], PVTStage.DEPTHS[0]) if hiri else [first]), *rest], widths[-1]


def _davit(hiri: bool, channels: int) -> tuple[list[nn.Module], int]:
    widths, depths = (96, 192, 384, 768), (1, 1, 3, 1)
    stem = nn.Sequential(nn.Conv2d(channels, widths[0], 7, 4, 3), ChannelNorm(widths[0]))
    first = nn.Sequential(stem, DaViTStage(None, widths[0], depths[0]))
    rest = [DaViTStage(widths[i - 1], widths[i], depths[i]) for i in range(1, 4)]
    front = _hiri_front(channels, widths[0], 2) if hiri else [first]
    return [*front, *rest], widths[-1]


def _hrnet(hiri: bool, channels: int) -> tuple[list[nn.Module], int]:
    if hiri:  # HRNet's own stem halves twice; behind two HR stages the body starts at stride 8
        return [*_hiri_front(channels, 64, 2), HRNetBody(64, 18, stem=False)], 2048
    return [HRNetBody(channels, 18, stem=True)], 2048


def _hiri_front(channels: int, width: int, depth: int) -> list[nn.Module]:
    """HR-stem and two stages of HR blocks, half the width in the first: strides 4 and 8."""
    half = width // 2
    stage1 = nn.Sequential(Stem("hr", channels, 32, half), *(HRBlock(half, 8) for _ in range(2)))
    stage2 = nn.Sequential(Downsample("irds_a", half, width), *(HRBlock(width, 8) for _ in range(2 * depth)))
    return [stage1, stage2]


BODIES: dict[str, Callable[[bool, int], tuple[list[nn.Module], int]]] = {
    "pvt_v2_b2": _pvt,
    "davit_tiny": _davit,
    "hrnet_w18": _hrnet,
}


class TwoBranchBody(Network):
    """A published body, or the same with HIRI-ViT's front (a reconstruction); mean over pixels and a linear head."""

    def __init__(self, settings: HIRIBodySettings, data: DataShape) -> None:
        super().__init__(settings)
        stages, width = BODIES[settings.body](settings.five_stages, data.in_channels)
        self.stages = nn.ModuleList(stages)
        # PVTv2 norms each stage itself, HRNet is batch-normed throughout.
        self.norm = nn.LayerNorm(width) if settings.body == "davit_tiny" else nn.Identity()
        self.head = nn.Linear(width, data.classes)
        init_linears(self)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return list(self.stages)

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        x = self.centred(images_of(batch))
        for stage in self.stages:
            x = recompute(self, stage, x)
        return cast(Tensor, self.head(self.norm(x.mean(dim=(-2, -1)))))
