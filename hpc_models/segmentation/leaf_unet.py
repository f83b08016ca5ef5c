"""U-Net over the leaves of a tree whose convolutions read across the borders of leaves.

`leaf_cnn` sees every leaf alone, so a vessel that leaves one is cut there. Here each 3x3 convolution first takes the
row of features around each leaf from the leaves beside it, at its own resolution. A coarser neighbour lends the cell
that covers the place, a finer one the cell at its middle. On uniform leaves this equals, up to rounding, the
convolution of the whole picture with zeros around it. It costs (4 p + 4) / p^2 more reads per leaf.

Features are normalised over all leaves of one image, so results depend neither on the batch nor on the ranks. The
transformer joins at the bottleneck, as in `leaf_cnn`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import maybe_recompute
from hpc_models.blocks.conv import conv3x3
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch
from hpc_models.tokens.geometry import ring_cells, ring_steps

_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward


def leaf_unet_widths(patch: int, base: int = 16) -> tuple[int, ...]:
    """Channels per level, finest first: base, base, 2 base, 4 base, at most 8 base.

    The coarsest level has p/8 cells a side, at least 1 and at most 4.
    """
    bits = patch.bit_length() - 1
    halvings = max(min(bits, 3), bits - 2)
    return tuple(base * min(8, 1 << max(0, i - 1)) for i in range(halvings + 1))


class Seams:
    """What lies around the leaves of one batch, at levels with `sides` cells per leaf side.

    `valid` None means that every row is a leaf. Without `across`, zeros lie around every leaf.

    Attributes:
        counts: leaves of each image.
        around: per side q, (M * (4 q + 4),) rows of the flattened features (M * q * q, C), 0 where there is no leaf;
            see `ring_cells`. None: zeros everywhere.
        beyond: per side q, (M * (4 q + 4), 1) bool: there is no leaf.
        slots: per side q, the places in a square of q + 2 cells; see `ring_steps`.
    """

    def __init__(
        self,
        leaf_xy: Tensor,
        leaf_size: Tensor,
        valid: Tensor | None,
        size_px: int,
        sides: Sequence[int],
        across: bool = True,
    ) -> None:
        b, n = leaf_size.shape
        self.counts: list[int] = [n] * b if valid is None else valid.sum(1).tolist()
        self.around: dict[int, Tensor] | None = None
        self.beyond: dict[int, Tensor] = {}
        self.slots: dict[int, Tensor] = {}
        if across:
            self.slots = {q: ring_steps(q)[1].to(leaf_xy.device) for q in sides}
            rings = ring_cells(leaf_xy, leaf_size, valid, size_px, sides)
            found = {q: rows.flatten() for q, rows in zip(sides, rings, strict=True)}
            self.beyond = {q: (rows < 0)[:, None] for q, rows in found.items()}
            self.around = {q: rows.clamp(min=0) for q, rows in found.items()}


class _Surround(torch.autograd.Function):
    """(M, q, q, C_i) side by side as (M, q + 2, q + 2, C), with the ring read from other rows, perhaps after a ReLU.

    Joining, ReLU and widening are one pass over the features, to save memory traffic.
    """

    @staticmethod
    def forward(ctx: Any, around: Tensor, beyond: Tensor, slots: Tensor, relu: bool, *parts: Tensor) -> Tensor:
        m, q = parts[0].shape[:2]
        widths = [part.shape[-1] for part in parts]
        wide = parts[0].new_empty(m, q + 2, q + 2, sum(widths))
        cells = wide.view(m, (q + 2) ** 2, sum(widths))
        at = 0
        for part, c in zip(parts, widths, strict=True):
            ring = part.reshape(-1, c).index_select(0, around).masked_fill_(beyond, 0)
            inner = wide[:, 1:-1, 1:-1, at : at + c]
            if relu:
                torch.clamp(part, min=0, out=inner)
                ring.clamp_(min=0)
            else:
                inner.copy_(part)
            cells[:, slots, at : at + c] = ring.view(m, len(slots), c)
            at += c
        ctx.relu, ctx.widths = relu, widths
        ctx.save_for_backward(around, beyond, slots, *((wide,) if relu else ()))
        return wide

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        around, beyond, slots, *wide = ctx.saved_tensors
        gradient = gradients[0]
        m, w, _, channels = gradient.shape
        inner = gradient[:, 1:-1, 1:-1]
        ring = gradient.reshape(m, w * w, channels)[:, slots]
        # Through the ReLU. Beyond all leaves the ring is 0, so it gets no gradient.
        if ctx.relu:
            inner = _THRESHOLD_BACKWARD(inner, wide[0][:, 1:-1, 1:-1], 0)
            ring = _THRESHOLD_BACKWARD(ring, wide[0].view(m, w * w, channels)[:, slots], 0)
        ring = ring.view(-1, channels)
        if not ctx.relu:
            ring.masked_fill_(beyond, 0)
        # To the cells of the leaf itself, and to the cells that lent the ring.
        found: list[Tensor] = []
        at = 0
        for c in ctx.widths:
            own = inner[..., at : at + c]
            own = own.contiguous() if ctx.relu else own.clone(memory_format=torch.contiguous_format)
            own.view(-1, c).index_add_(0, around, ring[:, at : at + c])
            found.append(own)
            at += c
        return (None, None, None, None, *found)


def surround(x: Tensor, seams: Seams, beside: Tensor | None = None, relu: bool = False) -> Tensor:
    """Widen every leaf's features by one cell, read from the leaves around: (M, C + C2, q + 2, q + 2).

    `beside` (M, C2, q, q) joins x (M, C, q, q) as further channels. With `relu` a ReLU comes first.
    """
    parts = [x] if beside is None else [x, beside]
    if seams.around is None:
        joined = x if beside is None else torch.cat(parts, dim=1)
        return F.pad(F.relu(joined) if relu else joined, (1, 1, 1, 1))
    q = x.shape[-1]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    rows = [part.to(dtype).permute(0, 2, 3, 1).contiguous() for part in parts]
    places = (seams.around[q], seams.beyond[q], seams.slots[q])
    wide: Tensor = _Surround.apply(*places, relu, *rows)  # type: ignore[no-untyped-call]
    return wide.permute(0, 3, 1, 2)


class LeafConv(nn.Module):
    """3x3 convolution of widened leaves, norm over the leaves of each image; the norm's bias is the only one."""

    def __init__(self, in_channels: int, out_channels: int, standardise: bool = False) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels, 0, standardise)
        self.weight = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, wide: Tensor, seams: Seams) -> Tensor:
        """(M, C_in, q + 2, q + 2) of `surround` to (M, C_out, q, q), before the ReLU that `surround` can do."""
        normal = [self._norm(part) for part in self.conv(wide).split(seams.counts)]
        return normal[0] if len(normal) == 1 else torch.cat(normal)

    def _norm(self, y: Tensor) -> Tensor:
        if y.shape[0] * y.shape[2] * y.shape[3] < 2:  # one value alone equals its mean
            return (y - y) * self.weight[:, None, None] + self.bias[:, None, None]
        return F.batch_norm(y, None, None, self.weight, self.bias, training=True)


