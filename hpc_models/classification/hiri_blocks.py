"""Parts of HIRI-ViT: stems, downsamplings, feed-forwards and blocks on channel-first maps.

Yao, Li, Pan, Mei: HIRI-ViT, IEEE TPAMI 2024 (arXiv 2403.11999), section 4. Channel numbers are the caller's.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.conv import conv_norm, plain_conv
from hpc_models.blocks.sdpa import attend, merge_heads

STEMS = ("vit", "conv", "hr")


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(kind: str, channels: int) -> nn.Module:
    """Batch norm ("bn") or layer norm over channels ("ln")."""
    return nn.BatchNorm2d(channels) if kind == "bn" else ChannelNorm(channels)


class Stem(nn.Module):
    """Image to the first stage's map at a quarter of the side; `width` channels lie between the two strides.

    Kind "vit" is one 7x7 convolution with stride 4. In "conv", the first and the last of four 3x3 convolutions have
    stride 2. In "hr", two branches follow a strided 3x3 convolution. The branch of high resolution has a light
    depth-wise convolution before its stride. The other one does the heavy work after its stride. Their sum is normed.
    """

    def __init__(self, kind: str, in_channels: int, width: int, out_channels: int) -> None:
        super().__init__()
        if kind not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {kind!r}")
        self.kind = kind
        if kind == "vit":
            self.body = nn.Sequential(nn.Conv2d(in_channels, out_channels, 7, 4, 3, bias=False))
        elif kind == "conv":
            layers: list[nn.Module] = []
            for i in range(3):
                layers += [conv_norm(in_channels if i == 0 else width, width, 3, 2 if i == 0 else 1), nn.GELU()]
            self.body = nn.Sequential(*layers, plain_conv(width, out_channels, 3, 2))
        else:
            self.body = nn.Sequential(conv_norm(in_channels, width, 3, 2), nn.GELU())
            self.high = nn.Sequential(
                conv_norm(width, width, 3, groups=width), nn.GELU(), plain_conv(width, out_channels, 3, 2)
            )
            self.low = nn.Sequential(
                conv_norm(width, width, 3, 2),
                nn.GELU(),
                conv_norm(width, width, 3),
                nn.GELU(),
                plain_conv(width, out_channels, 1),
            )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H / 4, W / 4)."""
        x = self.body(image)
        return cast(Tensor, self.norm(self.high(x) + self.low(x) if self.kind == "hr" else x))


class Downsample(nn.Module):
    """Halve the side between two stages.

    Kind "conv" is one strided 3x3 convolution. In "irds_a", a strided 3x3 convolution expands and a 1x1 convolution
    shrinks. In "irds_b", a 1x1 convolution expands; a strided depth-wise 3x3 and a 1x1 follow; norm and activation come
    only after the first. Both inverted residual forms add a shortcut of mean pooling and a 1x1 convolution.
    """

    def __init__(self, kind: str, in_channels: int, out_channels: int, expansion: int = 2) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.shortcut = None
        if kind == "conv":
            self.body = conv_norm(in_channels, out_channels, 3, 2)
        elif kind == "irds_a":
            self.body = nn.Sequential(conv_norm(in_channels, inner, 3, 2), nn.GELU(), conv_norm(inner, out_channels, 1))
        else:
            self.body = nn.Sequential(
                conv_norm(in_channels, inner, 1),
                nn.GELU(),
                plain_conv(inner, inner, 3, 2, groups=inner),
                nn.Conv2d(inner, out_channels, 1),
            )
        if kind != "conv":
            self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), conv_norm(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, ceil(H / 2), ceil(W / 2))."""
        y = self.body(x)
        return cast(Tensor, y if self.shortcut is None else y + self.shortcut(x))


class FeedForward(nn.Module):
    """Expand, activate, shrink, per pixel; with `convolve`, a depth-wise 3x3 convolution before the activation (CFFN).

    Kind "bn" norms after each map. "ln" has no norm inside, as ViT.
    """

    def __init__(self, channels: int, expansion: int, convolve: bool, kind: str) -> None:
        super().__init__()
        inner = expansion * channels
        batch = kind == "bn"
        self.expand = nn.Conv2d(channels, inner, 1, bias=not batch)
        self.norm1 = nn.BatchNorm2d(inner) if batch else nn.Identity()
        self.mix = plain_conv(inner, inner, 3, groups=inner) if convolve else nn.Identity()
        self.norm2 = nn.BatchNorm2d(inner) if batch and convolve else nn.Identity()
        self.shrink = nn.Conv2d(inner, channels, 1, bias=not batch)
        self.norm3 = nn.BatchNorm2d(channels) if batch else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.norm2(self.mix(self.norm1(self.expand(x))))
        return cast(Tensor, self.norm3(self.shrink(F.gelu(x))))


class HRBlock(nn.Module):
    """Sum of a depth-wise convolution at high resolution, and of the feed-forward at half the side; no attention."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.high = conv_norm(channels, channels, 3, groups=channels)
        self.down = conv_norm(channels, channels, 3, 2, groups=channels)
        self.feed = FeedForward(channels, expansion, False, "bn")

    def low(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        x = self.down(x)
        return cast(Tensor, x + self.feed(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return cast(Tensor, x + self.high(x) + repeat2(self.low(x), x.shape[-2:]))


def repeat2(x: Tensor, side_hw: torch.Size) -> Tensor:
    """Every pixel twice along both axes, cut to `side_hw`."""
    return F.interpolate(x, scale_factor=2, mode="nearest")[..., : side_hw[0], : side_hw[1]]


class FeedBlock(nn.Module):
    """x + (C)FFN(norm(x)), the block of stages without attention."""

    def __init__(self, channels: int, expansion: int, convolve: bool, inner: str, outer: str) -> None:
        super().__init__()
        self.norm = norm(outer, channels)
        self.feed = FeedForward(channels, expansion, convolve, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return cast(Tensor, x + self.feed(self.norm(x)))


class ReducedAttention(nn.Module):
    """Attention of all pixels to a map that a strided convolution made smaller (PVT, Wang et al. 2021, section 3.3).

    `reduction` 1 is plain attention.
    """

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same.

        Raises:
            ValueError: the map is smaller than the reduction.
        """
        size = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        keys = tokens
        if self.sr is not None and self.norm is not None:
            if min(size) < self.reduction:
                h, w = size
                raise ValueError(f"picture too small: its map of {h}x{w} is to shrink {self.reduction}-fold")
            keys = self.norm(self.sr(x).flatten(2).transpose(1, 2))
        q = self.q(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(keys).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.proj(merge_heads(attend(q, k, v)))
        return cast(Tensor, out.transpose(1, 2).unflatten(2, size))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + (C)FFN(norm(x)); every pixel is a token, heads have 32 channels.

    `inner` is the norm inside the feed-forward, `outer` the one in front of both parts ("bn" or "ln").
    """

    def __init__(
        self, channels: int, expansion: int, convolve: bool, inner: str, outer: str, reduction: int = 1
    ) -> None:
        super().__init__()
        self.norm1 = norm(outer, channels)
        self.attn = ReducedAttention(channels, max(1, channels // 32), reduction)
        self.norm2 = norm(outer, channels)
        self.feed = FeedForward(channels, expansion, convolve, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.feed(self.norm2(x)))
