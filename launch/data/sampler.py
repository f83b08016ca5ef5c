"""Which training images belong to which step: a pure function of (seed, step), whatever the number of ranks.

Must not import torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """An endless stream of epochs, each a seeded permutation, cut into global batches.

    Step t takes positions t * batch .. (t + 1) * batch - 1 of the stream and every rank a contiguous slice of them, so
    a resumed run needs only its step, and another number of ranks sees the same images.

    Args:
        images: Training images.
        batch: Images per step over all ranks.
        seed: Seed of the permutations.
    """

    def __init__(self, images: int, batch: int, seed: int) -> None:
        self.images = images
        self.batch = batch
        self.seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of epoch `epoch`, (images,) int64."""
        if epoch not in self._orders:
            # Two kept: a batch may lie across the border of two epochs, and prefetching never goes back further.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, 1, epoch]).permutation(self.images)
        return self._orders[epoch]

    def at(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """What `rank` of `world` trains on in step `step`: pairs (image index, global sample index).

        The global sample index counts samples since the start of training and seeds their augmentation.
        """
        share = self.batch // world
        first = step * self.batch + rank * share
        return [(int(self.order(g // self.images)[g % self.images]), g) for g in range(first, first + share)]
