"""Splits by variance and entropy: the trees are those of a heap over the pixels, padding has no part in them."""

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.build.options import BuildOptions, OptionError
from data_prep.edges.canny import blurred, luma
from data_prep.inspect.look import look_at
from data_prep.token_files.token_file import read_meta, read_tokens
from data_prep.tree.quadtree import budget_tree_of, check_tiling
from data_prep.tree.split_scores import content_luma, content_pixels, entropy_levels, raised, variance_levels
from tests.helpers.builds import some_slides, token_bytes
from tests.helpers.heap import heap_tree
from tests.helpers.repository import GLOMERULI

IMAGE = GLOMERULI / "images" / "10063.jpg"
LEVELS = {"variance": variance_levels, "entropy": entropy_levels}


def variance_of(values) -> int:
    """Sum of squared deviations in exact fractions, rounded down."""
    x = [int(v) for v in np.ravel(values)]
    return math.floor(sum(v * v for v in x) - Fraction(sum(x) ** 2, len(x))) if x else 0


def entropy_of(values) -> int:
    """Bits under the node's own histogram of 32 bins, one pixel after the other."""
    counts = Counter(int(v) // 8 for v in np.ravel(values))
    return round(sum(c * math.log2(counts.total() / c) for c in counts.values()))


SCORES = {"variance": variance_of, "entropy": entropy_of}


@st.composite
def contents(draw):
    """Luma of a content, the frame's side and the smallest cell's."""
    p_min = 2 ** draw(st.integers(0, 3))
    size_px = p_min * 2 ** draw(st.integers(0, 4))
    height, width = draw(st.integers(1, size_px)), draw(st.integers(1, size_px))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["flat", "noise", "two", "smooth", "one pixel", "close"]))
    gray = np.full((height, width), draw(st.integers(0, 255)), np.uint8)
    if kind == "noise":
        gray = rng.integers(0, 256, gray.shape, np.uint8)
    elif kind == "two":
        gray = np.where(rng.random(gray.shape) < 0.3, 0, 255).astype(np.uint8)
    elif kind == "smooth":
        gray = (127 + 120 * np.sin(np.add.outer(np.arange(height), 2 * np.arange(width)) / size_px)).astype(np.uint8)
    elif kind == "one pixel":
        gray[rng.integers(height), rng.integers(width)] ^= 255
    elif kind == "close":
        gray = rng.integers(120, 123, gray.shape, np.uint8)
    return gray, size_px, p_min


@pytest.mark.parametrize("split_on", LEVELS)
@settings(max_examples=50, deadline=None)
@given(made=contents(), length=st.integers(4, 120))
def test_the_tree_is_that_of_a_heap(split_on, made, length):
    gray, size_px, p_min = made
    levels = LEVELS[split_on](gray, size_px, p_min)
    leaves = budget_tree_of(levels, p_min, length)
    found = [(*xy, side) for xy, side in zip(leaves.xy.tolist(), leaves.size.tolist(), strict=True)]
    assert found == heap_tree(gray, size_px, p_min, length, SCORES[split_on])
    assert len(leaves) <= length
    check_tiling(leaves, size_px)


