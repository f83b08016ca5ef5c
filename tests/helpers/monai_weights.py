"""MONAI's 2-D UNETR beside ours: its weights, and pictures in and out; MONAI itself is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from hpc_models.segmentation.unetr import UNETR
from hpc_models.tokens.batch import uniform_batch
from hpc_models.tokens.geometry import paint

# MONAI name -> our name. MONAI's UNETR is fixed to P = 16: projections 2..4, doublings 5..2.
_RULES: tuple[tuple[str, str], ...] = (
    (r"^vit\.patch_embedding\.patch_embeddings\.", "embed.proj."),
    (r"^vit\.patch_embedding\.position_embeddings$", "position.table"),
    (r"^encoder1\.layer\.", "decoder.image."),
    (r"^encoder([234])\.transp_conv_init\.", r"decoder.projections.\1.first."),
    (r"^encoder([234])\.blocks\.", r"decoder.projections.\1.steps."),
    (r"^decoder([5432])\.transp_conv\.", r"decoder.ups.\1.up."),
    (r"^decoder([5432])\.conv_block\.", r"decoder.ups.\1.mix."),
    (r"^out\.conv\.", "decoder.out."),
    (r"\.conv\.(weight|bias)$", r".\1"),
)


def our_name(monai_name: str) -> str:
    """Name of the same tensor in `UNETR` with a convolutional decoder."""
    name = monai_name
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"^decoder\.projections\.(\d)", lambda m: f"decoder.projections.{int(m[1]) - 2}", name)
    return re.sub(r"^decoder\.ups\.(\d)", lambda m: f"decoder.ups.{5 - int(m[1])}", name)


def load_monai_unetr(model: UNETR, state: Mapping[str, Tensor]) -> None:
    """Copy every tensor of a `monai.networks.nets.UNETR(spatial_dims=2, qkv_bias=False)` into `model`.

    Args:
        model: patch 16, decoder "raster" or "geometric", position "slot", uniform length, depth 12, same widths.
        state: MONAI's state dict.

    Raises:
        RuntimeError: names or shapes that do not match one to one.
    """
    model.load_state_dict({our_name(name): tensor for name, tensor in state.items()}, strict=True)


class OnPictures(nn.Module):
    """A model of token sets on square pictures by uniform patching: (B, C, R, R) to (B, K, R, R)."""

    def __init__(self, model: UNETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        side, batch = image.shape[-1], uniform_batch(image, self.model.patch)
        where = (batch["leaf_xy"], batch["leaf_size"], batch["valid"])
        return paint(self.model(batch), *where, side, side)
