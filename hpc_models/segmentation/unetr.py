"""UNETR on sequences of leaves: any patch size, five decoders; single device, imports torch and this folder only.

With uniform leaves, P = 16, decoder "raster" or "geometric" and position "slot" it is MONAI's UNETR, weight for weight
(Hatamizadeh et al., UNETR, WACV 2022). With a quadtree it is APF-UNETR (SC24).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from hpc_models.blocks.init import init_linears, set_prior
from hpc_models.blocks.network import Network
from hpc_models.blocks.patch_embedding import PatchEmbedding
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, all_valid, cut_patches, join_patches, pack, unpack
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.layout import (
    GeometricLayout,
    SequenceLayout,
    cells_of,
    grid_side,
    leaves_to_strip,
    strip_to_leaves,
)
from hpc_models.tokens.position import Position

PICTURE = ("raster", "geometric")  # decoders that see the tokens as a picture
BY_LEAF = ("leaf", "leaf_unet")  # decoders that compute valid leaves only, packed
# What stands before the transformer, the blocks whose states the decoder taps, and what makes the decoder.
Ends = tuple[nn.Module, list[int], Callable[[], nn.Module]]


class TokenHead(nn.Module):
    """One linear map per token to its p x p logits."""

    def __init__(self, patch: int, width: int, classes: int) -> None:
        super().__init__()
        self.shape = (patch, patch, classes)
        self.out = nn.Linear(width, patch * patch * classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, p, p, K)."""
        x = self.out(x)
        return x.unflatten(-1, self.shape)


def _picture_ends(settings: UNETRSettings, data: DataShape) -> Ends:
    from hpc_models.segmentation.conv_decoder import ConvDecoder

    embed = PatchEmbedding(data.patch, data.in_channels, settings.width)
    sizes = (data.patch, data.in_channels, settings.width, settings.feature_size, data.classes)
    return embed, ConvDecoder.taps(data.patch, settings.depth), lambda: ConvDecoder(*sizes)


def _token_ends(settings: UNETRSettings, data: DataShape) -> Ends:
    embed = PatchEmbedding(data.patch, data.in_channels, settings.width)
    return embed, [], lambda: TokenHead(data.patch, settings.width, data.classes)


def _leaf_ends(settings: UNETRSettings, data: DataShape) -> Ends:
    from hpc_models.segmentation.leaf_cnn import LeafDecoder, LeafEncoder, leaf_widths

    p, width, widths = data.patch, settings.width, leaf_widths(data.patch, settings.leaf_base)
    embed = LeafEncoder(p, data.in_channels, width, widths, settings.halo)
    return embed, [], lambda: LeafDecoder(p, width, widths, data.classes)


def _leaf_unet_ends(settings: UNETRSettings, data: DataShape) -> Ends:
    from hpc_models.segmentation.leaf_unet import LeafUNetDecoder, LeafUNetEncoder, leaf_unet_widths

    p, width, widths = data.patch, settings.width, leaf_unet_widths(data.patch, settings.leaf_base)
    embed = LeafUNetEncoder(p, data.in_channels, width, widths, settings.standardise, across=settings.seams)
    return embed, [], lambda: LeafUNetDecoder(p, width, widths, data.classes, settings.standardise)


DECODERS: dict[str, Callable[[UNETRSettings, DataShape], Ends]] = {
    "raster": _picture_ends,
    "geometric": _picture_ends,
    "token": _token_ends,
    "leaf": _leaf_ends,
    "leaf_unet": _leaf_unet_ends,
}


