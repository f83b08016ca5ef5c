"""Settings of UNETR and of the tiled U-Net; must not import torch or hpc_models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from launch.config.base import Attention, Inputs, ModelConfig, OptionalFloat, OptionalInt
from launch.config.models.parts import TransformerSizes


class UNETRConfig(TransformerSizes):
    """`unetr`: vision transformer over tokens with one of five decoders."""

    name: Literal["unetr"] = Field(default="unetr", description="registered name of the model")
    decoder: Literal["raster", "geometric", "token", "leaf", "leaf_unet"] = Field(
        default="raster", description="how tokens become cells; raster is what the paper's authors did"
    )
    position: Literal["slot", "geom", "both", "none"] = Field(default="slot", description="position code of a token")
    feature_size: int = Field(default=16, gt=0, description="channels of the convolutional decoder's finest level")
    grid: OptionalInt = Field(default=None, gt=0, description="geometric decoder: side of its token grid; null: chosen")
    qkv_bias: bool = Field(default=False, description="bias in the attention's first linear map")
    attention: Attention = Field(
        default="full", description="packed: on valid tokens only; window: within `window` tokens; others: linear in L"
    )
    window: int = Field(default=256, gt=0, description="attention=window: tokens per window; nystrom: landmarks")
    leaf_base: int = Field(default=16, gt=0, description="decoders by leaf: channels of the finest level")
    seams: bool = Field(default=True, description="leaf_unet: convolutions read across the borders of leaves")
    standardise: bool = Field(default=False, description="leaf_unet: filters brought to mean 0 and variance 1 (WS)")
    packing: Literal["leaf", "strip"] = Field(
        default="leaf", description="strip: leaves mixed as by the authors' packing, for comparison (raster, token)"
    )
    halo: int = Field(default=0, ge=0, le=2, description="leaf decoder: cells of the neighbours seen around each leaf")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    prior: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="expected share of foreground, sets the last bias; null: as initialised"
    )


class UNetTiledConfig(ModelConfig):
    """`unet_tiled`: a convolutional U-Net on square crops, the usual rival."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("tiles",)
    has_attention: ClassVar[bool] = False

    name: Literal["unet_tiled"] = Field(default="unet_tiled", description="registered name of the model")
    widths: tuple[int, ...] = Field(default=(16, 32, 64, 128, 256), description="channels of the levels, finest first")
    norm: Literal["instance", "batch", "none"] = Field(default="instance", description="normalisation layer")
    standardise: bool = Field(default=False, description="filters brought to mean 0 and variance 1 (WS)")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    prior: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="expected share of foreground, sets the last bias; null: as initialised"
    )


MODELS: dict[str, type[ModelConfig]] = {"unetr": UNETRConfig, "unet_tiled": UNetTiledConfig}
