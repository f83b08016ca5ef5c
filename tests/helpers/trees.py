"""Random token sets and the plain loops that say what the vectorised code must give."""

import numpy as np
import torch


def random_leaves(rng, size_px, p_min, split=0.6):
    """Leaves (x, y, side) of a random quadtree in Morton order (children: x first, then y)."""

    def grow(x, y, side):
        if side > p_min and (rng.random() < split or side == size_px):
            half = side // 2
            return [leaf for dy in (0, half) for dx in (0, half) for leaf in grow(x + dx, y + dy, half)]
        return [(x, y, side)]

    return grow(0, 0, size_px)


def random_batch(seed, size_px, p, length=None, images=2, classes=1, split=0.6, content_wh=None):
    """A padded batch of random trees, its pixel masks (B, R, R, K) bool and which pixels are content (R, R) bool.

    Args:
        length: tokens after padding; None: as many as the largest tree has.
        content_wh: part of the frame that is not padding; None: all of it.
    """
    rng = np.random.default_rng(seed)
    trees = [random_leaves(rng, size_px, p, split) for _ in range(images)]
    n = max(len(t) for t in trees) if length is None else length
    width, height = content_wh or (size_px, size_px)
    content = np.zeros((size_px, size_px), bool)
    content[:height, :width] = True
    mask = (rng.random((images, size_px, size_px, classes)) < 0.4) & content[None, :, :, None]
    batch = {
        "tokens": torch.zeros(images, n, p, p, 3),
        "leaf_xy": torch.zeros(images, n, 2, dtype=torch.int64),
        "leaf_size": torch.zeros(images, n, dtype=torch.int64),
        "valid": torch.zeros(images, n, dtype=torch.bool),
        "mask_counts": torch.zeros(images, n, p, p, classes),
        "content_counts": torch.zeros(images, n, p, p),
    }
    for b, leaves in enumerate(trees):
        for i, (x, y, side) in enumerate(leaves[:n]):
            batch["tokens"][b, i] = torch.from_numpy(rng.random((p, p, 3), dtype=np.float32))
            batch["leaf_xy"][b, i] = torch.tensor([x, y])
            batch["leaf_size"][b, i] = side
            batch["valid"][b, i] = True
            batch["mask_counts"][b, i] = torch.from_numpy(box_sum(mask[b, y : y + side, x : x + side], p))
            batch["content_counts"][b, i] = torch.from_numpy(box_sum(content[y : y + side, x : x + side, None], p))[
                ..., 0
            ]
    return batch, mask, content


def box_sum(square, p):
    """(s, s, K) to (p, p, K) sums over equal blocks."""
    cell = square.shape[0] // p
    return square.reshape(p, cell, p, cell, -1).sum((1, 3)).astype(np.float32)


def painted(values, batch, b, size_px):
    """Cell values (L, p, p, C) of image b painted to (R, R, C) with plain loops; NaN where no leaf lies."""
    p = values.shape[1]
    out = np.full((size_px, size_px, values.shape[-1]), np.nan)
    for i in range(len(values)):
        if not batch["valid"][b, i]:
            continue
        x, y = batch["leaf_xy"][b, i].tolist()
        cell = int(batch["leaf_size"][b, i]) // p
        for r in range(p):
            for c in range(p):
                out[y + r * cell : y + (r + 1) * cell, x + c * cell : x + (c + 1) * cell] = values[i, r, c]
    return out
