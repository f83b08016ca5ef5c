"""Networks of whole pictures on every kind of batch: crops, token sets laid out as one, bare pictures; torch only.

One front end for all of them: tokens become a picture by `tokens.layout`, the network answers per pixel, and the
answer goes back to the cells of the tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.network import Network
from hpc_models.segmentation.settings import PictureSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, all_valid, pack, unpack
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.layout import GeometricLayout, SequenceLayout, cells_of, grid_side


def on_tiles(network: nn.Module, batch: Batch) -> Tensor:
    """Each real token as a picture of its own, through `network.forward_image`: (B, L, p, p, K), zeros in padding."""
    tokens, valid = batch["tokens"], batch["valid"]
    real = None if all_valid(valid) else valid
    rows = network.forward_image(pack(tokens, real).permute(0, 3, 1, 2))  # type: ignore[operator]
    return unpack(rows.permute(0, 2, 3, 1), valid, real)


def pad_to(image: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) with the border repeated to the right and below until both sides are multiples."""
    h, w = image.shape[-2:]
    return F.pad(image, (0, -w % multiple, 0, -h % multiple), mode="replicate")


class PictureModel(Network):
    """What segmentation networks of whole pictures share; subclasses write `network`.

    Args:
        settings: layout is "geometric" (each token where its leaf lies), "sequence" (row by row in the order of the
            tokens, as the authors of APF did; the same as geometric for uniform patching) or "tiles" (each token is a
            picture).
        data: size_px is the side of the crops with layout "tiles".
        multiple: sides of pictures are padded to multiples of this, and the answer is cut again.

    Attributes:
        picture_px: side of the picture that token sets are laid out in; with uniform patching the frame's.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, settings: PictureSettings, data: DataShape, multiple: int) -> None:
        super().__init__()
        self.size_px, self.patch, self.length = data.size_px, data.patch, data.length
        self.layout, self.normalise, self.multiple = settings.layout, settings.normalise, multiple
        self.picture_px, self.grid = data.size_px, 1
        if self.layout == "tiles":
            return
        if not is_power_of_two(data.patch):
            raise ValueError(f"patch must be a power of two, got {data.patch}")
        cells = cells_of(data)
        self.uniform = data.length == cells * cells
        if self.layout == "sequence" and not self.uniform:
            self.grid = SequenceLayout(data.length, data.patch).side
        elif self.uniform and settings.grid is None:
            self.grid = cells
        else:
            self.grid = grid_side(data.length, cells, settings.grid)
        self.picture_px = self.grid * data.patch

    @abstractmethod
    def network(self, image: Tensor) -> Tensor:
        """(N, C, H, W), sides multiples of `multiple`, to (N, K, H, W) logits."""

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Per-cell logits of every token, (B, L, p, p, K); rows of padding mean nothing.

        A tensor is taken as `forward_image` takes it, so that wrappers (which only see `forward`) serve both.
        """
        if isinstance(batch, Tensor):
            return self.forward_image(batch)
        if self.layout == "tiles":
            return on_tiles(self, batch)
        tokens = batch["tokens"]
        if tokens.shape[2] != self.patch:
            raise ValueError(f"layout={self.layout} takes tokens of {self.patch} cells a side, got {tokens.shape[2]}")
        if not all_valid(batch["valid"]):
            tokens = tokens.masked_fill(~batch["valid"][:, :, None, None, None], 0)
        layout: GeometricLayout | SequenceLayout
        if self.layout == "sequence" and not self.uniform:
            if tokens.shape[1] < self.length:  # the picture has the size the network was made for
                return self.forward(_pad_tokens(batch, self.length))[:, : tokens.shape[1]]
            layout = SequenceLayout(tokens.shape[1], self.patch)
        else:
            layout = GeometricLayout(batch, self.size_px, self.patch, self.grid)
        return layout.to_cells(self.forward_image(layout.image(tokens)))

    def forward_image(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K, H, W) logits; any size."""
        h, w = image.shape[-2:]
        return self.network(pad_to(self.centred(image), self.multiple))[..., :h, :w]


def _pad_tokens(batch: Batch, length: int) -> Batch:
    keys = ("tokens", "leaf_xy", "leaf_size", "valid")
    return cast(Batch, {key: _longer(batch[key], length) for key in keys})  # type: ignore[literal-required]


def _longer(values: Tensor, length: int) -> Tensor:
    return torch.cat((values, values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])), 1)
