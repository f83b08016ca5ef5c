"""Settings of the networks that answer for every cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hpc_models.settings import (
    CHECKPOINTING,
    NORMALISE,
    Attention,
    Inputs,
    ModelSettings,
    Norm,
    PositionCode,
    TransformerSizes,
    assumed,
    option,
)

Decoder = Literal["raster", "geometric", "token", "leaf", "leaf_unet"]
Layout = Literal["geometric", "sequence", "tiles"]
PRIOR = "expected share of foreground, sets the last bias; null: as initialised"


@dataclass(frozen=True, kw_only=True)
class UNETRSettings(TransformerSizes):
    """`unetr`: vision transformer over tokens with one of five decoders.

    Decoder raster lays the tokens out row by row in sequence order. In geometric, each cell of its grid takes the token
    of the leaf that covers it; the grid is chosen as `tokens.layout.grid_side` does, R / p for uniform leaves. Decoder
    token is a linear map. Leaf is a convolutional encoder and decoder shared by all leaves around the transformer.
    Leaf_unet is a U-Net over the leaves with the transformer at its bottleneck.
    """

    name: ClassVar[str] = "unetr"

    decoder: Decoder = option("raster", "how tokens become cells; raster is what the paper's authors did")
    position: PositionCode = option("slot", "position code of a token")
    feature_size: int = option(16, "channels of the convolutional decoder's finest level", gt=0)
    grid: int | None = option(None, "geometric decoder: side of its token grid; null: chosen", gt=0)
    qkv_bias: bool = option(False, "bias in the attention's first linear map")
    attention: Attention = option(
        "full", "packed: on valid tokens only; window: within `window` tokens; others: linear in L"
    )
    window: int = option(256, "attention=window: tokens per window; nystrom: landmarks", gt=0)
    leaf_base: int = option(16, "decoders by leaf: channels of the finest level", gt=0)
    seams: bool = option(True, "leaf_unet: convolutions read across the borders of leaves")
    standardise: bool = option(False, "leaf_unet: filters brought to mean 0 and variance 1 (WS)")
    packing: Literal["leaf", "strip"] = option(
        "leaf", "strip: leaves mixed as by the authors' packing, for comparison (raster, token)"
    )
    halo: int = option(0, "leaf decoder: cells of the neighbours seen around each leaf", ge=0, le=2)
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)
    prior: float | None = option(None, PRIOR, gt=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        mixable = self.decoder in ("raster", "token") and self.position in ("slot", "none")
        if self.packing == "strip" and not mixable:
            raise ValueError(
                "packing=strip mixes leaves: decoder must be raster or token, and position slot or none, "
                f"got {self.decoder} and {self.position}"
            )
        if self.standardise and self.decoder != "leaf_unet":
            raise ValueError(f"standardise=True is for decoder leaf_unet, got {self.decoder}")


@dataclass(frozen=True, kw_only=True)
class ViTSegSettings(UNETRSettings):
    """`vit_seg`: ViT with one linear map per token to its cells, which is `unetr` with decoder=token.

    It has the biases that UNETR's attention lacks.
    """

    name: ClassVar[str] = "vit_seg"

    decoder: Literal["token"] = option("token", "a linear map per token")
    qkv_bias: bool = option(True, "bias in the attention's first linear map")


@dataclass(frozen=True, kw_only=True)
class UNetSettings(ModelSettings):
    """`unet_tiled`: a convolutional U-Net on square crops, the usual rival."""

    name: ClassVar[str] = "unet_tiled"
    inputs: ClassVar[tuple[Inputs, ...]] = ("tiles",)
    has_attention: ClassVar[bool] = False
    data = assumed(in_channels=3, classes=1)

    widths: tuple[int, ...] = option((16, 32, 64, 128, 256), "channels of the levels, finest first")
    norm: Norm = option("instance", "normalisation layer")
    standardise: bool = option(False, "filters brought to mean 0 and variance 1 (WS)")
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)
    prior: float | None = option(None, PRIOR, gt=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) < 2:
            raise ValueError(f"widths needs at least two levels, got {tuple(self.widths)}")
        if self.standardise and self.norm == "none":
            raise ValueError("standardise=True needs a norm: nothing else would set the scale of a map")


@dataclass(frozen=True, kw_only=True)
class PictureSettings(ModelSettings):
    """What networks of pictures share: how a token set becomes one."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens", "tiles")

    layout: Layout = option("geometric", "tokens where their leaves lie, in sequence order, or crops (data.kind=tiles)")
    grid: int | None = option(None, "layout=geometric: side of the picture in tokens; null: chosen", gt=0)
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)
    prior: float | None = option(None, PRIOR, gt=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class TransUNetSettings(TransformerSizes, PictureSettings):
    """`transunet`: ResNet-50, vision transformer on its map, convolutional decoder; the paper's dropout is 0.1."""

    name: ClassVar[str] = "transunet"

    dropout: float = option(0.0, "in the MLPs and behind the embedding", ge=0, lt=1)
    stem_width: int = option(64, "channels of the ResNet's first map", gt=0)
    units: tuple[int, int, int] = option((3, 4, 9), "units of the ResNet's stages")
    decoder_widths: tuple[int, int, int, int] = option(
        (256, 128, 64, 16), "channels after each doubling of the decoder"
    )
    norm: Norm = option("batch", "of the decoder; batch (the paper) only on one rank")


@dataclass(frozen=True, kw_only=True)
class SwinUNETRSettings(PictureSettings):
    """`swin_unetr`: MONAI's Swin UNETR."""

    name: ClassVar[str] = "swin_unetr"

    feature_size: int = option(24, "channels of the finest level", gt=0, multiple_of=12)
    depths: tuple[int, int, int, int] = option((2, 2, 2, 2), "blocks of the stages")
    heads: tuple[int, int, int, int] = option((3, 6, 12, 24), "attention heads of the stages")
    window: int = option(7, "side of an attention window", gt=0)
    dropout: float = option(0.0, "of the transformer", ge=0, lt=1)
