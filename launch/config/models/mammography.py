"""Settings of HCT, GMIC and Def-GMIC; must not import torch or hpc_models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from launch.config.base import Inputs, ModelConfig, Task


class _ResNet22Config(ModelConfig):
    task: ClassVar[Task] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")
    has_attention: ClassVar[bool] = False

    strides: tuple[int, int, int, int, int] = Field(
        default=(2, 2, 2, 2, 2), description="stride of each stage; GMIC itself had 1, 2, 2, 2, 2"
    )
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


class HCTConfig(_ResNet22Config):
    """`hct`: convolutions where maps are large, linear attention over the whole picture where they are small."""

    has_attention: ClassVar[bool] = True

    name: Literal["hct"] = Field(default="hct", description="registered name of the model")
    attention: Literal["performer_relu", "performer_softmax", "nystrom"] = Field(
        default="performer_relu", description="how attention is made linear in the number of tokens"
    )
    conv_stages: int = Field(default=3, ge=1, le=4, description="stages of convolutions only, of five")
    heads: int = Field(default=8, gt=0, description="attention heads; must divide the channels of every stage's input")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="after the attention's output")


class GMICConfig(_ResNet22Config):
    """`gmic`: the global network of GMIC, convolutions throughout."""

    name: Literal["gmic"] = Field(default="gmic", description="registered name of the model")


class DefGMICConfig(_ResNet22Config):
    """`def_gmic`: GMIC with deformable convolutions in its last two stages."""

    name: Literal["def_gmic"] = Field(default="def_gmic", description="registered name of the model")
    offset_bias: bool = Field(default=True, description="bias in the convolutions that make the offsets")


MODELS: dict[str, type[ModelConfig]] = {"hct": HCTConfig, "gmic": GMICConfig, "def_gmic": DefGMICConfig}
