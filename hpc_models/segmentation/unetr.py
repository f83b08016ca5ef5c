"""UNETR on sequences of leaves, with any patch size and five decoders.

With uniform leaves, P = 16, decoder "raster" or "geometric" and position "slot" it is MONAI's UNETR, weight for weight
(Hatamizadeh et al., UNETR, WACV 2022). With a quadtree it is APF-UNETR (SC24).
"""

from __future__ import annotations

import importlib
from typing import Any, cast

from torch import Tensor, nn

from hpc_models.blocks.init import init_linears, set_prior
from hpc_models.blocks.network import Network
from hpc_models.blocks.patch_embedding import PatchEmbedding
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, all_valid, clear_padding, pack, unpack
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.layout import (
    GeometricLayout,
    SequenceLayout,
    cells_of,
    grid_side,
    leaves_to_strip,
    strip_to_leaves,
)
from hpc_models.tokens.position import Position, raster_slots

PICTURE = ("raster", "geometric")  # decoders that see the tokens as a picture
BY_LEAF = ("leaf", "leaf_unet")  # decoders that compute valid leaves only, packed
# Decoder: module of this room, its class before the transformer (none: a linear embedding), its class behind it.
DECODERS: dict[str, tuple[str, str | None, str]] = {
    "raster": ("conv_decoder", None, "ConvDecoder"),
    "geometric": ("conv_decoder", None, "ConvDecoder"),
    "token": ("unetr", None, "TokenHead"),
    "leaf": ("leaf_cnn", "LeafEncoder", "LeafDecoder"),
    "leaf_unet": ("leaf_unet", "LeafUNetEncoder", "LeafUNetDecoder"),
}


class TokenHead(nn.Module):
    """One linear map per token to its p x p logits."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        self.shape = (data.patch, data.patch, data.classes)
        self.out = nn.Linear(settings.width, data.patch**2 * data.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, p, p, K)."""
        return cast(Tensor, self.out(x).unflatten(-1, self.shape))


def _taps(patch: int, depth: int) -> list[int]:
    """0-based blocks that feed the projections of `ConvDecoder`, finest first: every depth / log2(p) blocks."""
    k = patch.bit_length() - 1
    return [min(i * depth // k, depth - 1) for i in range(1, k)]


class UNETR(Network):
    """Transformer segmentation of a token set.

    Raises:
        ValueError: patch p is no power of two of at least 2, size_px R is not p * 2^k, or other sizes that do not fit.
    """

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__(settings)
        # 1. Do the sizes fit?
        if data.patch < 2 or not is_power_of_two(data.patch):
            raise ValueError(f"patch must be a power of two of at least 2, got {data.patch}")
        self.size_px, self.patch, self.length, self.cells = data.size_px, data.patch, data.length, cells_of(data)
        self.uniform = data.length == self.cells**2
        self.decoder_kind, self.packing = settings.decoder, settings.packing
        if self.packing == "strip" and self.uniform:
            raise ValueError(
                f"packing=strip is for trees: length must be less than (size_px / patch)^2 = {data.length}"
            )
        self.grid = grid_side(data.length, self.cells, settings.grid)
        if self.decoder_kind == "raster" and not self.uniform:
            SequenceLayout(data.length, data.patch)  # refuses a length that is not a square before the first step

        # 2. The parts, in the order of the data; weights are drawn in this order.
        module, encoder, decoder = DECODERS[settings.decoder]
        parts = importlib.import_module(f"hpc_models.segmentation.{module}")
        picture = settings.decoder in PICTURE
        self.embed: Any
        if encoder is None:
            self.embed = PatchEmbedding(data.patch, data.in_channels, settings.width)
        else:
            self.embed = getattr(parts, encoder)(settings, data)
        self.position = Position(settings.position, data, settings.width)
        self.vit = ViTEncoder(
            settings.width,
            settings.depth,
            settings.heads,
            settings.mlp_dim or 4 * settings.width,
            taps=_taps(data.patch, settings.depth) if picture else [],
            spare_norm=picture,
            qkv_bias=settings.qkv_bias,
            dropout=settings.dropout,
            kind=settings.attention,
            window=settings.window,
        )
        self.decoder: Any = getattr(parts, decoder)(settings, data)

        # 3. How training starts.
        init_linears(self.vit)
        if settings.decoder == "token":
            init_linears(self.decoder)
        set_prior(self.decoder.out.bias, settings.prior)
        self.set_checkpointing(settings.checkpointing)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        by_leaf = self.decoder_kind in BY_LEAF
        parts = getattr(self.decoder, "fsdp_units", lambda: [self.decoder])()
        return [*([self.embed] if by_leaf else []), *self.vit.blocks, *parts]

    def blocks_to_compile(self) -> list[nn.Module]:
        """The transformer's blocks, where encoder and decoder see another number of leaves in each step; else none."""
        return [*self.vit.blocks] if self.decoder_kind in BY_LEAF else []

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every cell, (B, L, p, p, K). Padding has no influence; its rows are finite and mean nothing."""
        slot = raster_slots(batch["leaf_xy"], self.patch, self.cells) if self.uniform else None
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

    def _logits(self, batch: Batch, slot: Tensor | None, layout: GeometricLayout | SequenceLayout | None) -> Tensor:
        # Tokens to vectors. Padding is cleared wherever it could reach a valid token.
        valid = None if all_valid(batch["valid"]) else batch["valid"]
        tokens = clear_padding(self.centred(batch["tokens"]), valid)
        by_leaf = self.decoder_kind in BY_LEAF
        if by_leaf:
            # Only real leaves go through the convolutions: a padded batch costs what its tokens cost.
            patches, seams = self.embed.around(tokens, batch, valid, self.size_px)
            vectors, levels = self.embed(pack(patches, valid).permute(0, 3, 1, 2), *seams)
            x = unpack(vectors, batch["valid"], valid)
        else:
            x = self.embed(tokens)

        # The transformer.
        x = clear_padding(self.position(x, slot, batch["leaf_xy"], batch["leaf_size"]), valid)
        last, taps = self.vit(x, valid)

        # Vectors to logits per cell.
        if by_leaf:
            rows = self.decoder(pack(last, valid), levels, *seams)
            return unpack(rows.permute(0, 2, 3, 1), batch["valid"], valid)
        if layout is None:
            return cast(Tensor, self.decoder(last))
        last, *taps = (layout.to_grid(clear_padding(state, valid)) for state in (last, *taps))
        return layout.to_cells(self.decoder(layout.image(tokens), taps, last))
