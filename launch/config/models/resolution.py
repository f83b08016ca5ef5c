"""Settings of HIRI-ViT and of the resolution-invariant ViT; must not import torch or hpc_models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from launch.config.base import Inputs, ModelConfig, Task


class HIRIViTConfig(ModelConfig):
    """`hiri_vit`: five stages, two branches where maps are large; its numbers are a reconstruction."""

    task: ClassVar[Task] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")

    name: Literal["hiri_vit"] = Field(default="hiri_vit", description="registered name of the model")
    variant: Literal["s", "b", "l", "row1", "row2", "row3", "row4", "row5", "row6", "row7", "row8", "row9", "row10"] = (
        Field(default="s", description="s, b, l, or a row of the ablation (Table VII); all are reconstructions")
    )
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


class HIRIBodyConfig(ModelConfig):
    """`hiri_body`: PVTv2, DaViT or HRNet, plain or with HIRI-ViT's front (a reconstruction)."""

    task: ClassVar[Task] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")

    name: Literal["hiri_body"] = Field(default="hiri_body", description="registered name of the model")
    body: Literal["pvt_v2_b2", "davit_tiny", "hrnet_w18"] = Field(
        default="pvt_v2_b2", description="the published network"
    )
    five_stages: bool = Field(default=False, description="HR-stem and two stages of HR blocks in front")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


class RIViTConfig(ModelConfig):
    """`rivit`: every resolution becomes the same token grid; also the stock ViT it is compared with."""

    task: ClassVar[Task] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")

    name: Literal["rivit"] = Field(default="rivit", description="registered name of the model")
    conv: bool = Field(default=True, description="convolutions and adaptive pooling in front; false: the stock ViT")
    position: Literal["learned", "sinusoidal", "relative"] = Field(
        default="learned", description="position code of a patch"
    )
    patch_px: int = Field(default=4, gt=0, description="side of a patch in pixels of the token grid's picture")
    grid_px: int = Field(default=64, gt=0, description="conv: side that every picture is pooled to")
    tokens: int = Field(default=1600, gt=0, description="conv=false, learned: rows of the table of positions")
    conv_width: int = Field(default=32, gt=0, description="conv: channels of both convolutions (a choice of ours)")
    width: int = Field(default=128, gt=0, description="channels of a token")
    depth: int = Field(default=6, gt=0, description="layers")
    heads: int = Field(default=3, gt=0, description="attention heads")
    head_width: int = Field(default=64, gt=0, description="channels of each head")
    mlp_dim: int = Field(default=128, gt=0, description="hidden channels of a layer's MLP")
    reach: int = Field(default=256, gt=0, description="relative: offsets beyond this count as this")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


MODELS: dict[str, type[ModelConfig]] = {
    "hiri_vit": HIRIViTConfig,
    "hiri_body": HIRIBodyConfig,
    "rivit": RIViTConfig,
}
