"""Arithmetic and weights of one image's forward pass by closed formulas.

One multiply-accumulate is two FLOPs here (papers often print multiply-accumulates as FLOPs). Norms, activations and
softmax are not counted, as torch's counter does not count them. A backward pass costs twice the forward pass.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launch.config.config import Config


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one image's forward pass, and weights."""

    encoder: float  # FLOPs of the transformer, with the patch embedding; of the whole network where there is none
    decoder: float  # FLOPs of what turns tokens into logits, with the convolutions on leaves
    weights: int  # trainable numbers
    tokens: int  # length of the sequence that is computed (padding too, unless packed)

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass."""
        return self.encoder + self.decoder


class _Tally:
    """Adds up layers: FLOPs per application, weights once."""

    def __init__(self) -> None:
        self.flops = 0
        self.weights = 0

    def conv(self, a: int, b: int, kernel: int, pixels: int, bias: bool = False) -> None:
        """Convolution from a to b channels with `pixels` output pixels."""
        self.flops += 2 * kernel * kernel * a * b * pixels
        self.weights += kernel * kernel * a * b + b * bias

    def double(self, a: int, b: int, pixels: int, bias: bool = False) -> None:
        """2x2 transposed convolution with stride 2 on `pixels` input pixels."""
        self.flops += 2 * 4 * a * b * pixels
        self.weights += 4 * a * b + b * bias

    def linear(self, a: int, b: int, rows: int, bias: bool = True) -> None:
        """Linear map of `rows` rows."""
        self.conv(a, b, 1, rows, bias)

    def residual(self, a: int, b: int, pixels: int) -> None:
        """nnU-Net's residual unit without biases, with a 1x1 shortcut where the width changes."""
        self.conv(a, b, 3, pixels)
        self.conv(b, b, 3, pixels)
        if a != b:
            self.conv(a, b, 1, pixels)


def encoder_flops(tokens: int, width: int, depth: int, mlp_dim: int | None = None) -> int:
    """FLOPs of a transformer encoder: depth * (8 N D^2 + 4 N D M + 4 N^2 D); 24 N D^2 + 4 N^2 D a block for M = 4 D."""
    mlp = mlp_dim or 4 * width
    return depth * (8 * tokens * width**2 + 4 * tokens * width * mlp + 4 * tokens**2 * width)


def _encoder_weights(width: int, depth: int, mlp_dim: int, qkv_bias: bool) -> int:
    attention = 3 * width * width + 3 * width * qkv_bias + width * width + width
    return depth * (attention + 2 * width * mlp_dim + mlp_dim + width + 4 * width) + 2 * width


def _conv_decoder(tally: _Tally, side: int, patch: int, width: int, f: int, classes: int, channels: int) -> None:
    """UNETR's decoder over a token grid of `side`, at any power-of-two patch."""
    k = patch.bit_length() - 1
    whole = (side * patch) ** 2
    tally.residual(channels, f, whole)
    for i in range(1, k):
        out, pixels = f << i, side * side
        tally.double(width, out, pixels)
        for _ in range(k - 1 - i):
            pixels *= 4
            tally.double(out, out, pixels)
            tally.residual(out, out, 4 * pixels)
    pixels = side * side
    widths = [width, *(f << i for i in range(k - 1, -1, -1))]
    for a, b in pairwise(widths):
        tally.double(a, b, pixels)
        pixels *= 4
        tally.residual(2 * b, b, pixels)
    tally.conv(f, classes, 1, whole, bias=True)


def _leaf_network(tally: _Tally, n: int, patch: int, width: int, base: int, classes: int, channels: int) -> None:
    """Convolutional encoder and decoder shared by n leaves."""
    halvings = min(patch.bit_length() - 1, 2 if patch <= 16 else 3)
    widths = [min(base << i, 4 * base) for i in range(halvings + 1)]
    first, last, side = widths[0], widths[-1], patch >> halvings

    def square(level: int) -> int:
        return n * (patch >> level) ** 2

    def mix(channels_: int, level: int) -> None:
        tally.conv(channels_, channels_, 3, square(level), bias=True)
        tally.conv(channels_, channels_, 3, square(level), bias=True)

    tally.conv(channels, first, 3, square(0), bias=True)
    tally.conv(first, first, 3, square(0), bias=True)
    for i in range(halvings):
        tally.conv(widths[i], widths[i + 1], 2, square(i + 1), bias=True)
        mix(widths[i + 1], i + 1)
    tally.linear(last * side * side, width, n)
    tally.linear(width, last * side * side, n)
    mix(last, halvings)
    for i in range(halvings, 0, -1):
        tally.double(widths[i], widths[i - 1], square(i), bias=True)
        tally.conv(2 * widths[i - 1], widths[i - 1], 3, square(i - 1), bias=True)
        mix(widths[i - 1], i - 1)
    tally.conv(first, classes, 1, square(0), bias=True)


