"""Frames of 8192 x 8192 from real texture: regions against OpenCV on the whole frame. Minutes, so run with -m slow."""

import cv2
import numpy as np
import pytest

from data_prep.edges.canny import auto_thresholds, blur_for, edge_map, luma
from data_prep.edges.scan import RegionSpec
from data_prep.tokens.token_set import rebuild
from data_prep.tree.quadtree import budget_tree
from tests.helpers.frames import counts_from_map, cut, edges_of_regions
from tests.helpers.repository import GLOMERULI

SIZE_PX = 8192


@pytest.fixture(scope="module")
def mosaic() -> np.ndarray:
    """Kidney fields side by side, turned at random, on two thirds of the frame; white elsewhere."""
    rng = np.random.default_rng(0)
    fields = [cv2.imread(str(path))[..., ::-1] for path in sorted((GLOMERULI / "images").iterdir())]
    frame = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    for y in range(0, SIZE_PX, 1024):
        for x in range(0, SIZE_PX, 1024):
            if rng.random() < 0.67:
                frame[y : y + 1024, x : x + 1024] = np.rot90(fields[rng.integers(24)], rng.integers(4))
    return frame


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", [(100, 200), "auto"])
@pytest.mark.parametrize("side_px", [512, 8192])
def test_edges_of_a_large_frame_equal_opencv(mosaic, thresholds, side_px):
    blur = blur_for(SIZE_PX)
    read = lambda x, y, w, h: mosaic[y : y + h, x : x + w]  # noqa: E731
    spec = RegionSpec(SIZE_PX, (SIZE_PX, SIZE_PX), 8, blur, thresholds, side_px)
    counts, (lo, hi), _ = edges_of_regions(read, None, spec)
    if thresholds == "auto":
        blurred = cv2.GaussianBlur(luma(mosaic), (blur, blur), 0)
        size = sum(np.abs(cv2.Sobel(blurred, cv2.CV_16S, *d, ksize=3).astype(np.int32)) for d in ((1, 0), (0, 1)))
        histogram = np.bincount(size.ravel())
        histogram[0] = 0
        assert (lo, hi) == auto_thresholds(histogram)
    whole = edge_map(mosaic, lo, hi, blur)
    assert counts.sum() == whole.sum() > 1_000_000
    np.testing.assert_array_equal(counts, counts_from_map(whole, 8))


@pytest.mark.slow
def test_tokens_of_a_large_frame(mosaic):
    whole = edge_map(mosaic, 100, 200, blur_for(SIZE_PX))
    leaves = budget_tree(counts_from_map(whole, 8), 8, 16_384)
    made = [
        cut(lambda x, y, w, h: mosaic[y : y + h, x : x + w], leaves, 8, SIZE_PX, (SIZE_PX, SIZE_PX), side_px=side)
        for side in (512, None)
    ]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
    painted = rebuild(made[0].tokens, leaves.xy, leaves.size, SIZE_PX)
    fine = np.zeros((SIZE_PX, SIZE_PX), bool)  # leaves with one cell per pixel
    for (x, y), side in zip(leaves.xy, leaves.size, strict=True):
        fine[y : y + side, x : x + side] = side == 8
    np.testing.assert_array_equal(painted[fine], mosaic[fine])
