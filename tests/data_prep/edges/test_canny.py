"""Edges of a frame in regions against OpenCV on the whole frame, bit for bit."""

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.edges import scan
from data_prep.edges.canny import MAX_MAGNITUDE, ROOM, auto_thresholds, blur_for, blurred, edge_map, gaussian, luma
from data_prep.edges.hysteresis import final_counts, join_blocks, light
from data_prep.edges.kernels.pixels import maxima
from data_prep.edges.scan import RegionSpec
from tests.helpers.frames import edges_of_regions, gradient, is_maximum, resolve_block
from tests.helpers.repository import GLOMERULI

IMAGES = sorted((GLOMERULI / "images").iterdir())
FIXED = [(100, 200), (0, 0), (0, 40), (20, 300), (60, 61), (5, 1500)]
PAPER = (100, 200)


@pytest.fixture(scope="module")
def tissue():
    return cv2.cvtColor(cv2.imread(str(IMAGES[0])), cv2.COLOR_BGR2RGB)


def _white_outside(rgb, content_wh):
    rgb = rgb.copy()
    rgb[content_wh[1] :] = 255
    rgb[:, content_wh[0] :] = 255
    return rgb


def _whole_thresholds(rgb, content_wh, blur):
    """`auto` by sorting the magnitudes of the whole picture."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    gray = gray if blur == 1 else cv2.GaussianBlur(gray, (blur, blur), 0)
    dx, dy = (cv2.Sobel(gray, cv2.CV_16S, 1 - i, i, ksize=3, borderType=cv2.BORDER_REPLICATE) for i in (0, 1))
    magnitude = np.abs(dx.astype(int)) + np.abs(dy.astype(int))
    found = np.sort(magnitude[: content_wh[1], : content_wh[0]], axis=None)
    found = found[found > 0]
    hi = max(8, int(found[-(-9 * len(found) // 10) - 1])) if len(found) else 8
    return hi // 2, hi


def _check(rgb, content_wh, p_min, blur, thresholds, side_px):
    """Run both ways and compare; returns the number of edge pixels."""
    size_px = rgb.shape[0]
    rgb = _white_outside(rgb, content_wh)

    def read(x, y, w, h):
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= content_wh[0] and y + h <= content_wh[1]
        return rgb[y : y + h, x : x + w]

    for patch in {p_min, 1}:  # cells of one pixel are the edge map itself
        spec = RegionSpec(size_px, content_wh, patch, blur, thresholds, max(side_px, patch))
        counts, (lo, hi), _ = edges_of_regions(read, None, spec)
        assert (lo, hi) == (_whole_thresholds(rgb, content_wh, blur) if thresholds == "auto" else thresholds)
        gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        gray = gray if blur == 1 else cv2.GaussianBlur(gray, (blur, blur), 0)
        whole = cv2.Canny(gray, lo, hi) != 0
        g = size_px // patch
        np.testing.assert_array_equal(counts, whole.reshape(g, patch, g, patch).sum((1, 3)))
    return whole.sum()


@pytest.fixture(params=[32, 1024])
def block_px(request, monkeypatch):
    """Few blocks in a region, and many."""
    monkeypatch.setattr(scan, "BLOCK_PX", request.param)


@pytest.mark.parametrize("thresholds", [PAPER, "auto", (20, 300)])
@pytest.mark.parametrize(("blur", "side_px"), [(1, 1024), (3, 512), (5, 256), (7, 1024), (9, 128)])
def test_real_images_equal_opencv(tissue, thresholds, blur, side_px):
    assert _check(tissue, (1024, 1024), 4, blur, thresholds, side_px) > 1000


@pytest.mark.parametrize("path", IMAGES[1:24:5], ids=lambda path: path.stem)
def test_more_real_images_with_padding(path):
    rgb = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert _check(rgb, (1024, 777), 8, 3, "auto", 256) > 1000


@st.composite
def pictures(draw):
    size_px = 2 ** draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["blank", "noise", "checks", "dot", "faint noise", "lines", "tissue"]))
    shape = (size_px, size_px, 3)
    if kind == "blank":
        rgb = np.full(shape, draw(st.integers(0, 255)), np.uint8)
    elif kind == "noise":
        rgb = rng.integers(0, 256, shape, np.uint8)
    elif kind == "faint noise":
        rgb = rng.integers(100, 100 + draw(st.integers(1, 60)), shape, np.uint8)
    elif kind == "checks":
        step = draw(st.integers(1, 8))
        board = (np.indices(shape[:2]) // step).sum(0) % 2
        rgb = np.repeat((board * draw(st.integers(1, 255))).astype(np.uint8)[..., None], 3, 2)
    elif kind == "dot":
        rgb = np.full(shape, 230, np.uint8)
        rgb[rng.integers(size_px), rng.integers(size_px)] = draw(st.integers(0, 255))
    elif kind == "lines":
        rgb = np.full(shape, 200, np.uint8)
        for _ in range(draw(st.integers(1, 6))):
            ends = rng.integers(0, size_px, 4).tolist()
            cv2.line(rgb, ends[:2], ends[2:], [int(rng.integers(0, 256))] * 3, 1)
    else:
        whole = cv2.imread(str(IMAGES[3]))
        x, y = rng.integers(0, 1025 - size_px, 2)
        rgb = np.ascontiguousarray(whole[y : y + size_px, x : x + size_px, ::-1])
    content_wh = draw(st.integers(1, size_px)), draw(st.integers(1, size_px))
    if draw(st.booleans()):
        content_wh = size_px, size_px
    p_min = 2 ** draw(st.integers(0, min(4, size_px.bit_length() - 1)))
    return rgb, content_wh, p_min, size_px >> draw(st.integers(0, min(4, size_px.bit_length() - 1)))


@settings(max_examples=250, deadline=None)
@given(pictures(), st.sampled_from([1, 3, 5, 7, 9]), st.sampled_from([*FIXED, "auto"]), st.sampled_from([16, 32, 1024]))
def test_made_pictures_equal_opencv(picture, blur, thresholds, block_px):
    rgb, content_wh, p_min, side_px = picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BLOCK_PX", block_px)
        _check(rgb, content_wh, p_min, blur, thresholds, side_px)


@pytest.mark.parametrize("side_px", [32, 64, 256, 512])
@pytest.mark.parametrize("blur", [1, 3, 9])
@pytest.mark.parametrize("turned", [False, True])
def test_weak_lines_are_lit_from_their_far_ends(block_px, side_px, blur, turned):
    thresholds = (30, 250)
    rgb = np.full((512, 512, 3), 200, np.uint8)
    rgb[100:300] = 180
    faint = rgb.transpose(1, 0, 2) if turned else rgb
    assert _check(faint, (512, 512), 4, blur, thresholds, side_px) == 0
    rgb[100:300] = np.interp(np.arange(512), [0, 400, 511], [180, 180, 0]).astype(np.uint8)[:, None]
    darker = rgb.transpose(1, 0, 2) if turned else rgb
    assert _check(darker, (512, 512), 4, blur, thresholds, side_px) == 2 * 512


def _resolve(weak, strong, xs, ys):
    """Blocks between the given grid lines, with cells of one pixel."""
    return [
        resolve_block(weak[b:d, a:c].copy(), strong[b:d, a:c].copy(), a, b, 1)
        for b, d in itertools.pairwise(ys)
        for a, c in itertools.pairwise(xs)
    ]


def _merged(blocks, size_px):
    """The edge map of all blocks, both ways: joined to one block, and each lit on its own."""
    whole = join_blocks(blocks, (0, 0, size_px, size_px), 1)
    found = final_counts(whole, light([whole], size_px)[0])
    apart = np.zeros_like(found)
    for block, lit in zip(blocks, light(blocks, size_px), strict=True):
        apart[block.y_px : block.y_px + block.h_px, block.x_px : block.x_px + block.w_px] = final_counts(block, lit)
    np.testing.assert_array_equal(found, apart)
    return found


def test_maxima_of_every_direction():
    # All pairs of derivatives, each between neighbours that only some directions look at.
    across, down = (v.astype(np.int16) for v in np.meshgrid(np.arange(-1020, 1021), np.arange(0, 1021)))
    flag = np.zeros(3 * 2041, np.uint8)
    for place in ((1, 0), (1, 2), (0, 1), (2, 1), (0, 0), (2, 2), (0, 2), (2, 0)):
        for rows in np.array_split(np.arange(len(down)), 8):
            dx, dy = (np.zeros((3 * len(rows), 3 * 2041), np.int16) for _ in range(2))
            dx[1::3, 1::3], dy[1::3, 1::3] = across[rows], down[rows]
            dx[place[0] :: 3, place[1] :: 3] = 2000
            expected = cv2.Canny(dx, dy, 0, 0) != 0
            magnitude = np.pad(np.abs(dx) + np.abs(dy), ((0, 0), (1, 1)))
            for y in range(1, len(dx), 3):
                is_maximum(magnitude[y - 1 : y + 2].ravel(), dx[y], dy[y], 0, flag)
                np.testing.assert_array_equal(flag[1::3], expected[y, 1::3])


@pytest.mark.parametrize("blur", [1, 3, 5, 7, 9, 11, 13, 15, 21, 31])
@pytest.mark.parametrize("kind", ["noise", "black and white", "bright"])
def test_blur_and_canny_in_one_are_opencv_bit_for_bit(blur, kind):
    rng = np.random.default_rng(blur)
    top = {"noise": 256, "black and white": 2, "bright": 3}[kind]
    gray = rng.integers(0, top, (150, 131)).astype(np.uint8) * (255 if top == 2 else 1) + (253 if top == 3 else 0)
    h, w = gray.shape
    r = blur // 2
    seen = cv2.copyMakeBorder(gray, r, r, r, r, cv2.BORDER_REFLECT_101)
    pixel, size = np.empty(h * w + ROOM, np.uint32), np.empty(h * w + ROOM, np.uint16)
    hist = np.zeros((2, 2048), np.uint32)
    smooth = blurred(gray, blur)
    magnitude = gradient(smooth)[2]
    for lo in (0, 30, 200):
        n = maxima(
            seen,
            (r, r, r + w, r + h),
            (r, r, r + w, r + h),
            gaussian(blur),
            lo,
            (r + w, r + h),
            hist,
            (0, w),
            pixel,
            size,
        )
        np.testing.assert_array_equal(pixel[:n], np.flatnonzero(cv2.Canny(smooth, lo, lo)))
        np.testing.assert_array_equal(size[:n], magnitude.ravel()[pixel[:n]])
    np.testing.assert_array_equal(hist.sum(0)[:2041], 3 * np.bincount(magnitude.ravel(), minlength=2041))


def _lines(draw, size_px):
    inner = st.integers(1, size_px - 1) if size_px > 1 else st.nothing()
    cuts = draw(st.sets(inner, max_size=12)) if size_px > 1 else set()
    return [0, *sorted(cuts), size_px]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hysteresis_is_components_that_hold_a_strong_pixel(data):
    size_px = 2 ** data.draw(st.integers(0, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weak = rng.random((size_px, size_px)) < data.draw(st.sampled_from([0.1, 0.3, 0.4, 0.5, 0.9]))
    strong = rng.random((size_px, size_px)) < data.draw(st.sampled_from([0.001, 0.01, 0.1]))
    blocks = _resolve(weak, strong, _lines(data.draw, size_px), _lines(data.draw, size_px))
    merged = _merged([blocks[i] for i in rng.permutation(len(blocks))], size_px)
    _, label = cv2.connectedComponents(weak.astype(np.uint8), connectivity=8)
    expected = weak & np.isin(label, label[weak & strong])
    np.testing.assert_array_equal(merged, expected)


@pytest.mark.parametrize("step", [7, 16, 37, 64, 200])
def test_one_strong_pixel_lights_a_chain_through_all_blocks(step):
    weak = np.zeros((512, 512), bool)
    weak[::4] = True  # rows, joined at alternating ends: one line of 65,000 pixels
    weak[[i for i in range(509) if i // 4 % 2 == 0], -1] = True
    weak[[i for i in range(509) if i // 4 % 2 == 1], 0] = True
    strong = np.zeros((512, 512), bool)
    lines = [*range(0, 512, step), 512]
    assert _merged(_resolve(weak, strong, lines, lines), 512).sum() == 0
    strong[508, 511] = True
    assert weak[508, 511]
    np.testing.assert_array_equal(_merged(_resolve(weak, strong, lines, lines), 512), weak)


@pytest.mark.parametrize("flipped", [False, True])
def test_blocks_that_touch_at_a_corner_only(flipped):
    weak = np.eye(64, dtype=bool)
    strong = np.zeros((64, 64), bool)
    strong[63, 63] = True
    weak, strong = (weak[:, ::-1], strong[:, ::-1]) if flipped else (weak, strong)
    lines = list(range(0, 65, 8))
    np.testing.assert_array_equal(_merged(_resolve(weak, strong, lines, lines), 64), weak)


def test_blocks_of_a_real_image_may_come_in_any_order_and_of_any_size(tissue):
    gray = cv2.GaussianBlur(luma(tissue), (3, 3), 0)
    weak, strong, both = (cv2.Canny(gray, *pair) != 0 for pair in ((40, 40), (300, 300), (40, 300)))
    rng = np.random.default_rng(1)
    xs, ys = ([0, *sorted(rng.choice(np.arange(1, 1024), 25, replace=False).tolist()), 1024] for _ in range(2))
    blocks = _resolve(weak, strong, xs, ys)
    assert sum(block.n_open for block in blocks) > 100
    merged = _merged([blocks[i] for i in rng.permutation(len(blocks))], 1024)
    np.testing.assert_array_equal(merged, both)


def test_padding_is_not_read():
    asked = []

    def read(x, y, w, h):
        asked.append((x + w, y + h))
        return np.full((h, w, 3), 255, np.uint8)

    edges_of_regions(read, None, RegionSpec(4096, (200, 100), 4, 9, PAPER, 64))
    assert max(x for x, _ in asked) <= 200 and max(y for _, y in asked) <= 100


@pytest.mark.parametrize("blur", [3, 5, 7, 9, 11, 13, 15])
def test_blur_never_widens_the_range(blur):
    # What allows skipping a flat block before it is blurred.
    rng = np.random.default_rng(blur)
    for low in range(0, 256, 5):
        high = min(255, low + int(rng.integers(0, 12)))
        gray = rng.integers(low, high + 1, (40, 57), np.uint8)
        out = cv2.GaussianBlur(gray, (blur, blur), 0)
        assert gray.min() <= out.min() and out.max() <= gray.max()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, MAX_MAGNITUDE), max_size=60), st.sampled_from([None, 1, 50, 80, 95, 99]))
def test_auto_is_the_smallest_magnitude_that_reaches_nine_tenths_or_what_is_asked(magnitudes, percent):
    hist = np.bincount(np.array(magnitudes, int), minlength=MAX_MAGNITUDE + 1)
    lo, hi = auto_thresholds(hist) if percent is None else auto_thresholds(hist, percent)
    found, share = [m for m in magnitudes if m > 0], percent or 90
    below = np.searchsorted(np.sort(found), np.arange(1, MAX_MAGNITUDE + 1), side="right")
    fits = 1 + np.flatnonzero(100 * below >= share * len(found)) if found else []
    assert hi == max(8, fits[0] if found else 0)
    assert lo == hi // 2


def test_auto_finds_edges_where_fixed_thresholds_are_blind():
    rng = np.random.default_rng(0)
    faint = np.kron(rng.integers(100, 112, (16, 16)), np.ones((16, 16))).astype(np.uint8)[..., None].repeat(3, 2)
    assert _check(faint, (256, 256), 4, 3, PAPER, 256) == 0
    assert _check(faint, (256, 256), 4, 3, "auto", 256) > 500


def test_edge_map_is_opencv(tissue):
    gray = cv2.cvtColor(tissue, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(edge_map(tissue, 100, 200, 1), cv2.Canny(gray, 100, 200) != 0)
    np.testing.assert_array_equal(
        edge_map(tissue, 50, 90, 5), cv2.Canny(cv2.GaussianBlur(gray, (5, 5), 0), 50, 90) != 0
    )


@pytest.mark.parametrize(
    ("resolution", "blur"),
    [
        (64, 3),
        (512, 3),
        (1024, 3),
        (2048, 7),
        (4096, 7),
        (8192, 9),
        (16384, 11),
        (32768, 13),
        (65536, 15),
        (131072, 15),
    ],
)
def test_blur_by_resolution(resolution, blur):
    assert blur_for(resolution) == blur
