"""Settings of the segmentation networks of whole pictures; must not import torch or hpc_models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from launch.config.base import Inputs, ModelConfig, OptionalFloat, OptionalInt
from launch.config.models.parts import TransformerSizes
from launch.config.models.spine import UNETRConfig


class PictureConfig(ModelConfig):
    """What networks of pictures share: how a token set becomes one."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens", "tiles")

    layout: Literal["geometric", "sequence", "tiles"] = Field(
        default="geometric", description="tokens where their leaves lie, in sequence order, or crops (data.kind=tiles)"
    )
    grid: OptionalInt = Field(
        default=None, gt=0, description="layout=geometric: side of the picture in tokens; null: chosen"
    )
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    prior: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="expected share of foreground, sets the last bias; null: as initialised"
    )


class TransUNetConfig(TransformerSizes, PictureConfig):
    """`transunet`: ResNet-50, vision transformer on its map, convolutional decoder."""

    name: Literal["transunet"] = Field(default="transunet", description="registered name of the model")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in the MLPs and behind the embedding")
    stem_width: int = Field(default=64, gt=0, description="channels of the ResNet's first map")
    units: tuple[int, int, int] = Field(default=(3, 4, 9), description="units of the ResNet's stages")
    decoder_widths: tuple[int, int, int, int] = Field(
        default=(256, 128, 64, 16), description="channels after each doubling of the decoder"
    )
    norm: Literal["instance", "batch", "none"] = Field(
        default="batch", description="of the decoder; batch (the paper) only on one rank"
    )


class SwinUNETRConfig(PictureConfig):
    """`swin_unetr`: MONAI's Swin UNETR."""

    name: Literal["swin_unetr"] = Field(default="swin_unetr", description="registered name of the model")
    feature_size: int = Field(default=24, gt=0, multiple_of=12, description="channels of the finest level")
    depths: tuple[int, int, int, int] = Field(default=(2, 2, 2, 2), description="blocks of the stages")
    heads: tuple[int, int, int, int] = Field(default=(3, 6, 12, 24), description="attention heads of the stages")
    window: int = Field(default=7, gt=0, description="side of an attention window")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the transformer")


class ViTSegConfig(UNETRConfig):
    """`vit_seg`: ViT with one linear map per token to its cells, which is `unetr` with decoder=token."""

    name: Literal["vit_seg"] = Field(default="vit_seg", description="registered name of the model")  # type: ignore[assignment]
    decoder: Literal["token"] = Field(default="token", description="a linear map per token")
    qkv_bias: bool = Field(default=True, description="bias in the attention's first linear map")


MODELS: dict[str, type[ModelConfig]] = {
    "swin_unetr": SwinUNETRConfig,
    "transunet": TransUNetConfig,
    "vit_seg": ViTSegConfig,
}
