"""Convolutions and their norms: plain, and with standardised filters.

Qiao et al., Weight Standardization (arXiv:1903.10520).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose filters are brought to mean 0 and variance 1 each time.

    Padding None is half the filter's side.
    """

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, padding: int | None = None) -> None:
        super().__init__(inputs, outputs, side, stride, side // 2 if padding is None else padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        # At least float32, under autocast too: a variance of 1e-4 has no digits left in 16 bits.
        flat = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        weight = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return F.conv2d(x, weight.view_as(self.weight).to(self.weight.dtype), None, self.stride, self.padding)


def conv3x3(in_channels: int, out_channels: int, padding: int, standardise: bool, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution, with standardised filters (and then without bias) or with plain ones."""
    if standardise:
        return StdConv2d(in_channels, out_channels, 3, padding=padding)
    return nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=bias)


def norm2d(kind: str, channels: int) -> nn.Module:
    """The norm layer of a map, with weight and bias per channel: "instance", "batch" or "none"."""
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def plain_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the side (divided by the stride), without bias: a norm follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(plain_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs))
