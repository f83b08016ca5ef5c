"""Swin UNETR: MONAI's network behind this project's front end for pictures, crops and token sets.

Hatamizadeh et al., Swin UNETR (2022). MONAI is optional (the extra `monai`), and loaded when a model is built.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hpc_models.blocks.init import set_prior
from hpc_models.segmentation.picture_model import PictureModel
from hpc_models.segmentation.settings import SwinUNETRSettings
from hpc_models.settings import DataShape

STRIDE = 32


def build_net(name: str, **options: object) -> nn.Module:
    """The network `name` of `monai.networks.nets` on torch's default device, the meta device included.

    MONAI reads numbers out of tensors while it builds, which the meta device does not have: so it builds on the CPU.

    Raises:
        ValueError: MONAI or einops is not installed (the line names the extra), or MONAI refuses the options.
    """
    try:
        import einops  # noqa: F401  (MONAI's attention needs it and says so only when a model is built)
        from monai.networks import nets
    except ImportError as error:
        raise ValueError(f"needs MONAI ({error.name} is missing): pip install the extra `monai`") from None
    place = torch.get_default_device()
    with torch.device("cpu"):
        net: nn.Module = getattr(nets, name)(**options)
    return net.to(place)


class SwinUNETR(PictureModel):
    """MONAI's SwinUNETR in two dimensions.

    Sides of pictures are padded to multiples of 32. They must be larger than 32 px, since norms need more than one
    pixel at the bottom.

    Raises:
        ValueError: MONAI is missing, or sizes that do not fit each other.
    """

    def __init__(self, settings: SwinUNETRSettings, data: DataShape) -> None:
        super().__init__(settings, data, STRIDE)
        if self.picture_px <= STRIDE:
            raise ValueError(f"swin_unetr needs pictures larger than {STRIDE} px, got {self.picture_px}")
        self.net = build_net(
            "SwinUNETR",
            in_channels=data.in_channels,
            out_channels=data.classes,
            feature_size=settings.feature_size,
            depths=tuple(settings.depths),
            num_heads=tuple(settings.heads),
            window_size=settings.window,
            drop_rate=settings.dropout,
            attn_drop_rate=settings.dropout,
            spatial_dims=2,
        )
        set_prior(self.out.bias, settings.prior)
        self.set_checkpointing(settings.checkpointing)

    @property
    def out(self) -> nn.Conv2d:
        """The last convolution."""
        return self.net.out.conv.conv  # type: ignore[union-attr,return-value]

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing of the transformer's blocks. Results do not change."""
        for module in self.net.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = on  # type: ignore[assignment]

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        net, swin = self.net, self.net.swinViT
        stages = [getattr(swin, f"layers{i}")[0] for i in range(1, 5)]
        encoders = [getattr(net, f"encoder{i}") for i in (1, 2, 3, 4, 10)]
        return [*stages, *encoders, *(getattr(net, f"decoder{i}") for i in (5, 4, 3, 2, 1))]

    def network(self, image: Tensor) -> Tensor:
        """See `PictureModel`."""
        return cast(Tensor, self.net(image))
