"""Resolution-invariant ViT: convolutions and adaptive pooling bring any image to one token grid.

Cui, Woo, Zheng: Resolution-Invariant ViT (2024). The transformer is a small teaching ViT: six layers, no norm in front
of attention, heads of free width. The paper does not give the width of the two convolutions; ours is 32.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import maybe_recompute
from hpc_models.blocks.network import Network
from hpc_models.blocks.sdpa import attend, merge_heads, split_heads
from hpc_models.classification.settings import RIViTSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, images_of


def sinusoidal(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """(length, width): sin(pos / 10000^(i / width)) in even columns i, the cosine of the same in odd ones.

    The exponent is i / width, as the source has it, not 2 * floor(i / 2) / width as in Vaswani et al.
    """
    i = torch.arange(width, device=device, dtype=torch.float32)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] / 10000 ** (i / width)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos())


class RelativeBias(nn.Module):
    """q_i . r_(j - i), added to the scores before their scaling; offsets are clipped to -reach..reach.

    Shaw et al. 2018; Huang et al. 2019.
    """

    def __init__(self, reach: int, head_width: int) -> None:
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(2 * reach + 1, head_width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, q: Tensor) -> Tensor:
        """(B, H, T, d) to (B, H, T, T)."""
        t = q.shape[2]
        place = torch.arange(t, device=q.device)
        offset = (place[None, :] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        scores = q @ self.table.t()
        return scores.gather(-1, offset.expand(*q.shape[:2], t, t))


class StockAttention(nn.Module):
    """Multi-head attention whose head width is free: D -> H x d -> D, all with bias."""

    def __init__(self, width: int, heads: int, head_width: int, reach: int | None) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.out_proj = nn.Linear(heads * head_width, width)
        self.relative = None if reach is None else RelativeBias(reach, head_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        bias = None if self.relative is None else self.relative(q) / math.sqrt(self.head_width)
        return cast(Tensor, self.out_proj(merge_heads(attend(q, k, v, bias=bias))))


class StockBlock(nn.Module):
    """x + attention(x), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int, head_width: int, mlp_dim: int, reach: int | None) -> None:
        super().__init__()
        self.attn = StockAttention(width, heads, head_width, reach)
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        x = x + self.attn(x)
        return cast(Tensor, x + self.linear2(F.gelu(self.linear1(self.norm(x)))))


class RIViT(Network):
    """The stock ViT, plain or behind convolutions that make every resolution the same number of tokens.

    With `conv`, every image has (grid_px / patch_px)^2 tokens. Without, the learned table has `tokens` rows, the
    largest number of patches.
    """

    def __init__(self, settings: RIViTSettings, data: DataShape) -> None:
        super().__init__(settings)
        width, channels = settings.width, data.in_channels
        self.patch_px, self.position = settings.patch_px, settings.position
        # Convolutions that pool every picture to one size.
        self.front, rows = None, settings.tokens
        if settings.conv:
            inner, rows = settings.conv_width, (settings.grid_px // self.patch_px) ** 2
            self.front = nn.Sequential(
                nn.Conv2d(channels, inner, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(settings.grid_px),
            )
            channels = inner
        # The transformer.
        self.embed = nn.Conv2d(channels, width, self.patch_px, self.patch_px)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.table = nn.Parameter(torch.zeros(1, rows, width)) if self.position == "learned" else None
        reach = settings.reach if self.position == "relative" else None
        self.blocks = nn.ModuleList(
            StockBlock(width, settings.heads, settings.head_width, settings.mlp_dim, reach)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, data.classes)
        for parameter in (self.cls, *([] if self.table is None else [self.table])):
            nn.init.trunc_normal_(parameter, std=0.02)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return [*([] if self.front is None else [self.front]), *self.blocks]

    def tokens_of(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to patch vectors (B, N, D) with their position code."""
        x = self.centred(image)
        if self.front is not None:
            x = self.front(x)
        elif image.shape[-1] % self.patch_px or image.shape[-2] % self.patch_px:
            raise ValueError(f"image sides {tuple(image.shape[-2:])} are no multiples of patch_px {self.patch_px}")
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.table is not None:
            if x.shape[1] > self.table.shape[1]:
                raise ValueError(f"{x.shape[1]} patches, but the learned table has tokens={self.table.shape[1]}")
            return cast(Tensor, x + self.table[:, : x.shape[1]])
        if self.position == "sinusoidal":
            return cast(Tensor, x + sinusoidal(x.shape[1], x.shape[2], x.device).to(x.dtype))
        return cast(Tensor, x)

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch.

        A batch with a true `features` asks for (B, classes + D): the class token follows the logits.
        """
        x = self.tokens_of(images_of(batch))
        x = torch.cat((self.cls.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        for block in self.blocks:
            x = maybe_recompute(self, block, x)
        first = x[:, 0]
        logits = self.head(self.norm(first))
        if isinstance(batch, dict) and batch.get("features"):
            return torch.cat((logits, first), dim=1)
        return cast(Tensor, logits)
