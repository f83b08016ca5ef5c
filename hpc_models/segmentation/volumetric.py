"""Networks of whole volumes for reference on BTCV; imports torch only, MONAI when one is built.

Not in the registry: token files, and with them training, know pictures (slices of a volume), not volumes.
"""

from __future__ import annotations

from torch import nn

from hpc_models.segmentation.monai_nets import build_net


def unetr3d(
    image_px: tuple[int, int, int] = (96, 96, 96), in_channels: int = 1, classes: int = 14, feature_size: int = 16
) -> nn.Module:
    """MONAI's UNETR for volumes, as on BTCV: 13 organs and background.

    Args:
        image_px: size of a volume in voxels, multiples of 16.
        in_channels: channels of the volume.
        classes: K.
        feature_size: channels of the finest level.

    Returns:
        A module from (B, C, X, Y, Z) to (B, K, X, Y, Z) logits, on torch's default device.

    Raises:
        ValueError: MONAI is not installed, or a side that is no multiple of 16.
    """
    if any(side < 16 or side % 16 for side in image_px):
        raise ValueError(f"sides must be multiples of 16, got {list(image_px)}")
    return build_net(
        "UNETR", in_channels=in_channels, out_channels=classes, img_size=tuple(image_px), feature_size=feature_size
    )
