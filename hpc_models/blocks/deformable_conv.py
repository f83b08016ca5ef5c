"""Deformable convolution, version 1 (Dai et al., ICCV 2017), by bilinear sampling."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.linear_attention import full_precision


def sampling_points(offset: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Where each tap of each output pixel looks: (B, k * k, H', W', 2), (x, y) of centres in input pixels.

    `offset` is (B, 2 * k * k, H', W'): pairs (dy, dx) per tap, taps in raster order.
    """
    _, _, rows, cols = offset.shape
    device = offset.device
    tap = torch.arange(kernel, device=device)
    y = torch.arange(rows, device=device)[None, :] * stride - padding + tap[:, None]  # (k, H')
    x = torch.arange(cols, device=device)[None, :] * stride - padding + tap[:, None]  # (k, W')
    dy, dx = offset.unflatten(1, (kernel, kernel, 2)).unbind(3)  # (B, k, k, H', W')
    return torch.stack((dx + x[None, None, :, None, :], dy + y[None, :, None, :, None]), dim=-1).flatten(1, 2)


def deform_conv2d(x: Tensor, offset: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution whose taps are moved by `offset` and read bilinearly, with zeros outside of the input.

    Args:
        x: (B, C, H, W).
        offset: (B, 2 * k * k, H', W') in pixels, see `sampling_points`.
        weight: (D, C, k, k).
        stride: of the convolution.
        padding: of the convolution.

    Returns:
        (B, D, H', W'), the size that the plain convolution gives.

    Raises:
        ValueError: the offset has another shape than the output needs.
    """
    b, _, h, w = x.shape
    kernel = weight.shape[-1]
    rows, cols = ((side + 2 * padding - kernel) // stride + 1 for side in (h, w))
    if offset.shape != (b, 2 * kernel * kernel, rows, cols):
        raise ValueError(f"offset is {tuple(offset.shape)}, should be {(b, 2 * kernel * kernel, rows, cols)}")
    with full_precision(x):  # 16-bit numbers have too few digits for places
        points = sampling_points(offset.float(), kernel, stride, padding)
        size = torch.tensor((w, h), device=x.device, dtype=torch.float32)
        grid = (2 * points + 1) / size - 1
        taps = F.grid_sample(x.float(), grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    columns = taps.unflatten(2, (kernel * kernel, rows)).flatten(3).flatten(1, 2)  # (B, C * k * k, H' * W')
    return cast(Tensor, (weight.flatten(1) @ columns.to(x.dtype)).unflatten(-1, (rows, cols)))


class DeformConv2d(nn.Module):
    """Deformable convolution, padded by k // 2, whose offsets come from a plain convolution of the same input.

    The offsets start at zero, so a new layer is a plain convolution (Dai et al. 2017, section 4.1).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, offset_bias: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.offset = nn.Conv2d(inputs, 2 * kernel * kernel, kernel, stride, kernel // 2, bias=offset_bias)
        self.start_plain()

    def start_plain(self) -> None:
        """Set all offsets to zero."""
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H', W')."""
        return deform_conv2d(x, self.offset(x), self.weight, self.stride, self.padding)
