"""Models by name, so that a config can ask for one; imports this folder only."""

from __future__ import annotations

import inspect

from torch import nn

from hpc_models.classification.hct import GMIC, HCT, DefGMIC
from hpc_models.classification.hipt import HIPT
from hpc_models.classification.hiri_bodies import TwoBranchBody
from hpc_models.classification.hiri_vit import HIRIViT
from hpc_models.classification.rivit import RIViT
from hpc_models.classification.vit import APFViT, ViT
from hpc_models.segmentation.swin_unetr import SwinUNETR
from hpc_models.segmentation.transunet import TransUNet
from hpc_models.segmentation.unet import UNet
from hpc_models.segmentation.unetr import UNETR

# Each class says what it answers (`task`: segmentation, classification) and on what (`inputs`: tokens, tiles, images).
MODELS: dict[str, type[nn.Module]] = {
    "apf_vit": APFViT,
    "def_gmic": DefGMIC,
    "gmic": GMIC,
    "hct": HCT,
    "hipt": HIPT,
    "hiri_body": TwoBranchBody,
    "hiri_vit": HIRIViT,
    "rivit": RIViT,
    "swin_unetr": SwinUNETR,
    "transunet": TransUNet,
    "unet": UNet,
    "unetr": UNETR,
    "vit": ViT,
}
# Other names, each with the defaults that make it what it is: ViT with a linear head per token is UNETR without its
# decoder, and has the biases that UNETR's attention lacks.
ALIASES: dict[str, tuple[str, dict[str, object]]] = {
    "unet_tiled": ("unet", {}),
    "vit_seg": ("unetr", {"decoder": "token", "qkv_bias": True}),
}


def names() -> list[str]:
    """Names `build` knows, aliases left out."""
    return sorted(MODELS)


def model_class(name: str) -> type[nn.Module]:
    """The class of a model.

    Raises:
        ValueError: unknown model (the message lists the valid ones).
    """
    name = ALIASES.get(name, (name,))[0]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; valid: {', '.join(names())}")
    return MODELS[name]


def options(name: str) -> dict[str, object]:
    """Keyword arguments of a model with their defaults (`inspect.Parameter.empty` for required ones)."""
    parameters = list(inspect.signature(model_class(name).__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters} | ALIASES.get(name, ("", {}))[1]


def build(name: str, **config: object) -> nn.Module:
    """Build a model.

    Args:
        name: one of `names()`, or an alias.
        **config: keyword arguments of its class.

    Returns:
        The module, in training mode, on the CPU (or inside `torch.device("meta")`, there).

    Raises:
        ValueError: unknown model or unknown keyword (the message lists the valid ones), or a value the model refuses.
    """
    valid = options(name)
    unknown = sorted(set(config) - set(valid))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)} for model {name!r}; valid: {', '.join(valid)}")
    missing = [key for key, default in valid.items() if default is inspect.Parameter.empty and key not in config]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(missing)}")
    return model_class(name)(**{**ALIASES.get(name, ("", {}))[1], **config})