class UNETR(Network):
    """Transformer segmentation of a token set.

    Args:
        settings: the decoder, the transformer, ...
        data: patch p is a power of two of at least 2, size_px R is p * 2^k.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        # 1. Do the sizes fit?
        if data.patch < 2 or not is_power_of_two(data.patch):
            raise ValueError(f"patch must be a power of two of at least 2, got {data.patch}")
        self.size_px, self.patch, self.length, self.cells = data.size_px, data.patch, data.length, cells_of(data)
        self.uniform = data.length == self.cells**2
        self.decoder_kind, self.packing, self.normalise = settings.decoder, settings.packing, settings.normalise
        if self.packing == "strip" and self.uniform:
            raise ValueError(
                f"packing=strip is for trees: length must be less than (size_px / patch)^2 = {data.length}"
            )
        self.grid = grid_side(data.length, self.cells, settings.grid)
        if self.decoder_kind == "raster" and not self.uniform:
            SequenceLayout(data.length, data.patch)  # refuses a length that is not a square now, not at the first step

        # 2. The parts, in the order of the data; their weights are drawn in this order.
        self.embed, taps, make_decoder = DECODERS[settings.decoder](settings, data)
        self.position = Position(settings.position, data, settings.width)
        self.vit = ViTEncoder(
            settings.width,
            settings.depth,
            settings.heads,
            settings.mlp_dim or 4 * settings.width,
            taps=taps,
            spare_norm=settings.decoder in PICTURE,
            qkv_bias=settings.qkv_bias,
            dropout=settings.dropout,
            kind=settings.attention,
            window=settings.window,
        )
        self.decoder = make_decoder()

        # 3. How training starts.
        init_linears(self.vit)
        if settings.decoder == "token":
            init_linears(self.decoder)
        set_prior(self.decoder.out.bias, settings.prior)  # type: ignore[union-attr,arg-type]
        self.set_checkpointing(settings.checkpointing)

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        by_leaf = self.decoder_kind in BY_LEAF
        parts = getattr(self.decoder, "fsdp_units", lambda: [self.decoder])()
        return [*([self.embed] if by_leaf else []), *self.vit.blocks, *parts]

    def blocks_to_compile(self) -> list[nn.Module]:
        """The transformer's blocks, were it a single one, beside networks that see another number of leaves each step.

        Empty for other decoders, whose units are told apart by how often they occur.
        """
        return [*self.vit.blocks] if self.decoder_kind in BY_LEAF else []

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Per-cell logits of every token.

        Args:
            batch: see `Batch`. A tensor is taken as `forward_image` takes it, so that wrappers (which only see
                `forward`) serve both.

        Returns:
            (B, L, p, p, K). Rows of padding are finite and mean nothing; what stands in them has no influence.
        """
        if isinstance(batch, Tensor):
            return self.forward_image(batch)
        slot = None
        if self.uniform:
            place = batch["leaf_xy"] // self.patch
            slot = place[..., 1] * self.cells + place[..., 0]
        layout: GeometricLayout | SequenceLayout | None = None
        if self.decoder_kind == "raster" and not self.uniform:
            layout = SequenceLayout(batch["tokens"].shape[1], self.patch)
        elif self.decoder_kind in PICTURE:
            grid = self.cells if self.decoder_kind == "raster" else self.grid
            layout = GeometricLayout(batch, self.size_px, self.patch, grid)
        if self.packing == "leaf":
            return self._logits(batch, slot, layout)
        batch = Batch(**{**batch, "tokens": leaves_to_strip(batch["tokens"], batch["valid"])})
        return strip_to_leaves(self._logits(batch, slot, layout), batch["valid"])

    def forward_image(self, image: Tensor) -> Tensor:
        """Segment whole images by uniform patching, tokens in raster order, as UNETR does.

        Args:
            image: (B, C, R, R) in [0, 1] (any range with normalise=False).

        Returns:
            (B, K, R, R) logits.

        Raises:
            ValueError: the model was not built for uniform patching of this size.
        """
        b, _, h, w = image.shape
        cells = self.cells
        if (h, w) != (self.size_px, self.size_px) or not self.uniform:
            raise ValueError(
                f"forward_image takes {self.size_px}x{self.size_px} images of a model with length={cells**2}; "
                f"got {h}x{w} and length={self.length}"
            )
        index = torch.arange(cells * cells, device=image.device)
        xy = torch.stack((index % cells, index // cells), dim=-1) * self.patch
        batch = Batch(
            tokens=cut_patches(image, self.patch),
            leaf_xy=xy.expand(b, -1, -1),
            leaf_size=torch.full((b, cells * cells), self.patch, dtype=torch.int64, device=image.device),
            valid=torch.ones((b, cells * cells), dtype=torch.bool, device=image.device),
        )
        layout: GeometricLayout | SequenceLayout = SequenceLayout(cells * cells, self.patch)
        if self.decoder_kind == "geometric" and self.grid != cells:
            layout = GeometricLayout(batch, self.size_px, self.patch, self.grid)
        return join_patches(self._logits(batch, None, layout), cells, cells)

    def _logits(self, batch: Batch, slot: Tensor | None, layout: GeometricLayout | SequenceLayout | None) -> Tensor:
        # Tokens to vectors. What stands in padding is cleared wherever it could reach a valid token.
        valid = None if all_valid(batch["valid"]) else batch["valid"]
        tokens = _clear(self.centred(batch["tokens"]), valid)
        by_leaf = self.decoder_kind in BY_LEAF
        if by_leaf:
            # Only real leaves go through the convolutions: a padded batch costs what its tokens cost.
            patches, seams = self.embed.around(tokens, batch, valid, self.size_px)  # type: ignore[operator]
            vectors, levels = self.embed(pack(patches, valid).permute(0, 3, 1, 2), *seams)
            x = unpack(vectors, batch["valid"], valid)
        else:
            x = self.embed(tokens)

        # The transformer.
        x = _clear(self.position(x, slot, batch["leaf_xy"], batch["leaf_size"]), valid)
        last, taps = self.vit(x, valid)

        # Vectors to logits per cell.
        if by_leaf:
            rows = self.decoder(pack(last, valid), levels, *seams)
            return unpack(rows.permute(0, 2, 3, 1), batch["valid"], valid)
        if layout is None:
            return cast(Tensor, self.decoder(last))
        last, *taps = (layout.to_grid(_clear(state, valid)) for state in (last, *taps))
        return layout.to_cells(self.decoder(layout.image(tokens), taps, last))


def _clear(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, L, ...) with zeros in padding; None: there is none."""
    return x if valid is None else x.masked_fill(~valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), 0)
