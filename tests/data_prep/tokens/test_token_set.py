"""Tokens against whole-image arithmetic: token i holds leaf i, masks and Dice are exact, for any tile size."""

import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.edges.canny import edge_map
from data_prep.tokens import cut as cut_module
from data_prep.tokens.ceiling import boundary_leaves, ceiling, dice, pixel_dice_from_cells
from data_prep.tokens.paper_sequences import drop_or_repeat, pack_strip
from data_prep.tokens.token_set import TokenSet, rebuild
from data_prep.tree.quadtree import Leaves, budget_tree, check_tiling
from data_prep.tree.uniform import uniform_leaves
from tests.helpers.frames import counts_from_map, cut
from tests.helpers.repository import GLOMERULI


def _reader(picture):
    def read(x, y, w, h):
        assert 0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= picture.shape[1] and y + h <= picture.shape[0]
        return picture[y : y + h, x : x + w]

    return read


def _same(a, b):
    for field in dataclasses.fields(TokenSet):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@st.composite
def frames(draw):
    """(rgb, mask, leaves, p, size_px, content_wh, classes) with leaves from p up to the whole frame."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = 2 ** draw(st.integers(0, 3))
    size_px = p * 2 ** draw(st.integers(0, 5))
    counts = rng.integers(0, 5, (size_px // p,) * 2) * (rng.random((size_px // p,) * 2) < draw(st.floats(0, 0.4)))
    leaves = budget_tree(counts, p, draw(st.integers(4, 200)))
    content_wh = draw(st.integers(1, size_px)), draw(st.integers(1, size_px))
    top = draw(st.sampled_from([1, 3, 255]))  # small values give many means that end in .5
    rgb = rng.integers(0, top + 1, (size_px, size_px, 3)).astype(np.uint8)
    rgb[content_wh[1] :] = 255
    rgb[:, content_wh[0] :] = 255
    classes = draw(st.integers(1, 3))
    mask = rng.integers(0, classes + 1, (size_px, size_px)).astype(np.uint8)
    if draw(st.booleans()):
        mask[rng.random((size_px, size_px)) < 0.9] = 0
    return rgb, mask, leaves, p, size_px, content_wh, classes


def _cells(picture, x, y, size, p):
    """Sums over the p x p cells of one leaf."""
    cell = size // p
    part = picture[y : y + size, x : x + size].astype(np.int64)
    return part.reshape(p, cell, p, cell, *picture.shape[2:]).sum((1, 3))


@settings(max_examples=150, deadline=None)
@given(frames(), st.sampled_from([None, 1, 2, 8, 16, 64, 2048]))
def test_cut_is_the_naive_box_mean_for_any_region(frame, side_px):
    rgb, mask, leaves, p, size_px, content_wh, classes = frame
    content = np.zeros((size_px, size_px), bool)
    content[: content_wh[1], : content_wh[0]] = True
    side_px = side_px and min(size_px, max(side_px, p, size_px // 16))
    made = cut(_reader(rgb), leaves, p, size_px, content_wh, _reader(mask), classes, side_px)
    assert len(made) == len(leaves) and (made.size_px, made.content_wh) == (size_px, content_wh)
    types = made.tokens.dtype, made.content_counts.dtype, made.mask_counts.dtype
    assert types == (np.uint8, np.uint32, np.uint32)
    inside = np.stack([(mask == k + 1) & content for k in range(classes)], -1)
    for i, (xy, size) in enumerate(zip(leaves.xy.tolist(), leaves.size.tolist(), strict=True)):
        area = (size // p) ** 2
        mean = (2 * _cells(rgb, *xy, size, p) + area) // (2 * area)  # round half up
        np.testing.assert_array_equal(made.tokens[i], mean)
        np.testing.assert_array_equal(made.content_counts[i], _cells(content, *xy, size, p))
        np.testing.assert_array_equal(made.mask_counts[i], _cells(inside, *xy, size, p))


def test_real_image_does_not_depend_on_the_regions():
    image = cv2.cvtColor(cv2.imread(str(min((GLOMERULI / "images").iterdir()))), cv2.COLOR_BGR2RGB)
    mask = cv2.imread(str(min((GLOMERULI / "masks").iterdir())), cv2.IMREAD_UNCHANGED)
    leaves = budget_tree(counts_from_map(edge_map(image, 100, 200, 3), 4), 4, 1024)
    whole = cut(_reader(image), leaves, 4, 1024, (1024, 1024), _reader(mask))
    for side_px in (64, 256, 1024):
        _same(whole, cut(_reader(image), leaves, 4, 1024, (1024, 1024), _reader(mask), 1, side_px))
    assert whole.mask_counts.sum() == mask.sum() > 0
    assert ceiling(whole.mask_counts, whole.content_counts)[0] > 0.97


@pytest.mark.parametrize("side_px", [8, 64, 256, None])
def test_token_i_holds_leaf_i(side_px):
    rng = np.random.default_rng(5)
    leaves = budget_tree(rng.integers(0, 9, (64, 64)) * (rng.random((64, 64)) < 0.05), 4, 250)
    number = np.arange(len(leaves), dtype=np.uint8)
    painted = rebuild(np.tile(number[:, None, None, None], (1, 4, 4, 3)), leaves.xy, leaves.size, 256)
    assert len(np.unique(leaves.size)) > 2
    tokens = cut(_reader(painted), leaves, 4, 256, (256, 256), side_px=side_px).tokens
    np.testing.assert_array_equal(tokens, np.broadcast_to(number[:, None, None, None], tokens.shape))


@settings(max_examples=60, deadline=None)
@given(frames(), st.integers(0, 2**32 - 1))
def test_rebuild_is_the_inverse_of_cut(frame, seed):
    _, _, leaves, p, size_px, _, _ = frame
    values = np.random.default_rng(seed).integers(0, 256, (len(leaves), p, p, 3)).astype(np.uint8)
    painted = rebuild(values, leaves.xy, leaves.size, size_px)
    assert painted.shape == (size_px, size_px, 3)
    again = cut(_reader(painted), leaves, p, size_px, (size_px, size_px))
    np.testing.assert_array_equal(again.tokens, values)
    plain = rebuild(values[..., 0].astype(np.float32), leaves.xy, leaves.size, size_px)
    np.testing.assert_array_equal(plain, painted[..., 0].astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(frames(), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_dice_from_cells_is_dice_of_the_painted_mask(frame, share, seed):
    rgb, mask, leaves, p, size_px, content_wh, classes = frame
    made = cut(_reader(rgb), leaves, p, size_px, content_wh, _reader(mask), classes)
    pred = np.random.default_rng(seed).random(made.mask_counts.shape) < share
    painted = rebuild(pred, leaves.xy, leaves.size, size_px)[: content_wh[1], : content_wh[0]]
    truth = mask[: content_wh[1], : content_wh[0], None] == np.arange(1, classes + 1)
    inter, size, total = pixel_dice_from_cells(pred, made.mask_counts, made.content_counts)
    np.testing.assert_array_equal(inter, (painted & truth).sum((0, 1)))
    np.testing.assert_array_equal(size, painted.sum((0, 1)))
    np.testing.assert_array_equal(total, truth.sum((0, 1)))
    best = ceiling(made.mask_counts, made.content_counts)
    majority = 2 * made.mask_counts.astype(int) > made.content_counts[..., None]
    shown = rebuild(majority, leaves.xy, leaves.size, size_px)[: content_wh[1], : content_wh[0]]
    for k in range(classes):
        both = 2 * int((shown[..., k] & truth[..., k]).sum())
        sizes = int(shown[..., k].sum() + truth[..., k].sum())
        assert best[k] >= (both / sizes if sizes else 1.0), "the majority of each cell cannot pass the ceiling"


@settings(max_examples=100, deadline=None)
@given(frames())
def test_a_boundary_runs_through_leaves_that_hold_several_classes(frame):
    rgb, mask, leaves, p, size_px, content_wh, classes = frame
    made = cut(_reader(rgb), leaves, p, size_px, content_wh, _reader(mask), classes)
    seen = mask[: content_wh[1], : content_wh[0]]
    held = [np.unique(seen[y : y + s, x : x + s]) for (x, y), s in zip(leaves.xy, leaves.size, strict=True)]
    found = boundary_leaves(made.mask_counts, made.content_counts)
    np.testing.assert_array_equal(found, [len(ids) > 1 for ids in held])


def test_dice_of_nothing_and_of_everything():
    empty, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    assert dice(empty, empty, empty)[0] == 1.0
    assert dice(empty, one, empty)[0] == dice(empty, empty, one)[0] == 0.0
    assert dice(one, one, one)[0] == 1.0


def test_ceiling_is_one_where_cells_are_pixels_and_falls_for_coarse_leaves():
    rng = np.random.default_rng(0)
    mask = (rng.random((64, 64)) < 0.3).astype(np.uint8)
    rgb = np.zeros((64, 64, 3), np.uint8)
    fine = cut(_reader(rgb), uniform_leaves(64, 8), 8, 64, (64, 64), _reader(mask))
    coarse = cut(_reader(rgb), uniform_leaves(64, 32), 8, 64, (64, 64), _reader(mask))
    assert ceiling(fine.mask_counts, fine.content_counts) == [1.0]
    assert ceiling(coarse.mask_counts, coarse.content_counts)[0] < 0.7


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_ceiling_is_the_best_of_all_predictions(n, seed):
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 9, (n, 1, 1)).astype(np.uint32)
    mask = (rng.random((n, 1, 1, 2)) ** 2 * (content[..., None] + 1)).astype(np.uint32)
    every = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    found = ceiling(mask, content)
    for k in range(2):
        inter, size = every @ mask[:, 0, 0, k].astype(int), every @ content[:, 0, 0].astype(int)
        total = size + int(mask[..., k].sum())
        assert found[k] == pytest.approx(np.where(total > 0, 2 * inter / np.maximum(total, 1), 1.0).max(), abs=1e-12)


def test_dice_counts_beyond_32_bits():
    full = np.full((5, 1, 1, 1), 2**31, np.uint32)
    inter, size, truth = pixel_dice_from_cells(np.ones((5, 1, 1, 1), bool), full, full[..., 0])
    assert int(inter[0]) == int(size[0]) == int(truth[0]) == 5 * 2**31


def test_each_square_is_read_once_and_padding_never(monkeypatch):
    rgb, asked = np.zeros((256, 256, 3), np.uint8), []

    def read(x, y, w, h):
        asked.append((x, y, w, h))
        return rgb[y : y + h, x : x + w]

    monkeypatch.setattr(cut_module, "_ALL_PX", 64)
    made = cut(read, uniform_leaves(256, 16), 8, 256, (130, 64))
    assert sorted(asked) == [(0, 0, 64, 64), (64, 0, 64, 64), (128, 0, 2, 64)]
    outside = made.content_counts.sum((1, 2)) == 0
    assert outside.any() and made.mask_counts is None


def test_padding_is_white_even_if_one_leaf_covers_many_regions():
    rgb = np.zeros((64, 64, 3), np.uint8)
    rgb[:, 32:] = 255
    one = Leaves(np.zeros((1, 2), np.int32), np.array([64], np.int32))
    for side_px in (4, 16, 64, None):
        assert cut(_reader(rgb), one, 1, 64, (32, 64), side_px=side_px).tokens.ravel().tolist() == [128] * 3
        halves = cut(_reader(rgb), one, 2, 64, (32, 64), side_px=side_px).tokens[0, 0, :, 0]
        assert halves.tolist() == [0, 255]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 3}, "power of two"),
        ({"p": 16}, "smaller than the patch"),
        ({"size_px": 64}, "cover"),
        ({"classes": 1}, "class 2"),
    ],
)
def test_bad_settings_are_one_clear_line(change, message):
    mask = np.full((32, 32), 2, np.uint8)
    given_ = {"leaves": uniform_leaves(32, 8), "p": 8, "size_px": 32, "content_wh": (32, 32), "classes": 2}
    with pytest.raises(ValueError, match=message) as error:
        cut(_reader(np.zeros((32, 32, 3), np.uint8)), read_mask=_reader(mask), **(given_ | change))
    assert "\n" not in str(error.value)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        pixel_dice_from_cells(np.ones((2, 4, 4, 1), bool), np.ones((2, 4, 4, 2)), np.ones((2, 4, 4)))


def _token_set(n):
    rng = np.random.default_rng(n)
    counts = rng.integers(1, 9, (n, 4, 4)).astype(np.uint32)
    return TokenSet(
        rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8),
        np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32),
        np.ones(n, np.int32),
        counts,
        counts[..., None] // 2,
        64,
        (64, 64),
    )


def test_drop_keeps_whole_rows_and_is_seeded():
    full = _token_set(50)
    less = drop_or_repeat(full, 20, seed=3)
    rows = less.leaf_xy[:, 0]
    assert len(set(rows.tolist())) == 20
    for field in ("tokens", "leaf_size", "content_counts", "mask_counts"):
        np.testing.assert_array_equal(getattr(less, field), getattr(full, field)[rows])
    _same(less, drop_or_repeat(full, 20, seed=3))
    assert rows.tolist() != drop_or_repeat(full, 20, seed=4).leaf_xy[:, 0].tolist()
    assert drop_or_repeat(full, 50, seed=3) is full


def test_repeat_appends_duplicates_that_count_nothing():
    full = _token_set(10)
    more = drop_or_repeat(full, 25, seed=3)
    assert len(more) == 25
    np.testing.assert_array_equal(more.tokens[:10], full.tokens)
    np.testing.assert_array_equal(more.tokens[10:], full.tokens[more.leaf_xy[10:, 0]])
    assert more.content_counts[10:].sum() == 0 and more.mask_counts[10:].sum() == 0
    np.testing.assert_array_equal(more.mask_counts[:10], full.mask_counts)
    assert full.content_counts.min() > 0
    with pytest.raises(ValueError, match="at least 1"):
        drop_or_repeat(full, 0, seed=3)


@pytest.mark.parametrize(("p", "n"), [(8, 576), (4, 64), (2, 4)])
def test_strip_packing_mixes_one_row_of_p_leaves(p, n):
    leaf_row = np.broadcast_to(np.arange(n)[:, None, None, None] * p + np.arange(p)[:, None, None], (n, p, p, 1))
    mixed = pack_strip(leaf_row)
    assert mixed.shape == leaf_row.shape
    assert sorted(mixed.ravel().tolist()) == sorted(leaf_row.ravel().tolist())
    for token in mixed[..., 0]:
        assert len(np.unique(token // p)) == p
        assert (token == token[:, :1]).all()
    # facts of the authors' code: token 0 holds rows of leaves 0, n / p, 2 n / p, ...
    assert (mixed[0, :, 0, 0] // p).tolist() == list(range(0, n, n // p))


def test_leaves_of_a_cut_still_tile():
    made = cut(_reader(np.zeros((64, 64, 3), np.uint8)), uniform_leaves(64, 16), 4, 64, (64, 64))
    check_tiling(Leaves(made.leaf_xy, made.leaf_size), 64)