class _Double(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, standardise: bool) -> None:
        super().__init__()
        self.conv1 = LeafConv(in_channels, out_channels, standardise)
        self.conv2 = LeafConv(out_channels, out_channels, standardise)

    def forward(self, x: Tensor, seams: Seams, beside: Tensor | None = None) -> Tensor:
        y = self.conv1(surround(x, seams, beside), seams)
        return F.relu(self.conv2(surround(y, seams, relu=True), seams), inplace=True)


class LeafUNetEncoder(nn.Module):
    """Patches to token vectors, keeping the features of each level for the decoder."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        widths, standardise = leaf_unet_widths(data.patch, settings.leaf_base), settings.standardise
        self.sides, self.across = [data.patch >> level for level in range(len(widths))], settings.seams
        self.blocks = nn.ModuleList(_Double(a, b, standardise) for a, b in pairwise((data.in_channels, *widths)))
        self.project = nn.Linear(widths[-1] * self.sides[-1] ** 2, settings.width)
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        nn.init.zeros_(self.project.bias)
        self.checkpoint = False

    def around(self, tokens: Tensor, batch: Batch, valid: Tensor | None, size_px: int) -> tuple[Tensor, tuple[Seams]]:
        """Patches (B, L, p, p, C), and what else encoder and decoder need: the places around every leaf."""
        seams = Seams(batch["leaf_xy"], batch["leaf_size"], valid, size_px, self.sides, self.across)
        return tokens, (seams,)

    def _forward(self, patches: Tensor, seams: Seams) -> tuple[Tensor, ...]:
        levels = []
        x = patches
        for i, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if i else x, seams)
            levels.append(x)
        return (self.project(x.flatten(1)), *levels)

    def forward(self, patches: Tensor, seams: Seams) -> tuple[Tensor, list[Tensor]]:
        """(M, C, p, p) to (M, D) token vectors and the features per level, finest first."""
        token, *levels = maybe_recompute(self, self._forward, patches, seams)
        return token, levels


class LeafUNetDecoder(nn.Module):
    """Token vectors and the encoder's features to p x p logits."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        widths, standardise = leaf_unet_widths(data.patch, settings.leaf_base), settings.standardise
        side = data.patch >> (len(widths) - 1)
        self.project = nn.Linear(settings.width, widths[-1] * side * side)
        # A quarter of the bottleneck's variance: the token must not drown what the leaf shows.
        nn.init.normal_(self.project.weight, std=0.5 * settings.width**-0.5)
        nn.init.zeros_(self.project.bias)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.blocks = nn.ModuleList(_Double(2 * b, b, standardise) for _, b in pairs)
        self.out = nn.Conv2d(widths[0], data.classes, 1)
        self.checkpoint = False

    def _forward(self, token: Tensor, seams: Seams, *levels: Tensor) -> Tensor:
        x = levels[-1] + self.project(token).unflatten(1, levels[-1].shape[1:])
        for up, block, skip in zip(self.ups, self.blocks, levels[-2::-1], strict=True):
            x = block(skip, seams, up(x))
        return cast(Tensor, self.out(x))

    def forward(self, token: Tensor, levels: list[Tensor], seams: Seams) -> Tensor:
        """(M, D) and the encoder's levels to (M, K, p, p)."""
        logits: Tensor = maybe_recompute(self, self._forward, token, seams, *levels)
        return logits
