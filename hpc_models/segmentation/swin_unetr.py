"""Swin UNETR: MONAI's network behind this project's front end for pictures, crops and token sets; torch, this folder.

Hatamizadeh et al., Swin UNETR (2022). MONAI itself (the extra `monai`) is loaded when a model is built.
"""

from __future__ import annotations

from torch import Tensor, nn

from hpc_models.blocks.init import set_prior
from hpc_models.segmentation.monai_nets import build_net
from hpc_models.tokens.pictures import PictureModel

STRIDE = 32


class SwinUNETR(PictureModel):
    """MONAI's SwinUNETR in two dimensions.

    Args:
        size_px: see `PictureModel`.
        patch: see `PictureModel`.
        length: see `PictureModel`.
        classes: K.
        in_channels: channels of the input.
        layout: see `PictureModel`.
        grid: see `PictureModel`.
        feature_size: channels of the finest level, a multiple of 12.
        depths: blocks of the four stages.
        heads: attention heads of the four stages.
        window: side of an attention window.
        dropout: of the transformer.
        normalise: see `PictureModel`.
        checkpointing: recompute the transformer's blocks in the backward pass.
        prior: expected share of foreground; sets the last bias to its logit. None leaves it as is.

    Raises:
        ValueError: MONAI is missing, or sizes that do not fit each other. Pictures whose sides are no multiples of 32
            are padded; they must be larger than 32, since its norms need more than one pixel at the bottom.
    """

    def __init__(
        self,
        size_px: int,
        patch: int,
        length: int,
        classes: int = 1,
        in_channels: int = 3,
        layout: str = "geometric",
        grid: int | None = None,
        feature_size: int = 24,
        depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        heads: tuple[int, int, int, int] = (3, 6, 12, 24),
        window: int = 7,
        dropout: float = 0.0,
        normalise: bool = True,
        checkpointing: bool = False,
        prior: float | None = None,
    ) -> None:
        super().__init__(size_px, patch, length, layout, grid, normalise, STRIDE)
        if self.picture_px <= STRIDE:
            raise ValueError(f"swin_unetr needs pictures larger than {STRIDE} px, got {self.picture_px}")
        self.net = build_net(
            "SwinUNETR",
            in_channels=in_channels,
            out_channels=classes,
            feature_size=feature_size,
            depths=tuple(depths),
            num_heads=tuple(heads),
            window_size=window,
            drop_rate=dropout,
            attn_drop_rate=dropout,
            spatial_dims=2,
        )
        set_prior(self.out.bias, prior)
        self.set_checkpointing(checkpointing)

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
        return self.net(image)
