"""The budget tree as it is defined, with a heap over the pixels: what the trees of `data_prep` must agree with."""

import heapq

import numpy as np

from data_prep.tree.quadtree import morton


def naive_morton(x, y):
    return sum((x >> i & 1) << 2 * i | (y >> i & 1) << (2 * i + 1) for i in range(32))


def heap_tree(values, size_px, p_min, length, score):
    """Best-first splitting by the score of a square's values; ties: coarser first, then Morton. [(x, y, side)]"""

    def entry(x, y, side):
        return -score(values[y : y + side, x : x + side]), -side, naive_morton(x // side, y // side), x, y

    heap, leaves, number = [entry(0, 0, size_px)], [], 1
    while heap:
        value, negative, _, x, y = heapq.heappop(heap)
        side = -negative
        if side == p_min or value == 0 or number + 3 > length:
            leaves.append((x, y, side))
            continue
        number += 3
        half = side // 2
        for a, b in ((x, y), (x + half, y), (x, y + half), (x + half, y + half)):
            heapq.heappush(heap, entry(a, b, half))
    return sorted(leaves, key=lambda leaf: naive_morton(leaf[0], leaf[1]))


def list_scan(edges: np.ndarray, p_min: int, length: int) -> list[tuple[int, int, int]]:
    """Best first as it is usually written: look through the list for the largest count, replace it by its quarters."""

    def node(x: int, y: int, size: int) -> tuple[int, int, int, int, int]:
        count = int(np.count_nonzero(edges[y : y + size, x : x + size])) if size >= p_min else 0
        return count, size, -int(morton(np.array(x), np.array(y))), x, y

    leaves = [node(0, 0, len(edges))]
    while len(leaves) + 3 <= length:
        best = max((leaf for leaf in leaves if leaf[1] > p_min), default=(0,))
        if best[0] == 0:
            break
        leaves.remove(best)
        _, size, _, x, y = best
        half = size // 2
        leaves += [node(x + dx, y + dy, half) for dy in (0, half) for dx in (0, half)]
    return sorted((leaf[3], leaf[4], leaf[1]) for leaf in leaves)
