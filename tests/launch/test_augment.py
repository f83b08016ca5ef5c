"""Augmentation on token sets equals augmentation of the picture, and depends on nothing but its seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.quadtree import Leaves, check_tiling
from data_prep.tokens import cut, rebuild
from launch.augment import DIHEDRAL, jitter, leaves_in_part, turn_leaves, turn_pixels, turn_tokens
from launch.batches import part_of, training_batch
from launch.config import ConfigError, load
from launch.data import TokenFiles
from tests.launch.small import PATCH, SIZE, overrides, picture, token_set


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


def test_a_part_of_a_tree_is_the_leaves_of_a_square_of_the_content():
    tokens = token_set(0, content_wh=(40, 64))
    middle = tokens.leaf_xy + tokens.leaf_size[:, None] // 2
    seen = set()
    for seed in range(60):
        kept = leaves_in_part(tokens.leaf_xy, tokens.leaf_size, (40, 64), 32, np.random.default_rng(seed))
        corner = np.random.default_rng(seed).integers([40 - 32 + 1, 64 - 32 + 1])
        inside = ((middle >= corner) & (middle < corner + 32)).all(1)
        at = corner + 16 - tokens.leaf_xy
        assert np.array_equal(kept, inside | ((at >= 0) & (at < tokens.leaf_size[:, None])).all(1))
        assert kept.any() and not kept.all()
        seen.add(kept.tobytes())
    assert len(seen) > 5


def test_a_part_keeps_what_belongs_to_its_leaves():
    tokens = token_set(1)
    part = part_of(tokens, 0.5, np.random.default_rng(0))
    assert 0 < len(part) < len(tokens)
    rows = [int(np.flatnonzero((tokens.leaf_xy == xy).all(1))[0]) for xy in part.leaf_xy]
    assert rows == sorted(rows)
    for name in ("tokens", "leaf_size", "content_counts", "mask_counts"):
        assert np.array_equal(getattr(part, name), getattr(tokens, name)[rows])
    assert len(part_of(tokens, 1.0, np.random.default_rng(0))) == len(tokens)


def test_a_part_without_leaves_is_the_whole():
    """Files built with --fit drop have holes."""
    tokens = token_set(2)
    only = (tokens.leaf_xy == 0).all(1)
    hole = replace(
        tokens, tokens=tokens.tokens[only], leaf_xy=tokens.leaf_xy[only], leaf_size=tokens.leaf_size[only],
        content_counts=tokens.content_counts[only], mask_counts=tokens.mask_counts[only],
    )  # fmt: skip
    assert all(len(part_of(hole, 0.1, np.random.default_rng(seed))) == 1 for seed in range(20))


def test_batches_of_parts_are_short_and_depend_on_the_sample_alone(apf_files):
    words = overrides(apf_files, "unused")
    config = load("smoke", [*words, "data.part=0.5", "data.length=200"])
    files = TokenFiles(config.data)
    both = training_batch(config, files, [(0, 7), (1, 8)])
    alone = training_batch(config, files, [(1, 8)])
    assert both["tokens"].shape[1] == alone["tokens"].shape[1] == 64  # the next multiple
    for key in both:
        assert torch.equal(both[key][1:], alone[key])
    whole = training_batch(load("smoke", [*words, "data.length=200"]), files, [(0, 7), (1, 8)])
    assert whole["tokens"].shape[1] == 200
    assert both["valid"].sum() < whole["valid"].sum()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.part=0"], "data.part"),
        (["data.part=0.5", "model.decoder=raster"], "the model takes their sequence as a picture"),
        (["data.part=0.5", "data.kind=tiles", "data.patching=uniform"], "crops have crop_px"),
    ],
)
def test_parts_that_cannot_be(words, line):
    with pytest.raises(ConfigError, match=line):
        load("smoke", words)
