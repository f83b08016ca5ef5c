"""Augmentation on token sets equals augmentation of the picture, and depends on nothing but its seed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.tokens.token_set import rebuild
from data_prep.tree.quadtree import Leaves, check_tiling
from launch.config.config import ConfigError
from launch.data.augment import DIHEDRAL, jitter, leaves_in_square, turn_leaves, turn_pixels, turn_tokens
from launch.data.batches import part_of, parts_of, take, training_batch
from launch.data.token_files import TokenFiles
from launch.experiments.load import load
from tests.helpers.frames import cut
from tests.helpers.small_runs import PATCH, SIZE, overrides, picture, token_set


@pytest.mark.parametrize("code", range(DIHEDRAL))
@pytest.mark.parametrize("patching", ["apf", "uniform"])
def test_turned_tokens_are_the_tokens_of_the_turned_picture(code, patching):
    tokens = token_set(1, patching)
    image, mask = (np.ascontiguousarray(turn_pixels(a, code, 0, 1)) for a in picture(1, (SIZE, SIZE)))
    per_token = {"tokens": tokens.tokens, "masks": tokens.mask_counts, "content": tokens.content_counts}
    xy, size, turned = turn_tokens(tokens.leaf_xy, tokens.leaf_size, per_token, SIZE, code)
    check_tiling(Leaves(xy, size), SIZE)
    again = cut(
        lambda x, y, w, h: image[y : y + h, x : x + w],
        Leaves(xy, size),
        PATCH,
        SIZE,
        (SIZE, SIZE),
        lambda x, y, w, h: mask[y : y + h, x : x + w],
    )
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


@pytest.mark.parametrize("seed", range(6))
def test_a_part_of_a_tree_is_the_leaves_of_a_square_of_the_content(seed):
    content = (40, 64)
    tokens = token_set(0, content_wh=content)
    corner = np.random.default_rng(seed).integers([40 - 32 + 1, 64 - 32 + 1])
    expected = []
    for i, ((x, y), size) in enumerate(zip(tokens.leaf_xy.tolist(), tokens.leaf_size.tolist(), strict=True)):
        mx, my = min(x + size // 2, 39), min(y + size // 2, 63)
        inside = corner[0] <= mx < corner[0] + 32 and corner[1] <= my < corner[1] + 32
        cx, cy = corner + 16
        if inside or (x <= cx < x + size and y <= cy < y + size):
            expected.append(i)
    kept = leaves_in_square(tokens.leaf_xy, tokens.leaf_size, content, corner, 32)
    assert np.flatnonzero(kept).tolist() == expected
    part = part_of(tokens, 0.5, np.random.default_rng(seed))
    assert 0 < len(part) < len(tokens)
    white = ~tokens.content_counts.any((1, 2))
    assert white.any()
    for name in ("tokens", "leaf_xy", "leaf_size", "content_counts", "mask_counts"):
        assert np.array_equal(getattr(part, name), getattr(tokens, name)[kept & ~white])


def test_a_part_without_leaves_is_the_whole():
    """Files built with --fit drop have holes."""
    tokens = token_set(2)
    hole = take(tokens, (tokens.leaf_xy == 0).all(1))
    assert len(hole) == 1
    assert all(len(part_of(hole, 0.1, np.random.default_rng(seed))) == 1 for seed in range(20))
    assert {len(rows) for rows, _ in parts_of(hole, 0.1, 0.25)} == {1}


def test_parts_outside_the_field_of_view_are_drawn_again():
    """Corners without content cost neither a step on the whole tree nor a prediction of it."""
    tokens = token_set(3, content_wh=(64, 64))
    far = tokens.leaf_xy.max(axis=1) + tokens.leaf_size >= 48
    some = replace(tokens, content_counts=tokens.content_counts * far[:, None, None].astype(np.uint32))
    assert 0 < far.sum() < len(tokens)
    first = [part_of(tokens, 0.2, np.random.default_rng(seed)).leaf_xy.tolist() for seed in range(80)]
    drawn = [part_of(some, 0.2, np.random.default_rng(seed)) for seed in range(80)]
    assert all(part.content_counts.any((1, 2)).all() and len(part) < far.sum() for part in drawn)
    inside = [set(map(tuple, xy)) <= set(map(tuple, tokens.leaf_xy[far].tolist())) for xy in first]
    assert 0 < sum(inside) < 80  # the others were drawn again
    assert all(xy == part.leaf_xy.tolist() for xy, part, same in zip(first, drawn, inside, strict=True) if same)
    parts = parts_of(some, 0.2, 0.25)
    assert len(parts) == len(parts_of(tokens, 0.2, 0.25))
    assert all(far[rows].all() and len(rows) < far.sum() for rows, _ in parts)
    assert set(np.concatenate([rows for rows, _ in parts]).tolist()) == set(np.flatnonzero(far).tolist())


@pytest.mark.parametrize("seed", range(4))
def test_parts_around_foreground(seed):
    """Every foreground cell is as likely; the part is the square around it, moved into the content at its border."""
    tokens = token_set(seed, content_wh=(64, 48))
    assert tokens.mask_counts is not None
    masks = np.zeros_like(tokens.mask_counts)
    for leaf in (0, len(tokens) // 2):  # two cells of two leaves
        masks[leaf, 1, 2, 0] = 1
    few = replace(tokens, mask_counts=masks)
    side = masks.shape[1]
    squares = []
    for leaf in (0, len(tokens) // 2):
        centre = few.leaf_xy[leaf] + (np.array([2, 1]) * 2 + 1) * few.leaf_size[leaf] // (2 * side)
        corner = np.clip(centre - 8, 0, np.array([64, 48]) - 16)
        kept = leaves_in_square(few.leaf_xy, few.leaf_size, few.content_wh, corner, 16)
        kept &= few.content_counts.any((1, 2))
        squares.append(few.leaf_xy[kept].tolist())
    drawn = [part_of(few, 0.25, np.random.default_rng(n), foreground=1.0).leaf_xy.tolist() for n in range(60)]
    assert all(part in squares for part in drawn)
    assert all(15 <= drawn.count(square) <= 45 for square in squares)
    mixed = [part_of(few, 0.25, np.random.default_rng(n), foreground=0.5).leaf_xy.tolist() for n in range(60)]
    assert 10 <= sum(part not in squares for part in mixed) <= 50
    none = replace(few, mask_counts=np.zeros_like(masks))
    for n in range(10):  # as without
        part = part_of(none, 0.25, np.random.default_rng(n), foreground=1.0)
        assert np.array_equal(part.leaf_xy, part_of(few, 0.25, np.random.default_rng(n)).leaf_xy)


@pytest.mark.parametrize("content_wh", [(64, 64), (40, 64), (30, 20)])
@pytest.mark.parametrize(("share", "overlap"), [(0.5, 0.25), (0.3, 0.0), (1.0, 0.25)])
def test_parts_together_hold_every_leaf_with_content(content_wh, share, overlap):
    number = set()
    for seed in range(4):
        tokens = token_set(seed, content_wh=content_wh)
        parts = parts_of(tokens, share, overlap)
        number.add(len(parts))
        assert all(len(rows) and (weight > 0).all() and len(weight) == len(rows) for rows, weight in parts)
        found = np.unique(np.concatenate([rows for rows, _ in parts]))
        assert set(np.flatnonzero(tokens.content_counts.any((1, 2)))) <= set(found.tolist())
    assert number == {(1 + math.ceil((1 - share) / (share * (1 - overlap)))) ** 2}  # whatever the slide


def test_batches_of_parts_are_short_and_depend_on_the_sample_alone(apf_files):
    words = [*overrides(apf_files, "unused"), "model.position=geom"]
    config = load("smoke", [*words, "data.part=0.5", "data.length=200"])
    files = TokenFiles(config.data)
    both = training_batch(config, files, [(0, 7), (1, 8)])
    alone = training_batch(config, files, [(1, 8)])
    rows = alone["tokens"].shape[1]
    for batch in (both, alone):  # the next multiple of 32
        assert batch["tokens"].shape[1] == 32 * math.ceil(batch["valid"].sum(1).max() / 32) < 200
    for key in both:
        assert torch.equal(both[key][1:, :rows], alone[key]) and not both[key][1:, rows:].any()
    whole = training_batch(load("smoke", [*words, "data.length=200"]), files, [(0, 7), (1, 8)])
    assert whole["tokens"].shape[1] == 200
    assert both["valid"].sum() < whole["valid"].sum()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.part=0"], "data.part"),
        (["data.part=0.5", "model.decoder=raster"], "the model takes their sequence as a picture"),
        (["data.part=0.5"], "set model.position=geom or none"),
        (["data.part=0.01", "model.position=geom"], "is less than patch="),
        (["eval.part=0.5"], "eval.part needs data.part below 1"),
        (["data.part=0.5", "model.position=geom", "eval.part=1"], "eval.part"),
        (["data.part=0.5", "model.position=geom", "eval.part=0.01"], "eval.part=0.01 of resolution"),
        (["data.window_px=64"], "is for segmentation with kind=tiles"),
        (["data.part=0.5", "data.kind=tiles", "data.patching=uniform"], "crops have crop_px"),
    ],
)
def test_parts_that_cannot_be(words, line):
    with pytest.raises(ConfigError, match=line):
        load("smoke", words)
