"""Settings of the transformers that give one label per picture or slide; must not import torch or hpc_models."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from launch.config.base import Attention, Inputs, ModelConfig, Task
from launch.config.models.parts import TransformerSizes


class _ViTBase(TransformerSizes):
    """What ViT and APF-ViT share."""

    task: ClassVar[Task] = "classification"

    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


class ViTConfig(_ViTBase):
    """`vit`: vision transformer on pictures."""

    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")

    name: Literal["vit"] = Field(default="vit", description="registered name of the model")
    patch_px: int = Field(default=16, gt=0, description="side of a patch in pixels")
    pool: Literal["cls", "mean"] = Field(default="cls", description="class token, or mean of the tokens")
    position: Literal["slot", "geom", "both", "none"] = Field(default="slot", description="position code of a token")


class APFViTConfig(_ViTBase):
    """`apf_vit`: vision transformer on token sets, one label per slide."""

    name: Literal["apf_vit"] = Field(default="apf_vit", description="registered name of the model")
    pool: Literal["cls", "mean"] = Field(default="mean", description="class token, or mean of the valid tokens")
    position: Literal["slot", "geom", "both", "none"] = Field(default="geom", description="position code of a token")
    attention: Attention = Field(
        default="full", description="packed: on valid tokens only; window: within `window` tokens; others: linear in L"
    )
    window: int = Field(default=256, gt=0, description="attention=window: tokens per window; nystrom: landmarks")


class HIPTConfig(ModelConfig):
    """`hipt`: three transformers over patches, squares and regions; uniform tokens are its squares."""

    task: ClassVar[Task] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tokens")

    name: Literal["hipt"] = Field(default="hipt", description="registered name of the model")
    scales: tuple[int, int, int] = Field(default=(16, 256, 4096), description="pixels of patch, square and region")
    widths: tuple[int, int] = Field(default=(384, 192), description="channels of the first level and of the others")
    depths: tuple[int, int, int] = Field(default=(12, 6, 2), description="blocks of the levels")
    heads: tuple[int, int, int] = Field(default=(6, 6, 3), description="attention heads of the levels")
    table_side: int = Field(default=14, gt=0, description="side of the learned tables of positions, in tokens")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="in the third level")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")


MODELS: dict[str, type[ModelConfig]] = {"vit": ViTConfig, "apf_vit": APFViTConfig, "hipt": HIPTConfig}
