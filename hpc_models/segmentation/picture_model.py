"""Networks of whole pictures on every kind of batch: crops, token sets laid out as one, bare pictures.

Tokens become a picture by `tokens.layout`, the network answers per pixel, and the answer goes back to the cells.
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
from hpc_models.tokens.batch import Batch, all_valid, clear_padding, pack, unpack
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.layout import GeometricLayout, SequenceLayout, cells_of, grid_side


def on_tiles(network: nn.Module, batch: Batch) -> Tensor:
    """Each real token as a picture, through `network.forward_image`: (B, L, p, p, K), zeros in padding."""
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

    Layout "geometric" puts each token where its leaf lies. "sequence" goes row by row in the order of the tokens, as
    the authors of APF did; uniform tokens lie as in geometric. In "tiles" each token is a picture of size_px. Sides of
    pictures are padded to a multiple of `multiple`, and the answer is cut again.

    Attributes:
        picture_px: side of the picture that token sets are laid out in.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, settings: PictureSettings, data: DataShape, multiple: int) -> None:
        super().__init__(settings)
        self.size_px, self.patch, self.length = data.size_px, data.patch, data.length
        self.layout, self.multiple = settings.layout, multiple
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
        """Logits of every cell, (B, L, p, p, K); rows of padding mean nothing.

        A tensor goes to `forward_image`, so that wrappers, which see only `forward`, serve both.
        """
        if isinstance(batch, Tensor):
            return self.forward_image(batch)
        if self.layout == "tiles":
            return on_tiles(self, batch)
        # Tokens to a picture.
        tokens = batch["tokens"]
        if tokens.shape[2] != self.patch:
            raise ValueError(f"layout={self.layout} takes tokens of {self.patch} cells a side, got {tokens.shape[2]}")
        tokens = clear_padding(tokens, None if all_valid(batch["valid"]) else batch["valid"])
        layout: GeometricLayout | SequenceLayout
        if self.layout == "sequence" and not self.uniform:
            if tokens.shape[1] < self.length:  # the network was made for a picture of this size
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
    def longer(values: Tensor) -> Tensor:
        return torch.cat((values, values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])), 1)

    keys = ("tokens", "leaf_xy", "leaf_size", "valid")
    return cast(Batch, {key: longer(batch[key]) for key in keys})  # type: ignore[literal-required]
