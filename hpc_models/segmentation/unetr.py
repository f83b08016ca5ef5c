"""UNETR on sequences of leaves: any patch size, five decoders; single device, imports torch and this folder only.

With uniform leaves, P = 16, decoder "raster" or "geometric" and position "slot" it is MONAI's UNETR, weight for weight
(Hatamizadeh et al., UNETR, WACV 2022). With a quadtree it is APF-UNETR (SC24).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hpc_models.blocks.attention import Block
from hpc_models.blocks.init import init_linears, set_prior
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.segmentation.conv_decoder import ConvDecoder
from hpc_models.segmentation.leaf_cnn import LeafDecoder, LeafEncoder, leaf_widths
from hpc_models.segmentation.leaf_unet import LeafUNetDecoder, LeafUNetEncoder, Seams, leaf_unet_widths
from hpc_models.tokens.batch import Batch, all_valid, cut_patches, join_patches, pack, unpack
from hpc_models.tokens.geometry import halo_patches, is_power_of_two
from hpc_models.tokens.layout import GeometricLayout, SequenceLayout, grid_side, leaves_to_strip, strip_to_leaves
from hpc_models.tokens.position import Position

DECODERS = ("raster", "geometric", "token", "leaf", "leaf_unet")
LEAF_PARTS = (LeafEncoder, LeafDecoder, LeafUNetEncoder, LeafUNetDecoder)  # they compute valid leaves only, packed


class PatchEmbedding(nn.Module):
    """Linear map of a flattened patch; the weight has the shape of the equivalent strided convolution."""

    def __init__(self, patch: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, p, p, C) to (B, L, D)."""
        flat = tokens.permute(0, 1, 4, 2, 3).flatten(2)
        return nn.functional.linear(flat, self.proj.weight.flatten(1), self.proj.bias)