def _leaf_unet(tally: _Tally, n: int, patch: int, width: int, base: int, classes: int, channels: int) -> None:
    """U-Net over n leaves, its convolutions across their borders; a norm has two weights a channel."""
    bits = patch.bit_length() - 1
    halvings = max(min(bits, 3), bits - 2)
    widths = [base * min(8, 1 << max(0, i - 1)) for i in range(halvings + 1)]
    cells = widths[-1] * (patch >> halvings) ** 2

    def double(a: int, b: int, level: int) -> None:
        for before in (a, b):
            tally.conv(before, b, 3, n * (patch >> level) ** 2)
            tally.weights += 2 * b

    for level, (a, b) in enumerate(pairwise([channels, *widths])):
        double(a, b, level)
    tally.linear(cells, width, n)
    tally.linear(width, cells, n)
    for level in range(halvings, 0, -1):
        tally.double(widths[level], widths[level - 1], n * (patch >> level) ** 2, bias=True)
        double(2 * widths[level - 1], widths[level - 1], level - 1)
    tally.conv(widths[0], classes, 1, n * patch * patch, bias=True)


def raster_decoder_flops(length: int, patch: int, feature_size: int = 16) -> float:
    """FLOPs of UNETR-B's raster decoder (768 channels in, one class of three channels) over tokens in a square."""
    tally = _Tally()
    _conv_decoder(tally, math.isqrt(length), patch, 768, feature_size, 1, 3)
    return float(tally.flops)


def unetr_cost(data: Any, model: Any, tokens: float | None = None) -> ForwardCost:
    """ForwardCost of `unetr` on one image.

    Args:
        data: `data` of a configuration: its resolution, patch, length, classes and channels.
        model: `model` of one: settings of `unetr`.
        tokens: tokens that the transformer and the leaf network compute; L when None. Both leave out padding: packed
            altogether, else up to the longest sequence of a rank's batch. Linear maps before and after compute L.

    Returns:
        The cost; position codes are left out (they cost less than 0.1 %), in weights too.
    """
    length, patch, width = data.length, data.patch, model.width
    n, mlp = (length if tokens is None else round(tokens)), model.mlp_dim or 4 * width
    tally = _Tally()
    encoder = encoder_flops(n, width, model.depth, mlp)
    weights = _encoder_weights(width, model.depth, mlp, model.qkv_bias)
    if model.decoder == "leaf":
        _leaf_network(tally, n, patch, width, model.leaf_base, data.classes, data.channels)
    elif model.decoder == "leaf_unet":
        _leaf_unet(tally, n, patch, width, model.leaf_base, data.classes, data.channels)
    else:
        encoder += 2 * length * width * data.channels * patch * patch
        weights += width * data.channels * patch * patch + width
        if model.decoder == "token":
            tally.linear(width, patch * patch * data.classes, length)
        else:
            cells = data.resolution // patch
            if model.decoder == "raster":
                side = cells if length == cells * cells else math.isqrt(length)
            else:
                side = model.grid or min(1 << max(0, math.ceil(math.log2(length) / 2)), cells)
            _conv_decoder(tally, side, patch, width, model.feature_size, data.classes, data.channels)
    return ForwardCost(float(encoder), float(tally.flops), weights + tally.weights, n)


def unet_cost(side: int, widths: tuple[int, ...], classes: int = 1, channels: int = 3) -> ForwardCost:
    """ForwardCost of `unet` on one picture of side x side (a multiple of 2^(levels - 1)), norms' weights left out."""
    tally = _Tally()
    before = channels
    for level, out in enumerate(widths):
        pixels = (side >> level) ** 2
        tally.conv(before, out, 3, pixels, bias=True)
        tally.conv(out, out, 3, pixels, bias=True)
        before = out
    for level in range(len(widths) - 1, 0, -1):
        a, b, pixels = widths[level], widths[level - 1], (side >> level) ** 2
        tally.double(a, b, pixels, bias=True)
        tally.conv(2 * b, b, 3, 4 * pixels, bias=True)
        tally.conv(b, b, 3, 4 * pixels, bias=True)
    tally.conv(widths[0], classes, 1, side * side, bias=True)
    return ForwardCost(float(tally.flops), 0.0, tally.weights, 1)


def cost_of(config: Config, tokens: float | None = None) -> ForwardCost | None:
    """ForwardCost of one frame of an experiment, or None for a model without a closed formula here.

    Args:
        config: The experiment; a tiled model's crops are scaled to the area of the frame.
        tokens: Tokens per image without padding; L when None.
    """
    model, data = config.model, config.data
    if model.name == "unetr" and getattr(model, "attention", "full") in ("full", "packed"):
        return unetr_cost(data, model, tokens)
    if model.name == "unet_tiled":
        one = unet_cost(data.crop_px, getattr(model, "widths", ()), data.classes, data.channels)
        return ForwardCost(one.encoder * config.samples_per_image, 0.0, one.weights, 1)
    return None
