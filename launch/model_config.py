"""The settings of each model as checked data, so that a wrong key is found on a login node.

Must not import torch or hpc_models: a test holds these fields against the signatures of the registered models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def none_from_text(value: Any) -> Any:
    """`key=null` and `key=none` of the command line mean no value."""
    return None if isinstance(value, str) and value.lower() in ("null", "none", "") else value


OptionalInt = Annotated[int | None, BeforeValidator(none_from_text)]
OptionalFloat = Annotated[float | None, BeforeValidator(none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(none_from_text)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, validate_default=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """What every model has; R, p, L and the number of classes come from the data section."""

    name: str = Field(description="registered name of the model")

    @property
    def decoder_name(self) -> str:
        """The decoder as records name it."""
        return str(getattr(self, "decoder", "conv"))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `hpc_models.registry.build`, without those that the data section gives."""
        return self.model_dump(exclude={"name"})


class UNETRConfig(ModelConfig):
    """`unetr`: vision transformer over tokens with one of four decoders."""

    name: Literal["unetr"] = Field(default="unetr", description="registered name of the model")
    decoder: Literal["raster", "geometric", "token", "leaf"] = Field(
        default="raster", description="how tokens become cells; raster is what the paper's authors did"
    )
    position: Literal["slot", "geom", "both", "none"] = Field(default="slot", description="position code of a token")
    width: int = Field(default=768, gt=0, description="channels of a token")
    depth: int = Field(default=12, gt=0, description="transformer blocks")
    heads: int = Field(default=12, gt=0, description="attention heads; must divide width")
    mlp_dim: OptionalInt = Field(default=None, gt=0, description="hidden channels of a block's MLP; null: 4 * width")
    feature_size: int = Field(default=16, gt=0, description="channels of the convolutional decoder's finest level")
    grid: OptionalInt = Field(default=None, gt=0, description="geometric decoder: side of its token grid; null: chosen")
    qkv_bias: bool = Field(default=False, description="bias in the attention's first linear map")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in attention and MLP")
    leaf_base: int = Field(default=16, gt=0, description="leaf decoder: channels of its finest level")
    halo: int = Field(default=0, ge=0, le=2, description="leaf decoder: cells of the neighbours seen around each leaf")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    prior: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="expected share of foreground, sets the last bias; null: as initialised"
    )

    @model_validator(mode="after")
    def _check(self) -> UNETRConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self


class UNetTiledConfig(ModelConfig):
    """`unet_tiled`: a convolutional U-Net on square crops, the usual rival."""

    name: Literal["unet_tiled"] = Field(default="unet_tiled", description="registered name of the model")
    widths: tuple[int, ...] = Field(default=(16, 32, 64, 128, 256), description="channels of the levels, finest first")
    norm: Literal["instance", "batch", "none"] = Field(default="instance", description="normalisation layer")
    normalise: bool = Field(default=True, description="map the input from [0, 1] to [-1, 1] first")
    checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    prior: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="expected share of foreground, sets the last bias; null: as initialised"
    )


# Arguments of the models that the data section gives.
FROM_DATA = ("size_px", "patch", "length", "classes", "in_channels")

MODELS: dict[str, type[ModelConfig]] = {"unetr": UNETRConfig, "unet_tiled": UNetTiledConfig}
