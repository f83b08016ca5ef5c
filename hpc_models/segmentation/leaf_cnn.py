"""Small convolutional encoder and decoder shared by all leaves, with the transformer at its bottleneck.

A linear patch embedding and a linear head learn little from a few dozen images. Convolutions over the cells of one leaf
bring the prior of a U-Net to every leaf, at the cost of a U-Net on L * p^2 pixels. The flattened bottleneck, projected,
is the token. The transformer's answer is added to the bottleneck.

There is no norm, since batch statistics would depend on how images are spread over ranks. The starting weights keep the
scale steady instead.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import maybe_recompute
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch
from hpc_models.tokens.geometry import halo_patches


def leaf_widths(patch: int, base: int = 16) -> tuple[int, ...]:
    """Channels per level, finest first; the width doubles with each halving, up to four times `base`.

    The bottleneck has p/2 cells a side for p = 2, p/4 up to p = 16 and p/8 above.
    """
    halvings = min(patch.bit_length() - 1, 2 if patch <= 16 else 3)
    return tuple(min(base << i, 4 * base) for i in range(halvings + 1))


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) to the same."""
        return cast(Tensor, x + self.conv2(F.relu(self.conv1(F.relu(x)))))


def _initialise(module: nn.Module) -> None:
    """Keep the variance of the features from layer to layer (He et al. 2015), since there is no norm.

    Otherwise features shrink, and the network needs several times the steps to leave the background.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        elif isinstance(part, nn.ConvTranspose2d):  # side 2, stride 2: every output pixel has in_channels inputs
            nn.init.normal_(part.weight, std=(2 / part.in_channels) ** 0.5)
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Residual):
            with torch.no_grad():
                part.conv2.weight.mul_(0.5)  # the branch adds a quarter of the variance


class LeafEncoder(nn.Module):
    """Patches to token vectors, keeping the features of each level for the decoder."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        self.halo = halo = settings.halo
        widths = leaf_widths(data.patch, settings.leaf_base)
        first = widths[0]
        # A halo is used up by the first convolutions.
        self.stem1 = nn.Conv2d(data.in_channels, first, 3, padding=0 if halo > 0 else 1)
        self.stem2 = nn.Conv2d(first, first, 3, padding=0 if halo > 1 else 1)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.mixes = nn.ModuleList(Residual(b) for b in widths[1:])
        side = data.patch >> (len(widths) - 1)
        self.project = nn.Linear(widths[-1] * side * side, settings.width)
        _initialise(self)
        self.checkpoint = False

    def around(self, tokens: Tensor, batch: Batch, _valid: Tensor | None, size_px: int) -> tuple[Tensor, tuple[()]]:
        """Patches with their halo; see `LeafUNetEncoder.around`."""
        if self.halo:
            xy, size = batch["leaf_xy"], batch["leaf_size"]
            tokens = halo_patches(tokens, xy, size, batch["valid"], size_px, self.halo)
        return tokens, ()

    def _forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        x = self.stem2(F.relu(self.stem1(patches)))
        levels = [x]
        for down, mix in zip(self.downs, self.mixes, strict=True):
            x = mix(down(F.relu(x)))
            levels.append(x)
        return (self.project(x.flatten(1)), *levels)

    def forward(self, patches: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(M, C, p + 2 halo, p + 2 halo) to (M, D) token vectors and the features per level, finest first."""
        token, *levels = maybe_recompute(self, self._forward, patches)
        return token, levels


class LeafDecoder(nn.Module):
    """Token vectors and the encoder's features to p x p logits."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        widths = leaf_widths(data.patch, settings.leaf_base)
        side = data.patch >> (len(widths) - 1)
        self.project = nn.Linear(settings.width, widths[-1] * side * side)
        self.mix = Residual(widths[-1])
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.joins = nn.ModuleList(nn.Conv2d(2 * b, b, 3, padding=1) for _, b in pairs)
        self.mixes = nn.ModuleList(Residual(b) for _, b in pairs)
        self.out = nn.Conv2d(widths[0], data.classes, 1)
        _initialise(self)
        nn.init.normal_(self.out.weight, std=0.5 * widths[0] ** -0.5)  # first logits of order one
        self.checkpoint = False

    def _forward(self, token: Tensor, *levels: Tensor) -> Tensor:
        bottleneck = levels[-1]
        x = self.mix(bottleneck + self.project(token).unflatten(1, bottleneck.shape[1:]))
        for up, join, mix, skip in zip(self.ups, self.joins, self.mixes, levels[-2::-1], strict=True):
            x = mix(join(F.relu(torch.cat((up(F.relu(x)), skip), dim=1))))
        return cast(Tensor, self.out(F.relu(x)))

    def forward(self, token: Tensor, levels: list[Tensor]) -> Tensor:
        """(M, D) and the encoder's levels to (M, K, p, p)."""
        logits: Tensor = maybe_recompute(self, self._forward, token, *levels)
        return logits