@pytest.mark.parametrize("split_on", LEVELS)
@settings(max_examples=50, deadline=None)
@given(made=contents())
def test_every_score_is_that_of_the_pixels_and_no_child_exceeds_its_parent(split_on, made):
    gray, size_px, p_min = made
    levels = LEVELS[split_on](gray, size_px, p_min)
    for depth, level in enumerate(levels):
        side = size_px >> depth
        assert level.dtype == np.int64 and level.shape == (1 << depth, 1 << depth) and level.min() >= 0
        pixels = content_pixels(depth, size_px, gray.shape[::-1])
        for y, x in np.ndindex(level.shape):
            part = gray[y * side : (y + 1) * side, x * side : (x + 1) * side]
            assert pixels[y, x] == part.size
            assert level[y, x] == SCORES[split_on](part)
        if depth:
            assert (level <= levels[depth - 1].repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize("split_on", LEVELS)
def test_a_parent_is_never_below_its_child_where_rounding_could_do_that(split_on):
    """Nearly all of the spread lies in one child, of millions of pixels."""
    gray = np.full((4096, 4096), 200, np.uint8)
    gray[:2048, :2048][::1021, ::1021] = 3
    levels = LEVELS[split_on](gray, 4096, 512)
    for below, above in zip(levels[1:], levels, strict=False):
        assert (below <= above.repeat(2, 0).repeat(2, 1)).all()
    assert levels[0].dtype == np.int64 and levels[0][0, 0] > 0


def test_a_parent_below_its_child_is_raised():
    levels = [np.array([[4]]), np.array([[4, 3], [0, 9]]), np.zeros((4, 4), np.int64)]
    levels[2][0, 1], levels[2][3, 0] = 5, 2
    top, middle, bottom = raised([level.astype(np.int64) for level in levels])
    assert top.tolist() == [[9]] and middle.tolist() == [[5, 3], [2, 9]] and np.array_equal(bottom, levels[2])


def test_the_widest_spread_there_is_fits():
    gray = np.zeros((4096, 4096), np.uint8)
    gray[:, 1::2] = 255
    assert variance_levels(gray, 4096, 1024)[0][0, 0] == 2**24 * 255**2 // 4
    assert entropy_levels(gray, 4096, 1024)[0][0, 0] == 2**24


def test_padding_has_no_part():
    """A flat dark content in white padding has nothing to split, at its border neither."""
    read = lambda x, y, w, h: np.full((h, w, 3), 30, np.uint8)  # noqa: E731
    gray = content_luma(read, (100, 61), 5)
    assert gray.shape == (61, 100) and np.unique(gray).tolist() == [30]
    for levels in (variance_levels(gray, 128, 8), entropy_levels(gray, 128, 8)):
        assert not any(level.any() for level in levels)
        assert len(budget_tree_of(levels, 8, 64)) == 1


def test_the_luma_is_that_of_the_edges():
    rgb = np.random.default_rng(1).integers(0, 256, (1100, 700, 3), np.uint8)
    gray = content_luma(lambda x, y, w, h: rgb[y : y + h, x : x + w], (700, 1100), 7)
    np.testing.assert_array_equal(gray, blurred(luma(rgb), 7))


@pytest.mark.parametrize(
    ("gray", "size_px", "p_min", "why"),
    [
        (np.zeros((65, 3), np.uint8), 64, 8, "3 x 65 pixels is not in a frame of 64"),
        (np.zeros((0, 3), np.uint8), 64, 8, "not in a frame"),
        (np.zeros((3, 3), np.uint8), 96, 32, "power of two"),
    ],
)
def test_sizes_that_do_not_fit(gray, size_px, p_min, why):
    for levels in LEVELS.values():
        with pytest.raises(ValueError, match=why):
            levels(gray, size_px, p_min)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"split_value": 5, "length": None}, "only with --length"),
        ({"split_value": 5, "fit": "drop"}, "only with --length"),
        ({"patching": "uniform", "length": None}, "only with --patching apf"),
        ({"thresholds": (100, 200)}, "--thresholds are of edges"),
        ({"auto_percent": 80}, "--auto-quantile is of edges"),
        ({"resolution": 8192}, "at most 4096 pixels, got --resolution 8192"),
        ({"tile_px": 600}, "at most 512 pixels with --tile 600"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(more, why):
    with pytest.raises(OptionError, match=why) as caught:
        BuildOptions(**{"resolution": 1024, "patch": 16, "length": 64, "split_on": "entropy"} | more)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--split-on entropy: ")
    assert BuildOptions(8192, 16, length=64, split_on="variance", tile_px=8192).resolution == 8192


def test_the_default_leaves_no_trace():
    assert "split_on" not in BuildOptions(1024, 16, length=64).params(3, 1, 2)
    params = BuildOptions(1024, 16, length=64, split_on="variance").params(3, None, None)
    assert params["split_on"] == "variance" and params["thresholds"] is None and params["blur"] == 3


@pytest.mark.parametrize("split_on", LEVELS)
def test_a_build_passes_verify_and_goes_on(split_on, tmp_path: Path, capsys):
    slides, out = some_slides(tmp_path / "in", 2), tmp_path / "out"
    args = [
        "build",
        slides[0],
        "--masks",
        slides[1],
        "--out",
        out,
        "--resolution",
        "2048",
        "--patch",
        "16",
        "--length",
        "100",
        "--split-on",
        split_on,
    ]
    assert main([*map(str, args)]) == 0
    assert "2 done" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert "2 of 2 token files are good" in capsys.readouterr().out
    for path in sorted(slides[0].iterdir()):
        token_set, meta = read_tokens(out / f"{path.stem}.tokens.h5", check=True)
        assert meta["params"]["split_on"] == split_on and meta["params"]["blur"] == 7
        assert (meta["edge_pixels"], meta["params"]["lo"], meta["params"]["hi"]) == (None, None, None)
        gray = blurred(luma(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)), 7)
        leaves = budget_tree_of(LEVELS[split_on](gray, 2048, 16), 16, 100)
        np.testing.assert_array_equal(token_set.leaf_xy, leaves.xy)
        assert meta["budget_used"] == 1.0 and meta["ceiling"][0] > 0.5
    built = token_bytes(out)
    assert main([*map(str, args), "--jobs", "2"]) == 0
    assert "2 skipped" in capsys.readouterr().out and token_bytes(out) == built
    assert main([*map(str, args[:-2])]) == 0  # by edges, in the same folder
    assert f"rebuilt: parameter split_on {split_on} -> None" in capsys.readouterr().out
    assert "split_on" not in read_meta(next(out.glob("*.h5")))["params"]


def test_a_flat_slide_has_one_leaf_and_says_so(tmp_path: Path, capsys):
    cv2.imwrite(str(tmp_path / "flat.png"), np.full((256, 256, 3), 90, np.uint8))
    args = ["build", tmp_path / "flat.png", "--out", tmp_path / "out", "--resolution", "256", "--patch", "16"]
    assert main([*map(str, args), "--length", "64", "--split-on", "variance"]) == 0
    assert "only 1 of 64 leaves used: no variance is left to split at" in capsys.readouterr().out


@pytest.mark.parametrize("split_on", LEVELS)
def test_inspect_draws_what_is_split_on(split_on, tmp_path: Path, capsys):
    out = tmp_path / "look.png"
    args = ["inspect", IMAGE, "--resolution", 1024, "--patch", 16, "--length", 256, "--split-on", split_on]
    assert main([*map(str, args), "--out", str(out), "--dpi", "40"]) == 0
    assert f"L = 256, {split_on}, blur 3, 256 of 256" in capsys.readouterr().out
    assert cv2.imread(str(out)).std() > 10
    look = look_at(IMAGE, BuildOptions(1024, 16, length=256, split_on=split_on))
    assert look.edges.shape == (64, 64) and look.edges.max() == 1 and look.edges.min() >= 0
