"""HIPT: a pyramid of three transformers over patches of 16, 256 and 4096 pixels.

Chen et al., Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning (CVPR 2022):
ViT-S/16 turns each 256-px square into a vector, and a small ViT the 16 x 16 squares of a 4096-px region. Two
transformer layers with gated attention pooling (Ilse et al. 2018) answer for the regions of a slide. The authors train
the lower two levels beforehand, without labels; here all three learn together.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.init import init_linears
from hpc_models.blocks.network import Network
from hpc_models.blocks.patch_embedding import PatchEmbedding
from hpc_models.blocks.pooled_vit import PooledViT
from hpc_models.classification.settings import HIPTSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, cut_patches, grid_of, images_of


class SquareLevel(nn.Module):
    """Level 1: squares of pixels to vectors (ViT-S/16 by default, 21,665,664 weights)."""

    def __init__(self, patch_px: int, in_channels: int, width: int, depth: int, heads: int, table_side: int) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.embed = PatchEmbedding(patch_px, in_channels, width)
        self.body = PooledViT(width, depth, heads, table_hw=(table_side, table_side))

    def forward(self, squares: Tensor) -> Tensor:
        """(N, s, s, C) to (N, D)."""
        side = squares.shape[1] // self.patch_px
        patches = cut_patches(squares.permute(0, 3, 1, 2), self.patch_px)
        return cast(Tensor, self.body(self.embed(patches), grid_hw=(side, side)))


class RegionLevel(nn.Module):
    """Level 2: the square vectors of a region to one vector (2,781,504 weights by default)."""

    def __init__(self, in_width: int, width: int, depth: int, heads: int, table_side: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_width, width)
        init_linears(self.project)
        self.body = PooledViT(width, depth, heads, table_hw=(table_side, table_side))

    def forward(self, x: Tensor, side: int) -> Tensor:
        """(N, side * side, D_in) in raster order to (N, D)."""
        return cast(Tensor, self.body(F.gelu(self.project(x)), grid_hw=(side, side)))


class GatedPool(nn.Module):
    """Mean of a set with learned weights: softmax of w^T (tanh(V h) * sigmoid(U h)) (Ilse et al. 2018, equation 9)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.tanh = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        a = F.dropout(torch.tanh(self.tanh(x)), self.dropout, self.training)
        b = F.dropout(torch.sigmoid(self.gate(x)), self.dropout, self.training)
        return cast(Tensor, (self.score(a * b).softmax(dim=1) * x).sum(dim=1))


class SlideLevel(nn.Module):
    """Level 3: the region vectors of a slide, in any order and number, to class logits."""

    def __init__(self, width: int, depth: int, heads: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, width, dropout, activation="relu", batch_first=True)
            for _ in range(depth)
        )
        self.pool = GatedPool(width, dropout)
        self.last = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, classes)."""
        x = F.dropout(F.relu(self.first(x)), self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = F.dropout(F.relu(self.last(self.pool(x))), self.dropout, self.training)
        return cast(Tensor, self.head(x))


class HIPT(Network):
    """Three levels from pixels to a label.

    Sides of pictures (`image_hw`) are multiples of the region. Or uniform tokens are the squares of level 1: patch is
    the square's side, length (R / p)^2, and size_px a multiple of the region.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, settings: HIPTSettings, data: DataShape) -> None:
        super().__init__(settings)
        # Do the sizes fit?
        small, square, region = settings.scales
        count = (data.size_px // square) ** 2
        if data.length > 1:
            if data.patch != square or data.length != count:
                raise ValueError(
                    f"hipt takes uniform tokens of {square} px, {count} of them at {data.size_px} px; "
                    f"got patch {data.patch} and length {data.length}"
                )
            if data.size_px % region:
                raise ValueError(f"size_px {data.size_px} is not a multiple of the region of {region} px")
        elif data.image_hw is not None:
            grid_of(data.image_hw, region, "the region of {} px")
        self.size_px, self.square, self.region = data.size_px, square, region

        # The levels, from pixels upwards.
        widths, depths, heads, side = settings.widths, settings.depths, settings.heads, settings.table_side
        self.squares = SquareLevel(small, data.in_channels, widths[0], depths[0], heads[0], side)
        self.regions = RegionLevel(widths[0], widths[1], depths[1], heads[1], side)
        self.slide = SlideLevel(widths[1], depths[2], heads[2], data.classes, settings.dropout)
        self.set_checkpointing(settings.checkpointing)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return [*self.squares.body.vit.blocks, *self.regions.body.vit.blocks, *self.slide.blocks]

    def _squares_of(self, batch: Batch | Tensor) -> Tensor:
        """(B, regions, squares per region, s, s, C), squares in raster order within their region."""
        if isinstance(batch, dict) and "image" not in batch:
            return self._from_tokens(batch)
        image = images_of(batch)
        grid_of(image.shape[-2:], self.region, "the region of {} px")
        regions = cut_patches(image, self.region)
        b, n = regions.shape[:2]
        squares = cut_patches(regions.flatten(0, 1).permute(0, 3, 1, 2), self.square)
        return cast(Tensor, squares.unflatten(0, (b, n)))

    def _from_tokens(self, batch: Batch) -> Tensor:
        """Bring uniform tokens of any order to the order of regions and squares."""
        per_side, across = self.region // self.square, self.size_px // self.region
        place = batch["leaf_xy"].div(self.square, rounding_mode="floor")
        region = place.div(per_side, rounding_mode="floor")
        inner = place - region * per_side
        rank = (region[..., 1] * across + region[..., 0]) * per_side**2 + inner[..., 1] * per_side + inner[..., 0]
        order = rank.argsort(dim=1)
        b = len(order)
        tokens = batch["tokens"][torch.arange(b, device=order.device)[:, None], order]
        return cast(Tensor, tokens.unflatten(1, (across**2, per_side**2)))

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1] or of uniform token sets."""
        squares = self.centred(self._squares_of(batch))
        b, n, m = squares.shape[:3]
        x = self.squares(squares.flatten(0, 2)).unflatten(0, (b * n, m))
        x = self.regions(x, self.region // self.square).unflatten(0, (b, n))
        return recompute(self, self.slide, x)
