"""Regions of a frame against OpenCV on the whole frame, and against each other."""

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.edges import scan as scan_module
from data_prep.edges.canny import auto_thresholds, edge_map, luma
from data_prep.edges.scan import RegionSpec, base_px, edges_of_maxima, scan_region
from tests.helpers.frames import corners_of, counts_from_map, edges_of_regions, gradient
from tests.helpers.repository import GLOMERULI

IMAGES = GLOMERULI / "images"


@pytest.fixture(scope="module")
def tissue():
    return cv2.cvtColor(cv2.imread(str(sorted(IMAGES.iterdir())[3])), cv2.COLOR_BGR2RGB)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 pixels, so that small pictures have many."""
    monkeypatch.setattr(scan_module, "BLOCK_PX", 32)


def framed(rgb, size_px):
    out = np.full((size_px, size_px, 3), 255, np.uint8)
    out[: rgb.shape[0], : rgb.shape[1]] = rgb
    return out


def frame_counts(whole, spec, mask=None):
    """Counts, thresholds, sums and mask sums of a frame by its regions, every edge result through its packed form."""
    reads = []

    def read(x, y, w, h):
        assert x >= 0 and y >= 0 and x + w <= spec.size_px and y + h <= spec.size_px
        reads.append(w * h)
        return whole[y : y + h, x : x + w].copy()

    def read_mask(x, y, w, h):
        return mask[y : y + h, x : x + w].copy()

    counts, (lo, hi), scans = edges_of_regions(read, None if mask is None else read_mask, spec)
    b = spec.side_px // base_px(spec)
    sums = np.zeros((3, spec.size_px // base_px(spec), spec.size_px // base_px(spec)), np.int64)
    masks = None if mask is None else np.zeros((spec.classes, *sums.shape[1:]), np.int64)
    for scan, (x, y) in zip(scans, corners_of(spec), strict=True):
        i, j = y // spec.side_px, x // spec.side_px
        sums[:, i * b : (i + 1) * b, j * b : (j + 1) * b] = scan.sums
        if masks is not None:
            masks[:, i * b : (i + 1) * b, j * b : (j + 1) * b] = scan.mask_sums
    return counts, (lo, hi), sums, masks, scans, sum(reads)


def check(rgb, spec, mask=None):
    whole = framed(rgb, spec.size_px)
    ids = None
    if mask is not None:
        ids = np.zeros((spec.size_px, spec.size_px), np.uint8)
        ids[: mask.shape[0], : mask.shape[1]] = mask
    counts, (lo, hi), sums, masks, scans, _ = frame_counts(whole, spec, ids)
    expected = counts_from_map(edge_map(whole, lo, hi, spec.blur), spec.patch)
    np.testing.assert_array_equal(counts, expected)
    b, n = base_px(spec), spec.size_px // base_px(spec)
    np.testing.assert_array_equal(sums, whole.astype(np.int64).reshape(n, b, n, b, 3).sum((1, 3)).transpose(2, 0, 1))
    if masks is not None:
        for k in range(spec.classes):
            np.testing.assert_array_equal(masks[k], (ids == k + 1).reshape(n, b, n, b).sum((1, 3)))
    return int(counts.sum()), (lo, hi), scans


def whole_hist(whole, content_wh, blur):
    gray = luma(whole)
    smooth = cv2.GaussianBlur(gray, (blur, blur), 0) if blur > 1 else gray
    magnitude = gradient(smooth)[2][: content_wh[1], : content_wh[0]]
    return np.bincount(magnitude.ravel(), minlength=2041)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_regions_are_opencv_on_the_whole_frame(data):
    size_px = 2 ** data.draw(st.integers(5, 9))
    patch = 2 ** data.draw(st.integers(0, 5))
    side = 2 ** data.draw(st.integers(max(patch.bit_length() - 1, 4 if size_px > 16 else 0), size_px.bit_length() - 1))
    wh = data.draw(st.integers(1, size_px)), data.draw(st.integers(1, size_px))
    blur = data.draw(st.sampled_from([1, 3, 5, 9, 15]))
    lo = data.draw(st.integers(0, 120))
    thresholds = data.draw(st.sampled_from(["auto", (lo, lo), (lo, lo + 60), (0, 300), (100, 200)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    coarse = rng.integers(0, 256, (wh[1] // 8 + 1, wh[0] // 8 + 1, 3), np.uint8)
    rgb = cv2.resize(coarse, wh, interpolation=cv2.INTER_LINEAR).astype(int)
    rgb = np.clip(rgb + rng.integers(-data.draw(st.sampled_from([1, 10, 60])), 2, rgb.shape), 0, 255).astype(np.uint8)
    mask = rng.integers(0, 4, wh[::-1], np.uint8)
    percent = data.draw(st.sampled_from([90, 90, 1, 50, 99]))
    spec = RegionSpec(size_px, wh, patch, blur, thresholds, side, classes=3, auto_percent=percent)
    before = scan_module.BLOCK_PX
    try:
        scan_module.BLOCK_PX = data.draw(st.sampled_from([16, 32, 64, 512]))
        _, _, scans = check(rgb, spec, mask)
    finally:
        scan_module.BLOCK_PX = before
    if thresholds == "auto":
        hist = sum(scan.hist for scan in scans)
        np.testing.assert_array_equal(hist[1:], whole_hist(framed(rgb, size_px), wh, blur)[1:])


@pytest.mark.parametrize("thresholds", ["auto", (100, 140), (20, 120)])
@pytest.mark.parametrize(("side", "patch", "blur"), [(256, 8, 3), (512, 32, 9), (1024, 2, 15), (2048, 16, 7)])
def test_real_texture(tissue, thresholds, side, patch, blur):
    rgb = np.vstack([np.hstack([tissue, tissue[:, ::-1]])] * 2)[:1900, :2000]
    found, _, _ = check(rgb, RegionSpec(2048, (2000, 1900), patch, blur, thresholds, side))
    assert found > 1000


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("lit_end", [False, True])
def test_one_line_through_all_regions(small_blocks, side, lit_end):
    # A faint snake, lit only by one bright spot at its very end.
    gray = np.full((256, 256), 100, np.uint8)
    for i in range(8, 248, 16):
        gray[i : i + 8, 8:248] = 112
        right = (i // 16) % 2 == 0
        if i + 16 < 248:
            gray[i : i + 24, (240 if right else 8) : (248 if right else 16)] = 112
    if lit_end:
        gray[240:248, 8:16] = 255
    rgb = gray[..., None].repeat(3, 2)
    found, _, _ = check(rgb, RegionSpec(256, (256, 256), 8, 1, (30, 400), side))
    assert (found > 3000) == lit_end


def test_diagonal_through_region_corners(small_blocks):
    # A faint step along the diagonal, bright only at its end.
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    gray = np.where(x > y, 100, 120 + np.clip(x - 200, 0, 100))
    rgb = gray.astype(np.uint8)[..., None].repeat(3, 2)
    found, _, _ = check(rgb, RegionSpec(256, (256, 256), 8, 1, (20, 300), 64))
    assert found > 200


@pytest.mark.parametrize("thresholds", ["auto", (0, 0), (100, 200)])
def test_blank_frames(thresholds):
    for value in (255, 0, 77):
        rgb = np.full((300, 200, 3), value, np.uint8)
        check(rgb, RegionSpec(512, (200, 300), 8, 5, thresholds, 128))


def test_flat_blocks_are_skipped_and_counted():
    rgb = np.full((2048, 2048, 3), 240, np.uint8)
    rgb[:200, :200] = np.random.default_rng(0).integers(0, 255, (200, 200, 3))
    _, _, scans = check(rgb, RegionSpec(2048, (2048, 2048), 8, 9, (100, 200), 1024))
    assert sum(scan.blocks_total for scan in scans) == 4
    assert sum(scan.blocks_skipped for scan in scans) == 3


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sobel_magnitude_is_at_most_eight_times_the_range(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    low = data.draw(st.integers(0, 255))
    values = rng.choice([low, data.draw(st.integers(low, 255))], (12, 12)).astype(np.uint8)
    top = int(gradient(values)[2].max())
    assert top <= 8 * (int(values.max()) - int(values.min()))
    # So what spans at most an eighth of a threshold has no edge.
    if 8 * (int(values.max()) - int(values.min())) <= (lo := data.draw(st.integers(0, 300))):
        assert not cv2.Canny(values, lo, lo).any()


def test_bands_read_every_pixel_about_once(tissue):
    spec = RegionSpec(1024, (1024, 1024), 16, 15, "auto", 1024)
    assert frame_counts(tissue, spec)[-1] < 1.05 * 1024 * 1024


def test_a_region_beyond_the_content_is_not_read():
    def read(x, y, w, h):
        raise AssertionError("padding was read")

    spec = RegionSpec(1024, (100, 100), 8, 9, "auto", 256)
    scan = scan_region(read, read, spec, 512, 0)
    assert (scan.sums == 255 * base_px(spec) ** 2).all() and scan.blocks_total == 0 and not scan.hist.any()
    assert scan.mask_sums.shape == (0, *scan.sums.shape[1:])


def test_class_above_classes():
    spec = RegionSpec(256, (256, 256), 8, 3, (100, 200), 256, classes=2)
    white = np.full((256, 256, 3), 255, np.uint8)
    with pytest.raises(ValueError, match="class 3, but only classes 1 to 2"):
        scan_region(lambda x, y, w, h: white[:h, :w], lambda x, y, w, h: np.full((h, w), 3, np.uint8), spec, 0, 0)


@pytest.mark.parametrize("side", [100, 4, 2048])
def test_impossible_region_sides(side):
    with pytest.raises(ValueError, match="region"):
        RegionSpec(1024, (1024, 1024), 8, 3, "auto", side)


def test_uniform_regions_have_sums_only(tissue):
    spec = RegionSpec(1024, (1024, 1024), 16, None, "auto", 512)
    scan = scan_region(lambda x, y, w, h: tissue[y : y + h, x : x + w], None, spec, 512, 0)
    assert scan.edges is None and scan.hist is None and scan.maxima is None
    b = base_px(spec)
    expected = tissue[:512, 512:].astype(int).reshape(512 // b, b, 512 // b, b, 3).sum((1, 3))
    np.testing.assert_array_equal(scan.sums, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("low", [0, 17, 128, 250])
def test_luma_never_widens_the_range_of_the_colours(low):
    # What allows skipping a block before its luma is known.
    rng = np.random.default_rng(low)
    for span in range(6):
        rgb = rng.integers(low, min(255, low + span) + 1, (50, 61, 3), np.uint8)
        gray = luma(rgb)
        assert rgb.min() <= gray.min() and gray.max() <= rgb.max()


def spiral(size_px, pitch, lit_end):
    """A faint line from the border inwards; it may brighten slowly at its end in the middle."""
    gray = np.full((size_px, size_px), 100, np.uint8)
    corners, low, high = [], pitch, size_px - pitch
    while high - low > 2 * pitch:
        corners += [(low, low), (high, low), (high, high), (low, high)]
        low, high = low + pitch, high - pitch
        corners += [(low - pitch, low)]
    cv2.polylines(gray, [np.array(corners, np.int32)], False, 112, 3)
    x, y = corners[-1]
    if lit_end:
        gray[y : y + 40, x - 1 : x + 2] = np.linspace(255, 113, 40).astype(np.uint8)[:, None]
    return gray


@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize("lit_end", [False, True])
def test_a_spiral_through_all_regions(small_blocks, side, lit_end):
    gray = spiral(512, 24, lit_end)
    found, _, _ = check(gray[..., None].repeat(3, 2), RegionSpec(512, (512, 512), 8, 1, (30, 400), side))
    assert (found > 2000) == lit_end


@pytest.fixture(scope="module")
def large():
    """8192 x 8192: fields turned at random on half of it, white around, a spiral on the right, padding below."""
    rng = np.random.default_rng(0)
    fields = [cv2.imread(str(path))[..., ::-1] for path in sorted(IMAGES.iterdir())]
    rgb = np.full((8000, 8192, 3), 255, np.uint8)
    for y in range(0, 7000, 1024):
        for x in range(0, 4096, 1024):
            rgb[y : y + 1024, x : x + 1024] = np.rot90(fields[rng.integers(24)], rng.integers(4))[: 8000 - y]
    rgb[1000:5096, 4096:] = spiral(4096, 96, True)[..., None]
    return rgb


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "thresholds", "blur", "patch"),
    [
        (256, "auto", 9, 8),
        (512, (30, 400), 1, 16),
        (1024, (0, 90), 15, 4),
        (2048, (40, 40), 3, 8),
        (4096, "auto", 15, 8),
        (8192, (100, 200), 7, 16),
        (8192, "auto", 9, 2),
    ],
)
def test_regions_of_a_large_frame(large, side, thresholds, blur, patch):
    found, _, _ = check(large, RegionSpec(8192, (8192, 8000), patch, blur, thresholds, side))
    assert found > 500_000


def test_too_few_maxima_are_noticed_and_enough_give_the_same_edges(tissue):
    spec = RegionSpec(1024, (1024, 1024), 8, 9, "auto", 1024)

    def read(x, y, w, h):
        return tissue[y : y + h, x : x + w]

    blind = scan_region(read, None, spec, 0, 0)
    lo, hi = auto_thresholds(blind.hist)
    harsh = np.zeros(2041, np.int64)
    harsh[900:1000] = 10**6  # a frame of black and white: far more is asked for than this region has
    assert edges_of_maxima(scan_region(read, None, spec, 0, 0, seen=harsh).maxima, spec, 0, 0, lo, hi) is None
    likely, surer = (scan_region(read, None, spec, 0, 0, seen=n * blind.hist) for n in (8, 256))
    kept = [len(scan.maxima.ahead) for scan in (blind, likely, surer)]
    assert likely.maxima.above > 4 and sorted(set(kept)) == kept[::-1]
    assert (blind.maxima.least == -1).all() and (likely.maxima.least > 4).all()  # the latter in a byte each
    top = int(likely.maxima.least.min()) + 254
    assert edges_of_maxima(likely.maxima, spec, 0, 0, lo, top + 1) is None
    for limits, scans in (((lo, hi), (blind, likely, surer)), ((lo, top), (blind, likely))):
        fixed = scan_region(read, None, RegionSpec(1024, (1024, 1024), 8, 9, limits, 1024), 0, 0).edges
        for scan in scans:
            found = edges_of_maxima(scan.maxima, spec, 0, 0, *limits)
            np.testing.assert_array_equal(found.counts, fixed.counts)
            for one, other in zip(found.sides, fixed.sides, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("percent", [40, 80, 90, 98])
def test_what_is_kept_goes_by_the_quantile_that_is_asked_for(tissue, percent):
    spec = RegionSpec(1024, (1024, 1024), 8, 9, "auto", 1024, auto_percent=percent)

    def read(x, y, w, h):
        return tissue[y : y + h, x : x + w]

    hist = scan_region(read, None, spec, 0, 0).hist
    lo, hi = auto_thresholds(hist, percent)
    kept = scan_region(read, None, spec, 0, 0, seen=8 * hist).maxima
    assert max(4, lo // 2) <= int(kept.above) <= lo and edges_of_maxima(kept, spec, 0, 0, lo, hi) is not None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(20, 60), "auto"]), st.sampled_from([None, 1, 7]))
def test_pieces_of_any_shape_are_as_good_as_the_whole(seed, thresholds, blur):
    rng = np.random.default_rng(seed)
    wh = tuple(int(side) for side in rng.integers(40, 129, 2))
    rgb = np.full((128, 128, 3), 255, np.uint8)
    rgb[: wh[1], : wh[0]] = rng.integers(0, 256, (wh[1], wh[0], 3))
    cuts = [[0, *sorted(rng.choice(np.arange(1, 128), 4, replace=False).tolist()), 128] for _ in range(2)]
    one_colour = rng.random((5, 5)) < 0.4
    for i, (top, bottom) in enumerate(itertools.pairwise(cuts[1])):
        for j, (left, right) in enumerate(itertools.pairwise(cuts[0])):
            if one_colour[i, j]:
                rgb[top:bottom, left:right] = rng.choice([255, 200, 7, 90]) - rng.integers(0, 2, 3)
    rgb[wh[1] :], rgb[:, wh[0] :] = 255, 255

    def parts(x, y, w, h, done):
        for top, bottom in itertools.pairwise(cuts[1]):
            for left, right in itertools.pairwise(cuts[0]):
                if left < x + w and x < right and top < y + h and y < bottom:
                    piece = rgb[top:bottom, left:right].copy()
                    if (piece == piece[0, 0]).all():
                        piece = np.broadcast_to(piece[0, 0].copy(), piece.shape)
                    yield piece, left, top

    spec = RegionSpec(128, wh, 4, blur, thresholds, 64)
    for x, y in ((0, 0), (64, 0), (0, 64), (64, 64)):
        whole = scan_region(lambda x, y, w, h: rgb[y : y + h, x : x + w], None, spec, x, y)
        pieces = scan_region(lambda *_: None, None, spec, x, y, parts)
        np.testing.assert_array_equal(pieces.sums, whole.sums)
        for name in ("hist", "maxima", "edges"):
            one, other = getattr(pieces, name), getattr(whole, name)
            if name == "maxima" and one is not None:
                one, other = one.ahead, other.ahead
            if name == "edges" and one is not None:
                one, other = one.counts, other.counts
            assert one is other is None or np.array_equal(one, other)
