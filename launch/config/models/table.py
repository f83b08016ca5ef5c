"""The settings of each model as checked data, so that a wrong key is found on a login node.

Must not import torch or hpc_models: a test holds these fields against the signatures of the registered models.
"""

from __future__ import annotations

from launch.config.base import FROM_DATA, ModelConfig, OptionalFloat, OptionalInt, OptionalText, Section
from launch.config.models import classification, mammography, resolution, segmentation, spine
from launch.config.models.spine import UNETRConfig, UNetTiledConfig

MODELS: dict[str, type[ModelConfig]] = {
    **classification.MODELS,
    **mammography.MODELS,
    **resolution.MODELS,
    **segmentation.MODELS,
    **spine.MODELS,
}

__all__ = [
    "FROM_DATA",
    "MODELS",
    "ModelConfig",
    "OptionalFloat",
    "OptionalInt",
    "OptionalText",
    "Section",
    "UNETRConfig",
    "UNetTiledConfig",
]
