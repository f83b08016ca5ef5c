"""The budget tree as it is defined, with a heap over the pixels: what the trees of `data_prep` must agree with."""

import heapq


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
