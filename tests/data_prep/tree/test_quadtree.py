"""Trees against a naive whole-image recursion and a naive heap."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.edges.canny import edge_map
from data_prep.system.powers_of_two import tree_depth
from data_prep.tree.box_sums import halve, sum_pyramid
from data_prep.tree.quadtree import Leaves, budget_tree, check_tiling, morton, pyramid, threshold_tree
from data_prep.tree.uniform import uniform_leaves
from tests.helpers.frames import counts_from_map
from tests.helpers.heap import heap_tree, naive_morton
from tests.helpers.repository import GLOMERULI

IMAGES = sorted((GLOMERULI / "images").iterdir())


def naive_threshold(edges, p_min, split_value, max_depth=None, x=0, y=0, size=None, depth=0):
    """Recursion of the paper over the pixels: [(x, y, size)] in the order NW, NE, SW, SE."""
    size = len(edges) if size is None else size
    count = int(edges[y : y + size, x : x + size].sum())
    if count <= split_value or size <= p_min or depth == max_depth:
        return [(x, y, size)]
    half = size // 2
    corners = [(x, y), (x + half, y), (x, y + half), (x + half, y + half)]
    return [n for a, b in corners for n in naive_threshold(edges, p_min, split_value, max_depth, a, b, half, depth + 1)]


def naive_budget(edges, p_min, length):
    return heap_tree(edges, len(edges), p_min, length, lambda square: int(square.sum()))


def _rows(leaves):
    return [(*xy, s) for xy, s in zip(leaves.xy.tolist(), leaves.size.tolist(), strict=True)]


@st.composite
def edge_maps(draw):
    p_min = 2 ** draw(st.integers(0, 3))
    size = p_min * 2 ** draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["blank", "full", "one pixel", "sparse", "dense", "clustered"]))
    edges = np.zeros((size, size), bool)
    if kind == "full":
        edges[:] = True
    elif kind == "one pixel":
        edges[rng.integers(size), rng.integers(size)] = True
    elif kind in ("sparse", "dense"):
        edges = rng.random((size, size)) < {"sparse": 0.02, "dense": 0.6}[kind]
    elif kind == "clustered":
        edges = cv2.GaussianBlur(rng.random((size, size)), (0, 0), size / 8) > 0.5
        edges &= rng.random((size, size)) < 0.5
    return edges, p_min


@settings(max_examples=150, deadline=None)
@given(edge_maps(), st.integers(4, 400))
def test_budget_tree_is_the_naive_heap(made, length):
    edges, p_min = made
    leaves = budget_tree(counts_from_map(edges, p_min), p_min, length)
    assert _rows(leaves) == naive_budget(edges, p_min, length)
    assert len(leaves) <= length and len(leaves) % 3 == 1
    assert leaves.xy.dtype == leaves.size.dtype == np.int32
    check_tiling(leaves, len(edges))


@settings(max_examples=150, deadline=None)
@given(edge_maps(), st.integers(0, 60), st.one_of(st.none(), st.integers(0, 6)))
def test_threshold_tree_is_the_naive_recursion(made, split_value, max_depth):
    edges, p_min = made
    leaves = threshold_tree(counts_from_map(edges, p_min), p_min, split_value, max_depth)
    assert _rows(leaves) == naive_threshold(edges, p_min, split_value, max_depth)
    assert len(leaves) % 3 == 1
    check_tiling(leaves, len(edges))


@pytest.mark.parametrize("path", IMAGES[::8], ids=lambda path: path.stem)
def test_real_images(path):
    edges = edge_map(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), 100, 200, 3)
    counts = counts_from_map(edges, 8)
    for length in (64, 1024, 2000):
        assert _rows(budget_tree(counts, 8, length)) == naive_budget(edges, 8, length)
    for split_value in (0, 20, 100):
        assert _rows(threshold_tree(counts, 8, split_value)) == naive_threshold(edges, 8, split_value)


def _covered_by(fine, coarse):
    """Whether every leaf of `fine` lies inside one leaf of `coarse`."""
    starts = morton(coarse.xy[:, 0], coarse.xy[:, 1])
    owner = np.searchsorted(starts, morton(fine.xy[:, 0], fine.xy[:, 1]), side="right") - 1
    inside = (fine.xy >= coarse.xy[owner]).all(1)
    inside &= (fine.xy + fine.size[:, None] <= coarse.xy[owner] + coarse.size[owner][:, None]).all(1)
    return bool(inside.all())


@settings(max_examples=60, deadline=None)
@given(edge_maps(), st.integers(4, 300), st.integers(0, 300))
def test_budget_trees_are_nested_in_length(made, length, more):
    edges, p_min = made
    counts = counts_from_map(edges, p_min)
    assert _covered_by(budget_tree(counts, p_min, length + more), budget_tree(counts, p_min, length))


@settings(max_examples=60, deadline=None)
@given(edge_maps(), st.integers(0, 60), st.integers(1, 60))
def test_smaller_split_value_refines(made, split_value, more):
    edges, p_min = made
    counts = counts_from_map(edges, p_min)
    fine, coarse = threshold_tree(counts, p_min, split_value), threshold_tree(counts, p_min, split_value + more)
    assert _covered_by(fine, coarse)
    assert len(fine) >= len(coarse)


@pytest.mark.parametrize("length", [676, 784, 1024, 2116, 4096, 8281, 8464, 10201, 10609, 16384])
def test_squares_of_the_paper_are_reached_exactly(length):
    counts = np.random.default_rng(length).integers(1, 5, (256, 256))
    assert len(budget_tree(counts, 2, length)) == length


@pytest.mark.parametrize("length", [576, 729, 900, 1521, 13689])
def test_other_squares_are_missed_by_two(length):
    assert len(budget_tree(np.ones((256, 256), np.int32), 2, length)) == length - 2


def test_budget_stops_where_no_edge_is_left():
    counts = np.zeros((64, 64), np.int32)
    assert _rows(budget_tree(counts, 4, 1000)) == [(0, 0, 256)]
    counts[63, 0] = 5
    leaves = budget_tree(counts, 4, 1000)
    assert len(leaves) == 1 + 3 * 6
    assert (0, 252, 4) in _rows(leaves)


def test_counts_beyond_32_bits():
    # A 65,536 px frame full of edges: every sum above the cells needs more than 31 bits.
    counts = np.full((4, 4), 2**28, np.int32)
    levels = pyramid(counts)
    assert int(levels[0][0, 0]) == 2**32 and int(levels[1][1, 1]) == 2**30
    assert len(threshold_tree(counts, 16384, 2**32 - 1)) == 4
    assert len(budget_tree(counts, 16384, 16)) == 16


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_morton_interleaves_with_x_lowest(x, y):
    assert int(morton(np.array([x]), np.array([y]))[0]) == naive_morton(x, y)


def test_order_is_x_first_and_y_downwards():
    assert _rows(uniform_leaves(8, 4)) == [(0, 0, 4), (4, 0, 4), (0, 4, 4), (4, 4, 4)]


@pytest.mark.parametrize(("size_px", "patch_px"), [(8, 8), (64, 4), (1024, 16)])
def test_uniform_tiles_the_frame(size_px, patch_px):
    leaves = uniform_leaves(size_px, patch_px)
    check_tiling(leaves, size_px)
    assert len(leaves) == (size_px // patch_px) ** 2
    full = np.ones((size_px // patch_px,) * 2, np.int32)
    assert _rows(leaves) == _rows(threshold_tree(full, patch_px, 0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: budget_tree(np.ones((4, 4)), 4, 3), "at least 4"),
        (lambda: budget_tree(np.ones((4, 4)), 3, 16), "power of two"),
        (lambda: budget_tree(np.ones((4, 8)), 4, 16), "square"),
        (lambda: budget_tree(np.ones((6, 6)), 4, 16), "power of two"),
        (lambda: threshold_tree(np.ones((4, 4)), 6, 10), "power of two"),
        (lambda: threshold_tree(np.ones((4, 4)), 4, -1), "at least 0"),
        (lambda: threshold_tree(np.ones((4, 4)), 4, 1, -1), "at least 0"),
        (lambda: uniform_leaves(96, 8), "power of two"),
        (lambda: uniform_leaves(64, 0), "power of two"),
        (lambda: tree_depth(1000, 8), "power of two"),
        (lambda: tree_depth(4, 8), "power of two"),
    ],
)
def test_bad_sizes_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def _changed(leaves, row, xy=None, size=None):
    corners, sizes = leaves.xy.copy(), leaves.size.copy()
    if xy is not None:
        corners[row] = xy
    if size is not None:
        sizes[row] = size
    return Leaves(corners, sizes)


def test_broken_tilings_are_refused():
    good = uniform_leaves(32, 8)
    check_tiling(good, 32)
    swapped = np.arange(16)
    swapped[[3, 4]] = 4, 3
    broken = [
        Leaves(good.xy[swapped], good.size[swapped]),
        Leaves(good.xy[:-1], good.size[:-1]),
        Leaves(good.xy[1:], good.size[1:]),
        Leaves(good.xy[[0, *range(16)]], good.size[[0, *range(16)]]),
        _changed(good, 5, size=4),
        _changed(good, 0, size=16),
        _changed(good, 2, xy=(4, 8)),
        _changed(good, 15, xy=(32, 24)),
        _changed(good, 0, xy=(-8, 0)),
        _changed(good, 0, size=0),
        _changed(good, 7, size=6),
        Leaves(good.xy[:0], good.size[:0]),
    ]
    for leaves in broken:
        with pytest.raises(ValueError):
            check_tiling(leaves, 32)
    with pytest.raises(ValueError, match="cover"):
        check_tiling(good, 64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 2**32 - 1), st.sampled_from([1, 16, 63, 64, 255, 16383, 16384, 2**30, 2**40]))
def test_sums_of_squares_are_exact_at_every_width(levels, seed, top):
    rng = np.random.default_rng(seed)
    side = 2**levels
    kind = np.uint8 if top <= 255 else np.uint16 if top <= 65535 else np.uint64
    values = rng.integers(0, top + 1, (3 * side, 2 * side)).astype(kind)
    values[:side, :side] = top
    for level, sums in enumerate(sum_pyramid(values, top, levels)):
        s = 2**level
        expected = values.astype(object if top > 2**30 else np.int64)
        expected = expected.reshape(3 * side // s, s, 2 * side // s, s).sum((1, 3)) if side <= 64 else None
        if expected is not None:
            assert np.array_equal(sums.astype(expected.dtype), expected)
        assert int(sums[0, 0]) == top * s * s
    assert halve(np.full((2, 2), top, kind), top)[0, 0] == 4 * top
