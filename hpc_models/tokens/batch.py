"""The batch every model takes, and how to make one from a plain image.

Shapes use one letter per axis: B images, L tokens, p cells per token side, K classes, D width, M valid tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from hpc_models.tokens.geometry import morton_code


class Batch(TypedDict):
    """What a model reads from one batch of token sets.

    tokens (B, L, p, p, 3) float32 in [0, 1]; leaf_xy (B, L, 2) int64, top left in frame pixels; leaf_size (B, L) int64,
    side in frame pixels, 0 for padding; valid (B, L) bool, False for padding. The loss also reads mask_counts
    (B, L, p, p, K) and content_counts (B, L, p, p), both zero in padding. Batches of whole pictures have image
    (B, C, H, W) float32 in [0, 1] instead of tokens. Classification adds label (B,) int64.
    """

    tokens: Tensor
    leaf_xy: Tensor
    leaf_size: Tensor
    valid: Tensor
    mask_counts: NotRequired[Tensor]
    content_counts: NotRequired[Tensor]
    image: NotRequired[Tensor]
    label: NotRequired[Tensor]


def images_of(batch: Batch | Tensor) -> Tensor:
    """The pictures of a batch, (N, C, H, W): whole ones, or a crop per token (N = B * L)."""
    if isinstance(batch, Tensor):
        return batch
    if "image" in batch:
        return batch["image"]
    return batch["tokens"].flatten(0, 1).permute(0, 3, 1, 2)


def grid_of(image_hw: Sequence[int], patch_px: int, unit: str = "patch_px {}") -> tuple[int, int]:
    """Rows and columns of patches in a picture.

    Raises:
        ValueError: a side is no multiple of `patch_px`; `unit` is what the message calls it.
    """
    h, w = image_hw
    if h % patch_px or w % patch_px:
        raise ValueError(f"picture sides {h}x{w} are no multiples of {unit.format(patch_px)}")
    return h // patch_px, w // patch_px


def all_valid(valid: Tensor) -> bool:
    """Whether no token of the batch is padding; True on the meta device, where only costs are counted.

    A GPU is waited for once per forward pass. That buys the attention kernels that take no mask.
    """
    return True if valid.is_meta else bool(valid.all())


def pack(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, L, ...) to (M, ...): the rows of real tokens; None: of all tokens."""
    return x.flatten(0, 1) if valid is None else x[valid]


def unpack(rows: Tensor, like: Tensor, valid: Tensor | None) -> Tensor:
    """(M, ...) back to (B, L, ...) with zeros in padding; `like` gives B and L."""
    if valid is None:
        return cast(Tensor, rows.unflatten(0, like.shape[:2]))
    full = rows.new_zeros(*valid.shape, *rows.shape[1:])
    full[valid] = rows
    return full


def clear_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, L, ...) with zeros in padding; None: there is no padding."""
    return x if valid is None else x.masked_fill(~valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), 0)


def cut_patches(image: Tensor, patch_px: int) -> Tensor:
    """Cut (B, C, H, W) into (B, L, p, p, C) patches in raster order. Both sides are multiples of `patch_px`."""
    b, c, h, w = image.shape
    rows, cols = h // patch_px, w // patch_px
    blocks = image.reshape(b, c, rows, patch_px, cols, patch_px)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, patch_px, patch_px, c)


def join_patches(patches: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `cut_patches`: (B, rows*cols, p, p, C) in raster order to (B, C, rows*p, cols*p)."""
    b, _, p, _, c = patches.shape
    blocks = patches.reshape(b, rows, cols, p, p, c)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, cols * p)


def uniform_batch(image: Tensor, patch_px: int) -> Batch:
    """Cut images (B, 3, R, R) in [0, 1] as uniform patching does: L = (R / patch_px)^2 equal leaves in Morton order.

    Raises:
        ValueError: the images are not square, or `patch_px` does not divide the side.
    """
    b, _, h, w = image.shape
    if h != w or h % patch_px:
        raise ValueError(f"uniform_batch needs a square image whose side is a multiple of {patch_px}, got {h}x{w}")
    side = h // patch_px
    index = torch.arange(side * side, device=image.device)
    cell_xy = torch.stack((index % side, index // side), dim=-1)
    order = torch.argsort(morton_code(cell_xy))
    leaf_xy = (cell_xy[order] * patch_px).expand(b, -1, -1)
    return Batch(
        tokens=cut_patches(image, patch_px)[:, order],
        leaf_xy=leaf_xy,
        leaf_size=torch.full((b, side * side), patch_px, dtype=torch.int64, device=image.device),
        valid=torch.ones((b, side * side), dtype=torch.bool, device=image.device),
    )
