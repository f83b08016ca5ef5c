"""Swin UNETR: MONAI's network behind this project's front end for pictures, crops and token sets; torch, this folder.

Hatamizadeh et al., Swin UNETR (2022). MONAI itself (the extra `monai`) is loaded when a model is built.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hpc_models.blocks.init import set_prior
from hpc_models.segmentation.monai_nets import build_net
from hpc_models.segmentation.picture_model import PictureModel
from hpc_models.segmentation.settings import SwinUNETRSettings
from hpc_models.settings import DataShape

STRIDE = 32


class SwinUNETR(PictureModel):
    """MONAI's SwinUNETR in two dimensions.

    Raises:
        ValueError: MONAI is missing, or sizes that do not fit each other. Pictures whose sides are no multiples of 32
            are padded; they must be larger than 32, since its norms need more than one pixel at the bottom.
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
        """Switch activation checkpointing of the transformer's blocks; results do not change."""
        for module in self.net.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = on  # type: ignore[assignment]

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        net, swin = self.net, self.net.swinViT
        stages = [getattr(swin, f"layers{i}")[0] for i in range(1, 5)]
        encoders = [getattr(net, f"encoder{i}") for i in (1, 2, 3, 4, 10)]
        return [*stages, *encoders, *(getattr(net, f"decoder{i}") for i in (5, 4, 3, 2, 1))]

    def network(self, image: Tensor) -> Tensor:
        """See `PictureModel`."""
        return cast(Tensor, self.net(image))
