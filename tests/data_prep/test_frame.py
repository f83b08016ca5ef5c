"""The frame: geometry, exact box means against a slow rational reference, independence of tiles, bounded memory."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.frame import Frame, FrameReader, MaskReader, choose_level, make_frame
from data_prep.masks.masks import find_masks, open_mask
from data_prep.slides.base import Slide
from data_prep.slides.open import open_slide
from tests.helpers.repository import GLOMERULI
from tests.helpers.slide_files import CMU, KIDNEY, TCGA

FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def exact_pixel(slide: Slide, level: int, frame: Frame, x: int, y: int) -> list[int]:
    """Box mean of one content pixel by rational arithmetic, straight from the definition."""
    width, height = slide.level_sizes_wh[level]
    ratios = [
        Fraction(level_px, px0) / scale
        for level_px, px0, scale in zip((width, height), slide.size_wh, frame.scale_xy, strict=True)
    ]
    (x0, x1), (y0, y1) = (
        (at * ratio, min(Fraction(size), (at + 1) * ratio))
        for at, ratio, size in zip((x, y), ratios, (width, height), strict=True)
    )
    left, top = math.floor(x0), math.floor(y0)
    block = slide.read(level, left, top, math.ceil(x1) - left, math.ceil(y1) - top)
    sums = [Fraction(0)] * 3
    for row, values in enumerate(block.tolist(), top):
        for column, rgb in enumerate(values, left):
            area = (min(x1, column + 1) - max(x0, column)) * (min(y1, row + 1) - max(y0, row))
            sums = [total + area * value for total, value in zip(sums, rgb, strict=True)]
    return [math.floor(total / ((x1 - x0) * (y1 - y0)) + Fraction(1, 2)) for total in sums]


def noise(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_pyramid(path: Path, arrays: list[np.ndarray]) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for level, array in enumerate(arrays):
            tiff.write(array, tile=(128, 128), photometric="rgb", metadata=None, subfiletype=int(level > 0))
    return path


# ---- geometry


def test_keep_places_the_slide_at_one_exact_scale() -> None:
    frame = make_frame((4443, 3567), 1024)
    assert frame.scale_xy == (Fraction(1024, 4443), Fraction(1024, 4443))
    assert frame.content_wh == (1024, 822)  # 3567 * 1024 / 4443 = 822.1
    assert make_frame((300, 200), 1024) == Frame(1024, (Fraction(1), Fraction(1)), (300, 200), "keep")
    assert make_frame((100_000, 3), 64).content_wh == (64, 1)


def test_squash_fills_the_frame() -> None:
    frame = make_frame((300, 5000), 1024, "squash")
    assert frame.scale_xy == (Fraction(1024, 300), Fraction(1024, 5000))
    assert frame.content_wh == (1024, 1024)


@pytest.mark.parametrize(
    ("size_wh", "resolution", "aspect"), [((0, 5), 8, "keep"), ((5, 5), 0, "keep"), ((5, 5), 8, "stretch")]
)
def test_bad_geometry_is_an_error(size_wh: tuple[int, int], resolution: int, aspect: str) -> None:
    with pytest.raises(ValueError, match=r"positive sizes|choose from keep, squash"):
        make_frame(size_wh, resolution, aspect)


def test_the_coarsest_level_that_is_fine_enough_is_read() -> None:
    sizes = [(8192, 4096), (4096, 2048), (2048, 1024), (512, 256)]
    expected = {8192: 0, 8000: 0, 4097: 0, 4096: 1, 2049: 1, 2048: 2, 513: 2, 512: 3, 64: 3, 16384: 0}
    assert {r: choose_level(sizes, make_frame(sizes[0], r)) for r in expected} == expected
    # One axis alone does not make a level fine enough.
    assert choose_level([(1000, 1000), (500, 499)], make_frame((1000, 1000), 500)) == 0
    assert choose_level(sizes, make_frame(sizes[0], 2048, "squash")) == 1  # level 2 has 1024 rows for 2048


def test_a_level_whose_arithmetic_does_not_fit_64_bits_is_not_taken() -> None:
    sizes = [(2_000_003, 1_999_993), (999_983, 999_979)]
    assert choose_level(sizes, make_frame(sizes[0], 4096)) == 0
    assert choose_level([(2_000_000, 1_000_000), (1_000_000, 500_000)], make_frame((2_000_000, 1_000_000), 4096)) == 1


# ---- pixel values


@FILES
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    resolution=st.integers(1, 48),
    aspect=st.sampled_from(["keep", "squash"]),
    seed=st.integers(0, 9),
)
def test_equals_the_rational_mean(
    tmp_path: Path, width: int, height: int, resolution: int, aspect: str, seed: int
) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(noise(width, height, seed)).save(path)
    with open_slide(path) as slide:
        frame = make_frame(slide.size_wh, resolution, aspect)
        got = FrameReader(slide, frame).read(0, 0, resolution, resolution)
        content_w, content_h = frame.content_wh
        want = np.full_like(got, 255)
        for y in range(content_h):
            for x in range(content_w):
                want[y, x] = exact_pixel(slide, 0, frame, x, y)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 16, 300])
def test_integer_ratio_is_the_reshape_mean(tmp_path: Path, factor: int) -> None:
    size = max(2, 96 // factor)
    rgb = noise(size * factor, size * factor, factor)
    Image.fromarray(rgb).save(tmp_path / "noise.png")
    sums = rgb.reshape(size, factor, size, factor, 3).sum(axis=(1, 3), dtype=np.int64)
    with open_slide(tmp_path / "noise.png") as slide:
        got = FrameReader(slide, make_frame(slide.size_wh, size)).read(0, 0, size, size)
    np.testing.assert_array_equal(got, (2 * sums + factor**2) // (2 * factor**2))


def test_a_half_is_rounded_up(tmp_path: Path) -> None:
    rgb = np.array([[0, 0, 4, 5], [1, 1, 5, 4]], np.uint8)[..., None].repeat(3, axis=2)  # means 0.5 and 4.5
    Image.fromarray(rgb).save(tmp_path / "half.png")
    with open_slide(tmp_path / "half.png") as slide:
        assert FrameReader(slide, make_frame(slide.size_wh, 2)).read(0, 0, 2, 1)[0, :, 0].tolist() == [1, 5]


def test_scale_1_is_the_slide_on_white() -> None:
    with open_slide(CMU) as slide:
        width, height = slide.size_wh
        got = FrameReader(slide, make_frame(slide.size_wh, 4096)).read(0, 0, 4096, 4096)
        np.testing.assert_array_equal(got[:height, :width], slide.read(0, 0, 0, width, height))
    assert (got[height:] == 255).all()
    assert (got[:, width:] == 255).all()


def test_level_of_the_frames_own_size_is_passed_through(tmp_path: Path) -> None:
    coarse = noise(256, 192, 1)
    path = write_pyramid(tmp_path / "p.tif", [noise(1024, 768, 0), noise(512, 384, 2), coarse])
    with open_slide(path) as slide:
        assert slide.reader == "fast"
        reader = FrameReader(slide, make_frame(slide.size_wh, 256))
        assert reader.level == 2
        np.testing.assert_array_equal(reader.read(0, 0, 256, 192), coarse)
        finer = FrameReader(slide, make_frame(slide.size_wh, 300))
        assert finer.level == 1
        points = np.random.default_rng(0).integers(0, (300, 225), (20, 2)).tolist()
        for x, y in points:
            assert finer.read(x, y, 1, 1)[0, 0].tolist() == exact_pixel(slide, 1, finer.frame, x, y)


@pytest.mark.parametrize(
    ("path", "resolution", "level"),
    [
        (TCGA, 1024, 1),
        pytest.param(TCGA, 2200, 1, marks=pytest.mark.slow),
        pytest.param(TCGA, 3000, 0, marks=pytest.mark.slow),
        (KIDNEY, 700, 0),
    ],
)
@pytest.mark.parametrize("aspect", ["keep", "squash"])
def test_real_slides_have_one_value_per_pixel_and_it_is_the_mean(
    path: Path, resolution: int, level: int, aspect: str
) -> None:
    rng = np.random.default_rng(0)
    with open_slide(path) as slide, open_slide(path) as again:
        frame = make_frame(slide.size_wh, resolution, aspect)
        reader, other = FrameReader(slide, frame), FrameReader(again, frame)
        if aspect == "keep":
            assert reader.level == level
        whole = reader.read(0, 0, resolution, resolution)
        for _ in range(12):
            x, y = (int(v) for v in rng.integers(0, resolution - 1, 2))
            w, h = (int(v) for v in rng.integers(1, (min(400, resolution - x + 1), min(400, resolution - y + 1))))
            np.testing.assert_array_equal(other.read(x, y, w, h), whole[y : y + h, x : x + w])
            if x < frame.content_wh[0] and y < frame.content_wh[1]:
                assert whole[y, x].tolist() == exact_pixel(slide, reader.level, frame, x, y)


def test_pixels_that_straddle_file_tiles_and_blocks(tmp_path: Path) -> None:
    rgb = noise(4201, 173, 3)  # 4201 and 173 are prime: two of the 2048 px blocks end inside a frame pixel
    with tifffile.TiffWriter(tmp_path / "odd.tif") as tiff:
        tiff.write(rgb, tile=(256, 256), photometric="rgb")
    with open_slide(tmp_path / "odd.tif", "tifffile") as slide:
        frame = make_frame(slide.size_wh, 4001)
        reader = FrameReader(slide, frame)
        row = reader.read(0, 40, 4001, 1)[0]
        for x in [0, 1949, 1950, 1951, 3900, 3901, 3902, 4000]:
            assert row[x].tolist() == exact_pixel(slide, 0, frame, x, 40)


def test_sums_beyond_53_bits(tmp_path: Path) -> None:
    """Level 1 of 60013 x 40031 by odd factors: float64 would no longer be exact, int64 is."""
    sizes = [(60013, 40031), (30006, 20015)]
    tile = noise(512, 512, 4)
    with tifffile.TiffWriter(tmp_path / "huge.tif", bigtiff=True) as tiff:
        for level, (width, height) in enumerate(sizes):
            count = -(-width // 512) * -(-height // 512)
            tiles = (tile if i in (0, 2, 1000, count - 1) else None for i in range(count))  # None: left out, white
            options = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
            tiff.write(tiles, shape=(height, width, 3), dtype="u1", tile=(512, 512), subfiletype=level, **options)
    with open_slide(tmp_path / "huge.tif", "tifffile") as slide:
        assert slide.level_sizes_wh == sizes
        frame = make_frame(slide.size_wh, 4096)
        reader = FrameReader(slide, frame)
        assert reader.level == 1
        assert 511 * reader._x_axis.num * reader._y_axis.num >= 2**53
        for x, y in [(0, 0), (69, 1), (70, 2), (139, 3), (4095, 2731), (100, 69), (4090, 2700)]:
            assert reader.read(x, y, 1, 1)[0, 0].tolist() == exact_pixel(slide, 1, frame, x, y)


def test_white_is_white_and_padding_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (37, 11), "white").save(tmp_path / "w.png")
    with open_slide(tmp_path / "w.png") as slide:
        assert (FrameReader(slide, make_frame(slide.size_wh, 32)).read(0, 0, 32, 32) == 255).all()


@pytest.mark.parametrize("where", [(-1, 0, 4, 4), (0, 0, 65, 1), (60, 60, 4, 5), (0, 0, 0, 4), (64, 0, 1, 1)])
def test_rectangles_outside_the_frame_are_refused(where: tuple[int, int, int, int]) -> None:
    with open_slide(KIDNEY) as slide:
        with pytest.raises(ValueError, match="not inside the frame of 64 px"):
            FrameReader(slide, make_frame(slide.size_wh, 64)).read(*where)


def test_memory_is_bounded_however_small_the_scale(tmp_path: Path) -> None:
    """8192 x 8192 RGB is 192 MiB; the frame of it is read in one call with less than half of that."""
    tile = noise(512, 512, 5)
    with tifffile.TiffWriter(tmp_path / "big.tif") as tiff:
        options = {"photometric": "rgb", "compression": "deflate", "metadata": None}
        tiff.write((tile for _ in range(256)), shape=(8192, 8192, 3), dtype="u1", tile=(512, 512), **options)
    for resolution in (64, 63, 1):
        with open_slide(tmp_path / "big.tif", "tifffile") as slide:
            reader = FrameReader(slide, make_frame(slide.size_wh, resolution))
            tracemalloc.start()
            try:
                pixels = reader.read(0, 0, resolution, resolution)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert abs(float(pixels.mean()) - 127.5) < 2
        assert peak < 160 * 2**20  # 64 MiB of cached tiles, one block of 12 MiB, its sums


# ---- masks


def test_mask_takes_the_pixel_under_the_centre() -> None:
    (mask_path,) = find_masks(KIDNEY, GLOMERULI / "masks")
    with Image.open(mask_path) as picture:
        ids = np.asarray(picture)
    with open_mask(mask_path) as mask:
        for resolution in (1024, 512, 700, 2048):
            frame = make_frame(mask.size_wh, resolution)
            got = MaskReader(mask, frame).read(0, 0, resolution, resolution)
            content_w, content_h = frame.content_wh
            centres = [math.floor((i + Fraction(1, 2)) / frame.scale_xy[0]) for i in range(content_w)]
            want = np.zeros((resolution, resolution), np.uint8)
            want[:content_h, :content_w] = ids[np.ix_(centres, centres)]
            np.testing.assert_array_equal(got, want)
            assert got.any()
            np.testing.assert_array_equal(MaskReader(mask, frame).read(333, 101, 97, 150), got[101:251, 333:430])


@FILES
@given(width=st.integers(1, 60), height=st.integers(1, 60), resolution=st.integers(1, 70), squash=st.booleans())
def test_mask_of_any_size(tmp_path: Path, width: int, height: int, resolution: int, squash: bool) -> None:
    ids = np.random.default_rng(width).integers(0, 5, (height, width), dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    with open_mask(tmp_path / "ids.png") as mask:
        frame = make_frame((width, height), resolution, "squash" if squash else "keep")
        got = MaskReader(mask, frame).read(0, 0, resolution, resolution)
    content_w, content_h = frame.content_wh
    assert not got[content_h:].any()
    assert not got[:, content_w:].any()
    for y in range(content_h):
        for x in range(content_w):
            source = [
                min(size - 1, math.floor((at + Fraction(1, 2)) / scale))
                for at, scale, size in zip((x, y), frame.scale_xy, (width, height), strict=True)
            ]
            assert got[y, x] == ids[source[1], source[0]]


def test_a_large_mask_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    ids = np.add.outer(*((np.arange(12000) // n % 3).astype(np.uint8) for n in (7, 11)))  # classes 0 to 4
    tifffile.imwrite(tmp_path / "ids.tif", ids, tile=(512, 512), compression="deflate")
    with open_mask(tmp_path / "ids.tif") as mask:
        reader = MaskReader(mask, make_frame(mask.size_wh, 256))
        reader.read(0, 0, 1, 1)  # opens, looks at the values
        tracemalloc.start()
        try:
            got = reader.read(0, 0, 256, 256)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    centres = [(2 * i + 1) * 12000 // 512 for i in range(256)]
    np.testing.assert_array_equal(got, ids[np.ix_(centres, centres)])
    assert peak < 110 * 2**20  # 64 MiB of cached tiles, twice 16 MiB of rows; the mask has 137 MiB
