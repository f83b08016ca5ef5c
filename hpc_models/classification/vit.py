"""Vision transformers that give one answer per picture or slide: ViT on pixels, APF-ViT on token sets.

Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021). APF-ViT (SC24) is the same network on the leaves of a
quadtree: a whole slide has one label and a few thousand tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hpc_models.blocks.init import init_linears
from hpc_models.blocks.network import Network
from hpc_models.blocks.patch_embedding import PatchEmbedding
from hpc_models.blocks.pooled_vit import PooledViT
from hpc_models.classification.settings import APFViTSettings, ViTSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, all_valid, clear_padding, cut_patches, grid_of, images_of
from hpc_models.tokens.layout import cells_of
from hpc_models.tokens.position import LeafPosition, raster_slots


class _Classifier(Network):
    """Embedding, positions, pooled transformer, linear head.

    Patches lie in a square of `side_px`; `table_hw` is the grid of the learned table, where the settings ask for one.
    """

    def __init__(
        self,
        settings: ViTSettings | APFViTSettings,
        data: DataShape,
        *,
        patch: int,
        side_px: int,
        table_hw: tuple[int, int],
    ) -> None:
        super().__init__(settings)
        width, position = settings.width, settings.position
        self.patch = patch
        self.embed = PatchEmbedding(patch, data.in_channels, width)
        self.geom = LeafPosition(side_px, patch, width) if position in ("geom", "both") else None
        self.body = PooledViT(
            width,
            settings.depth,
            settings.heads,
            mlp_dim=settings.mlp_dim,
            pool=settings.pool,
            table_hw=table_hw if position in ("slot", "both") else None,
            dropout=settings.dropout,
            kind=getattr(settings, "attention", "full"),
            window=getattr(settings, "window", 256),
        )
        self.head = nn.Linear(width, data.classes)
        init_linears(self.head)
        self.set_checkpointing(settings.checkpointing)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        return list(self.body.vit.blocks)


class ViT(_Classifier):
    """ViT on pictures. Their sides, and `data.image_hw`, which the table is made for, are multiples of `patch_px`."""

    def __init__(self, settings: ViTSettings, data: DataShape) -> None:
        sides = data.image_hw or (data.size_px, data.size_px)
        grid = grid_of(sides, settings.patch_px)
        super().__init__(settings, data, patch=settings.patch_px, side_px=max(sides), table_hw=grid)

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        image = images_of(batch)
        rows, cols = grid_of(image.shape[-2:], self.patch)
        x = self.embed(cut_patches(self.centred(image), self.patch))
        if self.geom is not None:
            index = torch.arange(rows * cols, device=x.device)
            xy = torch.stack((index % cols, index // cols), dim=-1)[None] * self.patch
            x = x + self.geom(xy, torch.full((1, rows * cols), self.patch, device=x.device))
        return cast(Tensor, self.head(self.body(x, grid_hw=(rows, cols))))


class APFViT(_Classifier):
    """ViT on token sets, adaptive or uniform: one answer per slide.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, settings: APFViTSettings, data: DataShape) -> None:
        cells = cells_of(data)
        super().__init__(settings, data, patch=data.patch, side_px=data.size_px, table_hw=(1, data.length))
        self.cells, self.uniform = cells, data.length == cells**2

    def forward(self, batch: Batch) -> Tensor:
        """Class logits (B, classes); padding has no influence."""
        valid = None if all_valid(batch["valid"]) else batch["valid"]
        with_slots = self.uniform and self.body.table is not None
        slot = raster_slots(batch["leaf_xy"], self.patch, self.cells) if with_slots else None
        x = self.embed(clear_padding(self.centred(batch["tokens"]), valid))
        if self.geom is not None:
            x = x + self.geom(batch["leaf_xy"], batch["leaf_size"])
        return cast(Tensor, self.head(self.body(x, valid, slot)))
