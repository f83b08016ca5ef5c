"""Tokens of one slide, what belongs to them, and their way back to pixels. Imports the tree only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.tree.quadtree import Leaves, check_tiling


@dataclass(frozen=True)
class TokenSet:
    """What a model sees of one slide, and what a metric needs. Row i of everything is leaf i.

    Attributes:
        tokens: (N, p, p, 3) uint8, the leaf's pixels as box means (or, with `--resample cubic`, interpolated).
        leaf_xy: (N, 2) int32, top-left corner in frame pixels.
        leaf_size: (N,) int32, side in frame pixels.
        content_counts: (N, p, p) uint32, pixels of the cell that are content: no padding, inside the field of view.
        mask_counts: (N, p, p, K) uint32, content pixels of the cell that belong to class k + 1; None without a mask.
        size_px: side R of the frame.
        content_wh: width and height of the content at the frame's top left.
    """

    tokens: NDArray[np.uint8]
    leaf_xy: NDArray[np.int32]
    leaf_size: NDArray[np.int32]
    content_counts: NDArray[np.uint32]
    mask_counts: NDArray[np.uint32] | None
    size_px: int
    content_wh: tuple[int, int]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.leaf_size)

    # Training draws parts of one set thousands of times: what needs a look at every cell is looked up once.
    @cached_property
    def has_content(self) -> NDArray[np.bool_]:
        """(N,) which leaves have content."""
        return np.asarray(self.content_counts.any(axis=(1, 2)))

    @cached_property
    def foreground_cells(self) -> NDArray[np.integer[Any]]:
        """Flat indices into (N, p, p) of the cells with foreground of any class; there must be a mask."""
        assert self.mask_counts is not None
        return positions(self.mask_counts.any(axis=-1))


def positions(flags: Any) -> NDArray[np.integer[Any]]:
    """Flat indices of what is set in an array of bool, in four bytes each where those suffice."""
    found = np.flatnonzero(flags)
    return found.astype(np.int32) if flags.size <= 2**31 else found


def check_leaves(leaves: Leaves, p: int, size_px: int) -> None:
    """Raise ValueError unless leaves tile the frame in Morton order and can be cut into p x p cells."""
    check_tiling(leaves, size_px)
    if int(leaves.size.min()) < p:
        raise ValueError(f"a leaf of {int(leaves.size.min())} px is smaller than the patch of {p} px")
    if int(leaves.size.max()) // p > 65535:  # 65536 squared does not fit the file's uint32 counts
        raise ValueError(f"a cell of {int(leaves.size.max()) // p} px is too large, use a patch of at least 2")


def content_counts(
    leaf_xy: NDArray[np.int32], leaf_size: NDArray[np.int32], p: int, content_wh: tuple[int, int]
) -> NDArray[np.uint32]:
    """Pixels of every cell inside the content, (N, p, p) uint32; a rectangle against a rectangle, so no pixel is read.

    Args:
        leaf_xy: (N, 2) top-left corners in frame pixels.
        leaf_size: (N,) sides in frame pixels.
        p: cells per side.
        content_wh: width and height of the content.
    """
    cell = (leaf_size // p).astype(np.int64)[:, None]
    start = np.arange(p) * cell
    across = np.clip(content_wh[0] - leaf_xy[:, 0:1] - start, 0, cell).astype(np.uint32)
    down = np.clip(content_wh[1] - leaf_xy[:, 1:2] - start, 0, cell).astype(np.uint32)
    return down[:, :, None] * across[:, None, :]  # below 2**32, see `check_leaves`


def in_view(token_set: TokenSet) -> TokenSet:
    """A token set whose last class counts pixels outside the field of view, with those taken out of the content."""
    assert token_set.mask_counts is not None
    outside = token_set.mask_counts[..., -1]
    return replace(
        token_set,
        content_counts=token_set.content_counts - outside,
        mask_counts=np.ascontiguousarray(token_set.mask_counts[..., :-1]),
    )


def rebuild(
    values: NDArray[Any], leaf_xy: NDArray[np.int32], leaf_size: NDArray[np.int32], size_px: int
) -> NDArray[Any]:
    """Paint per-cell values back over the pixels of their cells: the inverse of cutting.

    Args:
        values: (N, p, p, ...) any type.
        leaf_xy: (N, 2) top-left corners in frame pixels.
        leaf_size: (N,) sides in frame pixels, multiples of p that divide size_px.
        size_px: side R of the frame.

    Returns:
        (R, R, ...) of the values' type; zero where no leaf lies.
    """
    p, rest = values.shape[1], values.shape[3:]
    raster = np.zeros((size_px, size_px, *rest), values.dtype)
    for s in np.unique(leaf_size).tolist():
        rows = np.flatnonzero(leaf_size == s)
        n, cell = size_px // s, s // p
        squares = raster.reshape(n, p, cell, n, p, cell, *rest)
        ix, iy = leaf_xy[rows, 0] // s, leaf_xy[rows, 1] // s
        squares[iy, :, :, ix] = values[rows][:, :, None, :, None]
    return raster
