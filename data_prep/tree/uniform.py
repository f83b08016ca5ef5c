"""Uniform patching as leaves, so that everything after the tree is shared. Imports only the tree's words."""

from __future__ import annotations

import numpy as np

from data_prep.system.powers_of_two import tree_depth
from data_prep.tree.quadtree import Leaves, morton


def uniform_leaves(size_px: int, patch_px: int) -> Leaves:
    """Equal squares of side patch_px in Morton order.

    Args:
        size_px: side R of the frame, patch_px times a power of two.
        patch_px: side of every leaf, a power of two.

    Returns:
        (size_px / patch_px)**2 leaves.

    Raises:
        ValueError: patch_px or size_px / patch_px is not a power of two.
    """
    side = 1 << tree_depth(size_px, patch_px)
    y, x = (axis.ravel() for axis in np.indices((side, side)))
    order = np.argsort(morton(x, y))
    xy = (np.stack([x, y], 1)[order] * patch_px).astype(np.int32)
    return Leaves(xy, np.full(side * side, patch_px, np.int32))
