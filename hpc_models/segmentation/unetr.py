"""UNETR on sequences of leaves: any patch size, five decoders; single device, imports torch and this folder only.

With uniform leaves, P = 16, decoder "raster" or "geometric" and position "slot" it is MONAI's UNETR, weight for weight
(Hatamizadeh et al., UNETR, WACV 2022). With a quadtree it is APF-UNETR (SC24).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from hpc_models.blocks.init import init_linears, set_prior
from hpc_models.blocks.network import Network
from hpc_models.blocks.patch_embedding import PatchEmbedding
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, all_valid, pack, unpack
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
Part = Callable[[UNETRSettings, DataShape], nn.Module]


class TokenHead(nn.Module):
    """One linear map per token to its p x p logits."""

    def __init__(self, settings: UNETRSettings, data: DataShape) -> None:
        super().__init__()
        self.shape = (data.patch, data.patch, data.classes)
        self.out = nn.Linear(settings.width, data.patch**2 * data.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, p, p, K)."""
        return cast(Tensor, self.out(x).unflatten(-1, self.shape))


def _embedding(settings: UNETRSettings, data: DataShape) -> nn.Module:
    return PatchEmbedding(data.patch, data.in_channels, settings.width)


def _picture_parts() -> tuple[Part, Part]:
    from hpc_models.segmentation.conv_decoder import ConvDecoder

    return _embedding, ConvDecoder


def _leaf_parts() -> tuple[Part, Part]:
    from hpc_models.segmentation.leaf_cnn import LeafDecoder, LeafEncoder

    return LeafEncoder, LeafDecoder


def _leaf_unet_parts() -> tuple[Part, Part]:
    from hpc_models.segmentation.leaf_unet import LeafUNetDecoder, LeafUNetEncoder

    return LeafUNetEncoder, LeafUNetDecoder


# Decoder: what gives the part before the transformer, and the part behind it; only these are loaded.
DECODERS: dict[str, Callable[[], tuple[Part, Part]]] = {
    "raster": _picture_parts,
    "geometric": _picture_parts,
    "token": lambda: (_embedding, TokenHead),
    "leaf": _leaf_parts,
    "leaf_unet": _leaf_unet_parts,
}


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
        make_embed, make_decoder = DECODERS[settings.decoder]()
        picture = settings.decoder in PICTURE
        self.embed = make_embed(settings, data)
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
        self.decoder = make_decoder(settings, data)

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

    def forward(self, batch: Batch) -> Tensor:
        """Per-cell logits of every token.

        Returns:
            (B, L, p, p, K). Rows of padding are finite and mean nothing; what stands in them has no influence.
        """
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
