"""Settings that models of several families share; must not import torch or hpc_models."""

from __future__ import annotations

from pydantic import Field, model_validator

from launch.config.base import ModelConfig, OptionalInt


class TransformerSizes(ModelConfig):
    """Sizes of a stack of transformer blocks, ViT-B by default."""

    width: int = Field(default=768, gt=0, description="channels of a token")
    depth: int = Field(default=12, gt=0, description="transformer blocks")
    heads: int = Field(default=12, gt=0, description="attention heads; must divide width")
    mlp_dim: OptionalInt = Field(default=None, gt=0, description="hidden channels of a block's MLP; null: 4 * width")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="in attention and MLP")

    @model_validator(mode="after")
    def _check_heads(self) -> TransformerSizes:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self