class TokenHead(nn.Module):
    """One linear map per token to its p x p logits."""

    def __init__(self, patch: int, width: int, classes: int) -> None:
        super().__init__()
        self.shape = (patch, patch, classes)
        self.out = nn.Linear(width, patch * patch * classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, p, p, K)."""
        return self.out(x).unflatten(-1, self.shape)


class UNETR(nn.Module):
    """Transformer segmentation of a token set.

    Args:
        size_px: side R of the frame.
        patch: p, cells per token side, a power of two of at least 2.
        length: L, tokens per sequence after padding. (R / p)^2 means uniform patching, the only tiling of that length:
            tokens then take the slot and the decoder cell of their place in the frame, whatever their order.
        classes: K logits per cell.
        in_channels: channels of a token.
        width: D.
        depth: transformer blocks.
        heads: attention heads per block.
        mlp_dim: hidden width of the blocks' MLPs; 4 * width when None.
        feature_size: channels of the finest level of the convolutional decoder.
        decoder: "raster" (tokens in a sqrt(L) x sqrt(L) picture in sequence order, as the authors), "geometric" (each
            decoder cell takes the token of the leaf that covers it), "token" (linear head), "leaf" (convolutional
            encoder and decoder shared by all leaves around the transformer), "leaf_unet" (a U-Net over the leaves, its
            convolutions across their borders, with the transformer at its bottleneck).
        position: "slot", "geom", "both" or "none"; see `Position`.
        grid: side g of the geometric decoder's token grid, a power of two; None: R / p for uniform leaves, otherwise
            the next power of two that gives at least L cells, at most R / p.
        qkv_bias: see `Attention`.
        dropout: in attention and MLP.
        attention: "full", "packed" (computes valid tokens only) or "window"; see `Attention`.
        window: tokens per window.
        leaf_base: channels of the finest level of the leaf networks.
        seams: "leaf_unet": convolutions read across the borders of leaves; False: zeros lie around every leaf.
        halo: cells of the neighbouring leaves that the leaf encoder sees around each leaf (0, 1 or 2).
        standardise: "leaf_unet": filters of the convolutions are brought to mean 0 and variance 1; see `StdConv2d`.
        packing: "leaf" (token i is leaf i) or "strip": leaves are mixed as by the authors' packing before all else, and
            the answer is put back; for comparison, with decoders and positions that know nothing of leaves.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute blocks and decoder stages in the backward pass instead of keeping their activations.
        prior: expected share of foreground; sets the bias of the last layer to its logit. None leaves it as is.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown decoder or position.
    """

    task = "segmentation"
    inputs = ("tokens",)

    def __init__(
        self,
        size_px: int,
        patch: int,
        length: int,
        classes: int = 1,
        in_channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int | None = None,
        feature_size: int = 16,
        decoder: str = "raster",
        position: str = "slot",
        grid: int | None = None,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention: str = "full",
        window: int = 256,
        leaf_base: int = 16,
        halo: int = 0,
        seams: bool = True,
        standardise: bool = False,
        packing: str = "leaf",
        normalise: bool = True,
        checkpointing: bool = False,
        prior: float | None = None,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        if patch < 2 or not is_power_of_two(patch):
            raise ValueError(f"patch must be a power of two of at least 2, got {patch}")
        if size_px % patch or not is_power_of_two(size_px // patch):
            raise ValueError(f"size_px must be patch * 2^k, got {size_px} with patch {patch}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        cells = size_px // patch
        if packing not in ("leaf", "strip"):
            raise ValueError(f"packing must be leaf or strip, got {packing!r}")
        if packing == "strip" and (decoder not in ("raster", "token") or position not in ("slot", "none")):
            raise ValueError(
                "packing=strip mixes leaves: decoder must be raster or token, and position slot or none, "
                f"got {decoder} and {position}"
            )
        if packing == "strip" and length == cells * cells:
            raise ValueError(f"packing=strip is for trees: length must be less than (size_px / patch)^2 = {length}")
        if standardise and decoder != "leaf_unet":
            raise ValueError(f"standardise=True is for decoder leaf_unet, got {decoder}")
        self.size_px, self.patch, self.length, self.classes = size_px, patch, length, classes
        self.decoder_kind, self.normalise, self.halo, self.seams = decoder, normalise, halo, seams
        self.packing = packing
        self.uniform = length == cells * cells
        self.grid = grid_side(length, cells, grid)

        convolutional = decoder in ("raster", "geometric")
        if decoder == "raster" and not self.uniform:
            SequenceLayout(length, patch)  # refuses a length that is not a square now, not at the first step
        taps = ConvDecoder.taps(patch, depth) if convolutional else []
        self.embed: nn.Module
        self.decoder: LeafDecoder | LeafUNetDecoder | TokenHead | ConvDecoder
        if decoder == "leaf":
            widths = leaf_widths(patch, leaf_base)
            self.embed = LeafEncoder(patch, in_channels, width, widths, halo)
        elif decoder == "leaf_unet":
            widths = leaf_unet_widths(patch, leaf_base)
            self.sides = [patch >> level for level in range(len(widths))]
            self.embed = LeafUNetEncoder(patch, in_channels, width, widths, standardise)
        else:
            self.embed = PatchEmbedding(patch, in_channels, width)
        self.position = Position(position, size_px, patch, length, width)
        self.vit = ViTEncoder(
            width, depth, heads, mlp_dim or 4 * width, taps, qkv_bias, dropout, convolutional, attention, window
        )
        if decoder == "leaf":
            self.decoder = LeafDecoder(patch, width, widths, classes)
        elif decoder == "leaf_unet":
            self.decoder = LeafUNetDecoder(patch, width, widths, classes, standardise)
        elif decoder == "token":
            self.decoder = TokenHead(patch, width, classes)
        else:
            self.decoder = ConvDecoder(patch, in_channels, width, feature_size, classes)
        self._initialise(prior)
        self.set_checkpointing(checkpointing)

    def _initialise(self, prior: float | None) -> None:
        init_linears(self.vit)
        if isinstance(self.decoder, TokenHead):
            init_linears(self.decoder)
        set_prior(self.decoder.out.bias, prior)

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing of every part that knows it; results do not change."""
        for module in self.modules():
            if isinstance(module, (Block, *LEAF_PARTS, ConvDecoder)):
                module.checkpoint = on

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        embed = [self.embed] if isinstance(self.embed, LEAF_PARTS) else []
        tail: list[nn.Module] = [self.decoder]
        if isinstance(self.decoder, ConvDecoder):
            tail = [self.decoder.image, *self.decoder.projections, *self.decoder.ups]
        return [*embed, *self.vit.blocks, *tail]

    def blocks_to_compile(self) -> list[nn.Module]:
        """The transformer's blocks, were it a single one, beside networks that see another number of leaves each step.

        Empty for other decoders, whose units are told apart by how often they occur.
        """
        return [*self.vit.blocks] if isinstance(self.embed, LEAF_PARTS) else []

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
        layout: GeometricLayout | SequenceLayout | None = None
        slot = None
        cells = self.size_px // self.patch
        if self.uniform:
            place = batch["leaf_xy"] // self.patch
            slot = place[..., 1] * cells + place[..., 0]
        if self.decoder_kind == "geometric" or (self.decoder_kind == "raster" and self.uniform):
            grid = cells if self.decoder_kind == "raster" else self.grid
            layout = GeometricLayout(batch, self.size_px, self.patch, grid)
        elif self.decoder_kind == "raster":
            layout = SequenceLayout(batch["tokens"].shape[1], self.patch)
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
        if (h, w) != (self.size_px, self.size_px) or not self.uniform:
            raise ValueError(
                f"forward_image takes {self.size_px}x{self.size_px} images of a model with "
                f"length={(self.size_px // self.patch) ** 2}; got {h}x{w} and length={self.length}"
            )
        cells = self.size_px // self.patch
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
        tokens, xy, size = batch["tokens"], batch["leaf_xy"], batch["leaf_size"]
        valid = None if all_valid(batch["valid"]) else batch["valid"]
        if self.normalise:
            tokens = (tokens - 0.5) / 0.5
        if valid is not None:
            tokens = tokens.masked_fill(~valid[:, :, None, None, None], 0)
        levels: list[Tensor] = []
        seams: tuple[Seams, ...] = ()
        by_leaf = self.decoder_kind in ("leaf", "leaf_unet")
        if by_leaf:
            if self.decoder_kind == "leaf_unet":
                seams = (Seams(xy, size, valid, self.size_px, self.sides, self.seams),)
            elif self.halo:
                tokens = halo_patches(tokens, xy, size, batch["valid"], self.size_px, self.halo)
            # Only real leaves go through the convolutions: a padded batch costs what its tokens cost.
            vectors, levels = self.embed(pack(tokens, valid).permute(0, 3, 1, 2), *seams)
            x = unpack(vectors, batch["valid"], valid)
        else:
            x = self.embed(tokens)
        x = self.position(x, slot, xy, size)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        last, taps = self.vit(x, valid)
        if by_leaf:
            rows = self.decoder(pack(last, valid), levels, *seams)
            return unpack(rows.permute(0, 2, 3, 1), batch["valid"], valid)
        if self.decoder_kind == "token":
            return self.decoder(last)
        layout = cast(GeometricLayout | SequenceLayout, layout)
        if valid is not None:
            last = last.masked_fill(~valid[..., None], 0)
            taps = [tap.masked_fill(~valid[..., None], 0) for tap in taps]
        logits = self.decoder(layout.image(tokens), [layout.to_grid(tap) for tap in taps], layout.to_grid(last))
        return layout.to_cells(logits)
