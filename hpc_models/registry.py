"""Models by name, so that a config can ask for one; only the model asked for is loaded, and torch with it."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hpc_models.settings import DataShape, ModelSettings

if TYPE_CHECKING:
    from torch import nn

# Name: its settings, its network.
MODELS: dict[str, tuple[str, str]] = {
    "apf_vit": ("classification.settings:APFViTSettings", "classification.vit:APFViT"),
    "def_gmic": ("classification.settings:DefGMICSettings", "classification.hct:DefGMIC"),
    "gmic": ("classification.settings:GMICSettings", "classification.hct:GMIC"),
    "hct": ("classification.settings:HCTSettings", "classification.hct:HCT"),
    "hipt": ("classification.settings:HIPTSettings", "classification.hipt:HIPT"),
    "hiri_body": ("classification.settings:HIRIBodySettings", "classification.hiri_bodies:TwoBranchBody"),
    "hiri_vit": ("classification.settings:HIRIViTSettings", "classification.hiri_vit:HIRIViT"),
    "rivit": ("classification.settings:RIViTSettings", "classification.rivit:RIViT"),
    "swin_unetr": ("segmentation.settings:SwinUNETRSettings", "segmentation.swin_unetr:SwinUNETR"),
    "transunet": ("segmentation.settings:TransUNetSettings", "segmentation.transunet:TransUNet"),
    "unet": ("segmentation.settings:UNetSettings", "segmentation.unet:UNet"),
    "unetr": ("segmentation.settings:UNETRSettings", "segmentation.unetr:UNETR"),
    "vit": ("classification.settings:ViTSettings", "classification.vit:ViT"),
}
# Further names of networks above, with settings of their own.
ALIASES: dict[str, tuple[str, str]] = {
    "unet_tiled": MODELS["unet"],
    "vit_seg": ("segmentation.settings:ViTSegSettings", "segmentation.unetr:UNETR"),
}


def names() -> list[str]:
    """Names `build` knows, aliases left out."""
    return sorted(MODELS)


def _load(name: str, which: int) -> Any:
    if name not in MODELS | ALIASES:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(names())}")
    module, _, attribute = (MODELS | ALIASES)[name][which].partition(":")
    return getattr(importlib.import_module(f"hpc_models.{module}"), attribute)


def settings_class(name: str) -> type[ModelSettings]:
    """The settings of a model, without torch.

    Raises:
        ValueError: unknown model (the message lists the valid ones).
    """
    found: type[ModelSettings] = _load(name, 0)
    return found


def make(settings: ModelSettings, data: DataShape) -> nn.Module:
    """The model of these settings for data of this shape, in training mode, on torch's default device.

    Raises:
        ValueError: settings and data do not fit each other.
    """
    model: nn.Module = _load(settings.name, 1)(settings, data)
    return model


def build(name: str, **options: Any) -> nn.Module:
    """Build a model.

    Args:
        name: one of `names()`, or an alias.
        **options: fields of its settings, and of `DataShape` those that it reads.

    Returns:
        The module, in training mode, on the CPU (or inside `torch.device("meta")`, there).

    Raises:
        ValueError: unknown model or unknown keyword (the message lists the valid ones), or a value the model refuses.
    """
    settings = settings_class(name)
    valid = [*settings.data, *(item.name for item in fields(settings))]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} for model {name!r}; valid: {', '.join(valid)}")
    missing = [key for key, value in settings.data.items() if value is ... and key not in options]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(missing)}")
    data = {key: options.pop(key, value) for key, value in settings.data.items()}
    return make(settings(**options), DataShape(**data))
