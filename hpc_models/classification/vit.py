"""Vision transformers that give one answer per picture or slide: ViT on pixels, APF-ViT on token sets; torch only.

Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021). APF-ViT (SC24) is the same network on the leaves of a
quadtree, so a whole slide has one label and a few thousand tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpc_models.blocks.attention import Block
from hpc_models.blocks.init import init_linears, set_norm_eps
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.unetr import PatchEmbedding
from hpc_models.tokens.batch import Batch, all_valid, cut_patches, images_of
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.position import POSITIONS, LeafPosition, resize_table

POOLS = ("cls", "mean")


class PooledViT(nn.Module):
    """A learned table of positions, transformer blocks, and one vector per sequence.

    Args:
        width: D.
        depth: transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the blocks' MLPs; 4 * width when None.
        pool: "cls" (a token of its own, with a row of the table) or "mean" (of the valid tokens).
        table_hw: grid of the table, (1, L) for sequences without one; None: no table.
        dropout: in attention and MLP.
        attention: see `Attention`.
        window: tokens per window.

    Raises:
        ValueError: unknown pool, or one that does not go with the attention.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_dim: int | None = None,
        pool: str = "cls",
        table_hw: tuple[int, int] | None = None,
        dropout: float = 0.0,
        attention: str = "full",
        window: int = 256,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if pool == "cls" and attention == "window":
            raise ValueError("with attention=window the class token sees the first window alone: use pool=mean")
        self.table_hw = table_hw
        self.cls = nn.Parameter(torch.zeros(1, 1, width)) if pool == "cls" else None
        rows = 0 if table_hw is None else table_hw[0] * table_hw[1] + (pool == "cls")
        self.table = nn.Parameter(torch.zeros(1, rows, width)) if rows else None
        self.vit = ViTEncoder(
            width, depth, heads, mlp_dim or 4 * width, (), True, dropout, kind=attention, window=window
        )
        init_linears(self.vit)
        set_norm_eps(self.vit, 1e-6)
        for parameter in (self.cls, self.table):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def _rows(self, count: int, slot: Tensor | None, grid_hw: tuple[int, int] | None) -> Tensor:
        """Rows of the table for the tokens, (1 or B, count, D)."""
        assert self.table is not None and self.table_hw is not None
        table = self.table if self.cls is None else self.table[:, 1:]
        if slot is not None:
            return table[0][slot]
        if grid_hw is not None:
            return resize_table(table, self.table_hw, grid_hw)
        if count > table.shape[1]:
            raise ValueError(f"sequence of {count} tokens, but the slot table has length={table.shape[1]}")
        return table[:, :count]

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        slot: Tensor | None = None,
        grid_hw: tuple[int, int] | None = None,
    ) -> Tensor:
        """Pool.

        Args:
            x: (B, L, D) token vectors.
            valid: (B, L) bool, None when every token is real.
            slot: (B, L) int64 rows of the table; None: row i for token i.
            grid_hw: grid of the tokens in raster order; the table is interpolated to it.

        Returns:
            (B, D).
        """
        if self.table is not None:
            x = x + self._rows(x.shape[1], slot, grid_hw)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        if self.cls is not None:
            first = self.cls if self.table is None else self.cls + self.table[:, :1]
            x = torch.cat((first.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
            mask = None if valid is None else torch.cat((valid.new_ones(len(valid), 1), valid), dim=1)
            return self.vit(x, mask)[0][:, 0]
        x, _ = self.vit(x, valid)
        if valid is None:
            return x.mean(dim=1)
        return x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


class _Classifier(nn.Module):
    """What both classifiers share: embedding, positions, pooled transformer, linear head."""

    task = "classification"
    embed: PatchEmbedding
    geom: LeafPosition | None
    body: PooledViT
    head: nn.Linear

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing of the blocks; results do not change."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpoint = on

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        return list(self.body.vit.blocks)

    def _finish(self, width: int, classes: int, checkpointing: bool) -> None:
        self.head = nn.Linear(width, classes)
        init_linears(self.head)
        self.set_checkpointing(checkpointing)


class ViT(_Classifier):
    """ViT on pictures; ViT-B/16 with the default sizes.

    Args:
        image_hw: (H, W) that the table of positions is made for, multiples of `patch_px`; other sizes interpolate it.
        classes: classes.
        in_channels: channels of the picture.
        patch_px: side of a patch in pixels.
        width: D.
        depth: transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the blocks' MLPs; 4 * width when None.
        pool: "cls" or "mean"; see `PooledViT`.
        position: "slot" (learned table), "geom" (Fourier features of the patch's place), "both" or "none".
        dropout: in attention and MLP.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: sides that are no multiples of the patch, unknown pool or position.
    """

    inputs = ("images", "tiles")

    def __init__(
        self,
        image_hw: tuple[int, int] = (224, 224),
        classes: int = 1000,
        in_channels: int = 3,
        patch_px: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        pool: str = "cls",
        position: str = "slot",
        dropout: float = 0.0,
        normalise: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_position(position)
        self.patch_px, self.normalise = patch_px, normalise
        grid = self._grid(image_hw)
        self.embed = PatchEmbedding(patch_px, in_channels, width)
        side_px = max(image_hw)
        self.geom = LeafPosition(side_px, patch_px, width) if position in ("geom", "both") else None
        self.body = PooledViT(
            width, depth, heads, mlp_dim, pool, grid if position in ("slot", "both") else None, dropout
        )
        self._finish(width, classes, checkpointing)

    def _grid(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        h, w = image_hw
        if h % self.patch_px or w % self.patch_px:
            raise ValueError(f"picture sides {h}x{w} are no multiples of patch_px {self.patch_px}")
        return h // self.patch_px, w // self.patch_px

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        image = images_of(batch)
        rows, cols = self._grid((image.shape[-2], image.shape[-1]))
        x = self.embed(cut_patches((image - 0.5) / 0.5 if self.normalise else image, self.patch_px))
        if self.geom is not None:
            index = torch.arange(rows * cols, device=x.device)
            xy = torch.stack((index % cols, index // cols), dim=-1)[None] * self.patch_px
            x = x + self.geom(xy, torch.full((1, rows * cols), self.patch_px, device=x.device))
        return self.head(self.body(x, grid_hw=(rows, cols)))


class APFViT(_Classifier):
    """ViT on token sets, adaptive or uniform: one answer per slide.

    Args:
        size_px: side R of the frame.
        patch: p, cells per token side.
        length: L, tokens per sequence after padding. (R / p)^2 means uniform patching: tokens then take the row of
            their place in the frame, whatever their order.
        classes: classes.
        in_channels: channels of a token.
        width: D.
        depth: transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the blocks' MLPs; 4 * width when None.
        pool: "cls" or "mean"; see `PooledViT`.
        position: "slot", "geom", "both" or "none"; see `Position`.
        dropout: in attention and MLP.
        attention: "full", "packed" (computes valid tokens only) or "window"; see `Attention`.
        window: tokens per window.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: sizes that do not fit each other, unknown pool or position.
    """

    inputs = ("tokens",)

    def __init__(
        self,
        size_px: int,
        patch: int,
        length: int,
        classes: int = 2,
        in_channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        pool: str = "mean",
        position: str = "geom",
        dropout: float = 0.0,
        attention: str = "full",
        window: int = 256,
        normalise: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_position(position)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if size_px % patch or not is_power_of_two(size_px // patch):
            raise ValueError(f"size_px must be patch * 2^k, got {size_px} with patch {patch}")
        self.patch, self.cells, self.normalise = patch, size_px // patch, normalise
        self.uniform = length == self.cells**2
        self.embed = PatchEmbedding(patch, in_channels, width)
        self.geom = LeafPosition(size_px, patch, width) if position in ("geom", "both") else None
        table = (1, length) if position in ("slot", "both") else None
        self.body = PooledViT(width, depth, heads, mlp_dim, pool, table, dropout, attention, window)
        self._finish(width, classes, checkpointing)

    def forward(self, batch: Batch) -> Tensor:
        """Class logits (B, classes); padding has no influence."""
        tokens, xy = batch["tokens"], batch["leaf_xy"]
        valid = None if all_valid(batch["valid"]) else batch["valid"]
        if self.normalise:
            tokens = (tokens - 0.5) / 0.5
        if valid is not None:
            tokens = tokens.masked_fill(~valid[:, :, None, None, None], 0)
        slot = None
        if self.uniform and self.body.table is not None:
            place = xy.div(self.patch, rounding_mode="floor").clamp(0, self.cells - 1)
            slot = place[..., 1] * self.cells + place[..., 0]
        x = self.embed(tokens)
        if self.geom is not None:
            x = x + self.geom(xy, batch["leaf_size"])
        return self.head(self.body(x, valid, slot))


def _check_position(position: str) -> None:
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
