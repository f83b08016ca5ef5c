"""Augmentation on token sets equals augmentation of the picture, and depends on nothing but its seed."""

import numpy as np
import pytest

from data_prep.quadtree import Leaves, check_tiling
from data_prep.tokens import cut, rebuild
from launch.augment import DIHEDRAL, jitter, turn_leaves, turn_pixels, turn_tokens
from tests.launch.small import PATCH, SIZE, picture, token_set


@pytest.mark.parametrize("code", range(DIHEDRAL))
@pytest.mark.parametrize("patching", ["apf", "uniform"])
def test_turned_tokens_are_the_tokens_of_the_turned_picture(code, patching):
    tokens = token_set(1, patching)
    image, mask = (np.ascontiguousarray(turn_pixels(a, code, 0, 1)) for a in picture(1, (SIZE, SIZE)))
    per_token = {"tokens": tokens.tokens, "masks": tokens.mask_counts, "content": tokens.content_counts}
    xy, size, turned = turn_tokens(tokens.leaf_xy, tokens.leaf_size, per_token, SIZE, code)
    check_tiling(Leaves(xy, size), SIZE)
    again = cut(
        lambda x, y, w, h: image[y : y + h, x : x + w], Leaves(xy, size), PATCH, SIZE, (SIZE, SIZE),
        lambda x, y, w, h: mask[y : y + h, x : x + w],
    )  # fmt: skip
    np.testing.assert_array_equal(turned["tokens"], again.tokens)
    np.testing.assert_array_equal(turned["masks"], again.mask_counts)
    np.testing.assert_array_equal(turned["content"], again.content_counts)


@pytest.mark.parametrize("code", range(DIHEDRAL))
def test_padding_turns_with_the_content(code):
    tokens = token_set(3, "apf", (SIZE, SIZE - 16))
    xy, size, turned = turn_tokens(tokens.leaf_xy, tokens.leaf_size, {"c": tokens.content_counts}, SIZE, code)
    cell = (size // PATCH)[:, None, None] ** 2
    content = rebuild(turned["c"] == cell, xy, size, SIZE)
    expected = np.zeros((SIZE, SIZE), bool)
    expected[: SIZE - 16] = True
    np.testing.assert_array_equal(content, turn_pixels(expected, code, 0, 1))


def test_the_eight_turns_differ_and_keep_the_frame():
    corner = np.arange(9).reshape(3, 3)
    assert len({turn_pixels(corner, code, 0, 1).tobytes() for code in range(DIHEDRAL)}) == DIHEDRAL
    xy, size = np.array([[0, 0], [32, 0], [0, 32], [32, 32]]), np.full(4, 32)
    for code in range(DIHEDRAL):
        assert sorted(map(tuple, turn_leaves(xy, size, 64, code).tolist())) == sorted(map(tuple, xy.tolist()))


def test_jitter():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    plain = jitter(pixels, np.random.default_rng(1), 0.0)
    np.testing.assert_array_equal(plain, (pixels / 255).astype(np.float32))
    one, two, other = (jitter(pixels, np.random.default_rng(seed), 0.3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 0.01
    assert one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1
    assert np.abs(one - plain).max() < 1.0 and np.abs(one - plain).mean() < 0.4
    # Pixel by pixel: the same colour always becomes the same colour.
    np.testing.assert_array_equal(jitter(pixels[:1], np.random.default_rng(1), 0.3), one[:1])
