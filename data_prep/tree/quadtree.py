"""The two trees of APF over edge counts: threshold and budget. NumPy only; no pixels, no files, no ranks here.

Why the budget tree needs no heap. Splitting the leaf with the largest count, ties broken by (depth, Morton), visits
the nodes in the order (count descending, depth ascending, Morton ascending): a child's count never exceeds its
parent's and an equal parent is shallower, so a node becomes available before its turn comes. Hence the tree of L
leaves is the first (L - 1) // 3 nodes of that order made internal. Level by level from the root: if a node is among
the first K of the whole order, its parent is too, so its parent is among the first K of the levels seen so far. It is
therefore enough to carry the best K nodes downwards and trim after every level: O(depth * L log L) after the counts.
Nothing else about counts is used, so any integer score will do of which a child has at most as much as its parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.system.powers_of_two import tree_depth

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Leaves:
    """Leaves of a tree in Morton order.

    Attributes:
        xy: (N, 2) int32, top-left corner in frame pixels.
        size: (N,) int32, side in frame pixels.
    """

    xy: NDArray[np.int32]
    size: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self.size)


@dataclass(frozen=True)
class Nodes:
    """Nodes of one or several depths, in the coordinates of their own depth; all int64.

    Attributes:
        depth: (N,) depth, 0 = root.
        x: (N,) column among the 2**depth of its depth.
        y: (N,) row.
        count: (N,) edge pixels in the node, or another score of it.
    """

    depth: IntArray
    x: IntArray
    y: IntArray
    count: IntArray

    def take(self, where: NDArray[Any]) -> Nodes:
        """Those nodes that a mask or an index array names."""
        return Nodes(self.depth[where], self.x[where], self.y[where], self.count[where])

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.depth)


def morton(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.uint64]:
    """Z-order code: the bits of x and y interleaved, x in the lowest bit, y downwards.

    Args:
        x: non-negative integers below 2**32, any shape.
        y: the same shape.

    Returns:
        uint64 of that shape.
    """
    return _spread(x) | (_spread(y) << np.uint64(1))


def _spread(value: NDArray[Any]) -> NDArray[np.uint64]:
    """Put a zero bit between all bits of a 32-bit number."""
    bits = np.asarray(value).astype(np.uint64)
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        bits = (bits | (bits << np.uint64(shift))) & np.uint64(mask)
    return bits


def pyramid(counts: NDArray[Any]) -> list[NDArray[Any]]:
    """Edge counts of all nodes, depth by depth.

    Args:
        counts: (G, G) non-negative integers, pixels per smallest cell, G a power of two.

    Returns:
        log2(G) + 1 arrays; entry d is (2**d, 2**d), indexed [y, x]. int32 where the whole sum fits, else int64.

    Raises:
        ValueError: counts is not a square of power-of-two side.
    """
    side = len(counts)
    if counts.shape != (side, side) or not side or side & (side - 1):
        raise ValueError(f"counts must be a square of power-of-two side, got shape {counts.shape}")
    small = int(counts.sum(dtype=np.int64)) < 2**31
    level: NDArray[np.signedinteger[Any]] = np.asarray(counts, dtype=np.int32 if small else np.int64)
    levels = [level]
    while level.shape[0] > 1:
        rows = level[0::2] + level[1::2]
        level = rows[:, 0::2] + rows[:, 1::2]
        levels.append(level)
    return levels[::-1]


def threshold_tree(counts: NDArray[Any], p_min: int, split_value: int, max_depth: int | None = None) -> Leaves:
    """The paper's tree: split while count > split_value, side > p_min and depth < max_depth.

    Args:
        counts: (G, G) edge pixels per p_min cell, G = size_px / p_min a power of two.
        p_min: side of the smallest leaf in pixels, a power of two.
        split_value: v of the paper, at least 0.
        max_depth: depth at which splitting stops; None for log2(G).

    Returns:
        Leaves in Morton order; their number is 1 modulo 3.

    Raises:
        ValueError: sizes that are no powers of two, or a negative split value or depth.
    """
    _check(counts, p_min)
    if split_value < 0:
        raise ValueError(f"the split value must be at least 0, got {split_value}")
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"the depth must be at least 0, got {max_depth}")
    bottom = len(counts).bit_length() - 1
    split = candidates(counts, above=split_value)
    if max_depth is not None:
        split = split.take(split.depth < max_depth)
    return tree_of(split, bottom, p_min)


def budget_tree(counts: NDArray[Any], p_min: int, length: int) -> Leaves:
    """Best-first tree of at most `length` leaves: split the largest count until no split fits.

    Ties go to the coarser node, then to the first in Morton order. Ends early when the next count is 0. Trees are
    nested in `length`.

    Args:
        counts: (G, G) edge pixels per p_min cell, G = size_px / p_min a power of two.
        p_min: side of the smallest leaf in pixels, a power of two.
        length: L, the largest number of leaves, at least 4.

    Returns:
        Leaves in Morton order; their number is 1 modulo 3 and at most `length`.

    Raises:
        ValueError: length below 4, or sizes that are no powers of two.
    """
    _check(counts, p_min)
    return budget_tree_of(pyramid(counts), p_min, length)


def budget_tree_of(levels: Sequence[NDArray[Any]], p_min: int, length: int) -> Leaves:
    """As `budget_tree`, by any score of the nodes instead of the number of edge pixels.

    Args:
        levels: log2(G) + 1 arrays; entry d is (2**d, 2**d) non-negative integers, indexed [y, x]. No child's score
            exceeds its parent's.
        p_min: side of the smallest leaf in pixels, a power of two.
        length: L, the largest number of leaves, at least 4.

    Returns:
        Leaves in Morton order.

    Raises:
        ValueError: length below 4.
    """
    if length < 4:
        raise ValueError(f"the length must be at least 4 (one split makes four leaves), got {length}")
    return tree_of(_candidates(levels, 0, (length - 1) // 3), len(levels) - 1, p_min)


def candidates(
    counts: NDArray[Any], above: int = 0, keep: int | None = None, origin: tuple[int, int, int] = (0, 0, 0)
) -> Nodes:
    """Nodes of a subtree that a tree may split: those with more than `above` edge pixels, smallest cells left out.

    With `keep`, the first `keep` of them in the order of the budget rule (count descending, depth ascending, Morton
    ascending): no others can be among the first `keep` of the whole tree. Level by level: a node among the first K
    has its parent among the first K of the levels above, so it is enough to carry K nodes downwards.

    Args:
        counts: (G, G) edge pixels per smallest cell of the subtree, G a power of two.
        above: count that a node must exceed; with `keep` it is 0.
        keep: K, or None for all.
        origin: (depth, x, y) of the subtree's root in the whole tree.
    """
    found = _candidates(pyramid(counts), above, keep)
    shift = np.left_shift(1, found.depth)
    depth0, x0, y0 = origin
    return Nodes(found.depth + depth0, found.x + x0 * shift, found.y + y0 * shift, found.count)


def _candidates(levels: Sequence[NDArray[Any]], above: int, keep: int | None) -> Nodes:
    root = Nodes(*(np.full(1, value, np.int64) for value in (0, 0, 0, int(levels[0][0, 0]))))
    newest = root.take(root.count > above) if len(levels) > 1 else _nothing()
    best = [newest]
    for depth in range(1, len(levels) - 1):
        children = _children(newest, levels[depth])
        newest = children.take(children.count > above)
        best.append(newest)
        if keep is not None:
            best = [first_nodes(best, keep)]
            newest = best[0].take(best[0].depth == depth)
        if not len(newest):
            break
    return _join(best) if keep is None else first_nodes(best, keep)


def first_nodes(parts: Iterable[Nodes], k: int) -> Nodes:
    """The first k of all nodes in the order (count descending, depth ascending, Morton ascending).

    The parts are taken one by one, so that memory goes with k and the largest part, not with their number.
    """
    best = _nothing()
    for part in parts:
        nodes = _join([best, part]) if len(best) else part
        if len(nodes) > k:
            nodes = nodes.take(np.lexsort((morton(nodes.x, nodes.y), nodes.depth, -nodes.count))[:k])
        best = nodes
    return best


def tree_of(internal: Nodes, bottom: int, p_min: int) -> Leaves:
    """Leaves of the tree whose internal nodes are given.

    Args:
        internal: nodes that are split, with every node's parent among them; none for the root alone.
        bottom: depth of the smallest cells.
        p_min: their side in pixels.

    Returns:
        Leaves in Morton order.
    """
    if not len(internal):
        zero = np.zeros(1, np.int64)
        return _in_morton_order([Nodes(zero, zero, zero, zero)], p_min, bottom)
    leaves = []
    for depth in range(int(internal.depth.max()) + 1):
        side = 1 << (depth + 1)
        children = _children(internal.take(internal.depth == depth), None)
        split = internal.take(internal.depth == depth + 1)
        inner = np.isin(children.y * side + children.x, split.y * side + split.x)
        leaves.append(children.take(~inner))
    return _in_morton_order(leaves, p_min, bottom)


def check_tiling(leaves: Leaves, size_px: int) -> None:
    """Check that leaves tile the frame without gap or overlap and stand in Morton order.

    An aligned square of side s is the interval [m, m + s * s) of Morton codes, so the squares tile the frame in order
    exactly if every interval begins where the one before ended, from 0 to size_px**2.

    Raises:
        ValueError: naming the first leaf that breaks the rule.
    """
    xy, size = leaves.xy.astype(np.int64), leaves.size.astype(np.int64)
    if xy.shape != (len(size), 2) or not len(size):
        raise ValueError(f"leaves must be (N, 2) corners and N sizes, got {xy.shape} and {size.shape}")
    odd = (size < 1) | (size & (size - 1) != 0) | (xy < 0).any(1) | (xy + size[:, None] > size_px).any(1)
    odd |= (xy % np.maximum(size, 1)[:, None] != 0).any(1)
    if odd.any():
        i = int(np.argmax(odd))
        raise ValueError(f"leaf {i} at {tuple(xy[i].tolist())} of side {size[i]} is no node of a {size_px} px frame")
    start = morton(xy[:, 0], xy[:, 1]).astype(np.int64)
    end = np.cumsum(size * size)
    wrong = start != np.concatenate([[0], end[:-1]])
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"leaf {i} at {tuple(xy[i].tolist())} of side {size[i]} breaks the tiling or its order")
    if int(end[-1]) != size_px * size_px:
        raise ValueError(f"{len(size)} leaves cover {int(end[-1])} of {size_px * size_px} pixels")


def _check(counts: NDArray[Any], p_min: int) -> None:
    tree_depth(counts.shape[0] * p_min, p_min)


def _nothing() -> Nodes:
    none = np.zeros(0, np.int64)
    return Nodes(none, none, none, none)


def _join(parts: list[Nodes]) -> Nodes:
    return Nodes(*(np.concatenate([getattr(n, name) for n in parts]) for name in ("depth", "x", "y", "count")))


def _children(nodes: Nodes, level: NDArray[Any] | None) -> Nodes:
    """The four children of every node; `level` holds the counts of their depth, None for no counts."""
    x = (2 * nodes.x[:, None] + np.array([0, 1, 0, 1])).ravel()
    y = (2 * nodes.y[:, None] + np.array([0, 0, 1, 1])).ravel()
    count = np.zeros(len(x), np.int64) if level is None else level[y, x].astype(np.int64)
    return Nodes(np.repeat(nodes.depth + 1, 4), x, y, count)


def _in_morton_order(parts: list[Nodes], p_min: int, bottom: int) -> Leaves:
    nodes = _join(parts)
    size = np.int64(p_min) << (bottom - nodes.depth)
    x, y = nodes.x * size, nodes.y * size
    order = np.argsort(morton(x, y))
    return Leaves(np.stack([x, y], 1)[order].astype(np.int32), size[order].astype(np.int32))
