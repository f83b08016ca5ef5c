"""What the APF authors' code does to a sequence, kept for comparison runs only. Imports only the token set.

Neither function is part of the method here: fixed lengths come from the budget tree, padding from a key mask, and one
token holds one leaf.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.tokens.token_set import TokenSet


def drop_or_repeat(token_set: TokenSet, length: int, seed: int) -> TokenSet:
    """Random drop or duplication to exactly `length` tokens (`--fit drop`; gvit, compress_mix_patches).

    Too many: a random choice without replacement, in the order drawn (the Morton order is lost, as there). Too few:
    random duplicates at the end. Duplicates carry no content and no mask counts, so no pixel is counted twice by a
    loss or a metric; pixels of dropped leaves are in no token, and what they cost is the difference between the
    mask counts before and after.

    Args:
        token_set: tokens of one slide.
        length: wanted number of tokens, at least 1.
        seed: of the random choice.

    Returns:
        A token set of `length` rows, which no longer tiles the frame unless nothing had to be done.

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"the length must be at least 1, got {length}")
    n = len(token_set)
    if n == length:
        return token_set
    rng = np.random.default_rng(seed)
    if n > length:
        rows = rng.choice(n, length, replace=False)
    else:
        rows = np.concatenate([np.arange(n), rng.integers(0, n, length - n)])
    content = token_set.content_counts[rows]
    mask = None if token_set.mask_counts is None else token_set.mask_counts[rows]
    content[n:] = 0  # rows beyond n are duplicates
    if mask is not None:
        mask[n:] = 0
    return dataclasses.replace(
        token_set,
        tokens=token_set.tokens[rows],
        leaf_xy=token_set.leaf_xy[rows],
        leaf_size=token_set.leaf_size[rows],
        content_counts=content,
        mask_counts=mask,
    )


def pack_strip(tokens: NDArray[Any]) -> NDArray[Any]:
    """Mix tokens as the authors' reshape does (`--packing strip`; gvit patchify).

    Their list of N patches (p, p, C) is reshaped to a strip (p, N * p, C) without a transpose, and the embedding then
    cuts that strip every p columns: each token holds one pixel row from each of p different leaves.

    Args:
        tokens: (N, p, p, C), one leaf each.

    Returns:
        (N, p, p, C), the tokens their model sees.
    """
    n, p, _, c = tokens.shape
    strip = tokens.reshape(p, n * p, c)
    return np.ascontiguousarray(strip.reshape(p, n, p, c).transpose(1, 0, 2, 3))


def unpack_strip(tokens: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `pack_strip`: (N, p, p, C) as the authors' model sees them to one leaf each."""
    n, p, _, c = tokens.shape
    return np.ascontiguousarray(tokens.transpose(1, 0, 2, 3)).reshape(n, p, p, c)
