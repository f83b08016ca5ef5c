"""MONAI's networks, loaded only when asked for and built where torch is told to build; imports torch only by itself.

MONAI is optional (the extra `monai`): nothing else in this folder needs it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn


def monai_nets() -> ModuleType:
    """`monai.networks.nets`.

    Raises:
        ValueError: MONAI or einops is not installed; the line names the extra.
    """
    try:
        import einops  # noqa: F401  (MONAI's attention needs it and says so only when a model is built)
        from monai.networks import nets
    except ImportError as error:
        raise ValueError(f"needs MONAI ({error.name} is missing): pip install the extra `monai`") from None
    module: ModuleType = nets
    return module


def build_net(name: str, **options: object) -> nn.Module:
    """One of MONAI's networks on torch's default device, the meta device included.

    MONAI reads numbers out of tensors while it builds, which the meta device does not have: so it builds on the CPU.

    Args:
        name: class in `monai.networks.nets`.
        **options: its arguments.

    Raises:
        ValueError: MONAI is not installed, or it refuses the arguments.
    """
    make = getattr(monai_nets(), name)
    place = torch.get_default_device()
    with torch.device("cpu"):
        net: nn.Module = make(**options)
    return net.to(place)
