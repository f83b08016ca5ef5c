"""Networks of whole pictures on every kind of batch: crops, token sets laid out as one, bare pictures; torch only.

One front end for all of them: tokens become a picture by `tokens.layout`, the network answers per pixel, and the
answer goes back to the cells of the tokens.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.tokens.batch import Batch, all_valid, pack, unpack
from hpc_models.tokens.geometry import is_power_of_two
from hpc_models.tokens.layout import GeometricLayout, SequenceLayout, grid_side

LAYOUTS = ("geometric", "sequence", "tiles")


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


class PictureModel(nn.Module):
    """What segmentation networks of whole pictures share; subclasses write `network`.

    Args:
        size_px: side R of the frame, or of the crops with layout "tiles".
        patch: p, cells per token side.
        length: L, tokens per sequence after padding. (R / p)^2 means uniform patching: the picture is then the frame.
        layout: "geometric" (each token where its leaf lies), "sequence" (row by row in the order of the tokens, as the
            authors of APF did; the same as geometric for uniform patching) or "tiles" (each token is a picture).
        grid: geometric: side of the picture in tokens, a power of two; None: see `grid_side`.
        normalise: map the input by (x - 0.5) / 0.5 first.
        multiple: sides of pictures are padded to multiples of this, and the answer is cut again.

    Attributes:
        picture_px: side of the picture that token sets are laid out in.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown layout.
    """

    task = "segmentation"
    inputs = ("tokens", "tiles")

    def __init__(
        self, size_px: int, patch: int, length: int, layout: str, grid: int | None, normalise: bool, multiple: int
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.size_px, self.patch, self.length = size_px, patch, length
        self.layout, self.normalise, self.multiple = layout, normalise, multiple
        self.picture_px, self.grid = size_px, 1
        if layout == "tiles":
            return
        if not is_power_of_two(patch) or size_px % patch or not is_power_of_two(size_px // patch):
            raise ValueError(f"size_px must be patch * 2^k and patch a power of two, got {size_px} with patch {patch}")
        cells = size_px // patch
        self.uniform = length == cells * cells
        if layout == "sequence" and not self.uniform:
            self.grid = SequenceLayout(length, patch).side
        else:
            self.grid = cells if self.uniform and grid is None else grid_side(length, cells, grid)
        self.picture_px = self.grid * patch

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
        x = (image - 0.5) / 0.5 if self.normalise else image
        return self.network(pad_to(x, self.multiple))[..., :h, :w]


def _pad_tokens(batch: Batch, length: int) -> Batch:
    keys = ("tokens", "leaf_xy", "leaf_size", "valid")
    return Batch(**{k: _longer(batch[k], length) for k in keys})  # type: ignore[typeddict-item,literal-required]


def _longer(values: Tensor, length: int) -> Tensor:
    return torch.cat((values, values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])), 1)
