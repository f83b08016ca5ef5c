"""The fast reader against OpenSlide, pixel for pixel, and its way of saying no."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.edges.scan import RegionSpec, scan_region
from data_prep.frame import FrameReader, make_frame
from data_prep.slides import fast_tiff
from data_prep.slides.base import Slide
from data_prep.slides.fast_tiff import UnsuitableError, open_fast
from data_prep.slides.open import open_slide
from tests.helpers.repository import WSI

CMU, TCGA = WSI / "CMU-1-Small-Region.svs", WSI / "TCGA-CR-7395-01A-01-TS1.svs"


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return np.asarray(tifffile.imread(CMU, key=0))[:1000, :1100]


def compare(path: Path, step: int = 700) -> None:
    """All pixels of all levels."""
    with open_fast(path) as fast, open_slide(path, "openslide") as slow:
        assert fast.level_sizes_wh == slow.level_sizes_wh and fast.mpp == slow.mpp
        for level, (width, height) in enumerate(fast.level_sizes_wh):
            for y in range(0, height, step):
                for x in range(0, width, step):
                    where = (level, x, y, min(step, width - x), min(step, height - y))
                    np.testing.assert_array_equal(fast.read(*where), slow.read(*where))


@pytest.mark.parametrize("path", [pytest.param(CMU, id="CMU"), pytest.param(TCGA, id="TCGA", marks=pytest.mark.slow)])
def test_real_slides(path: Path) -> None:
    with open_slide(path) as slide:
        assert slide.reader == "fast"
    compare(path)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "jpeg", "compressionargs": {"level": 80}},
        {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (1, 1)},
        {"compression": "jpeg", "subsampling": (2, 1)},
        {"compression": "jpeg", "subsampling": (2, 2)},
        {"compression": "jpeg", "compressionargs": {"level": 90, "outcolorspace": "rgb"}},
        {"compression": "deflate"},
        {"compression": "deflate", "predictor": True},
        {"compression": "lzw"},
        {"compression": "zstd"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("big", [False, True])
def test_pyramids(tmp_path: Path, rgb: np.ndarray, options: dict, big: bool) -> None:
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path, bigtiff=big) as out:
        for level in range(3):
            out.write(
                rgb[:: 2**level, :: 2**level],
                tile=(128, 256),
                photometric="rgb",
                metadata=None,
                subfiletype=min(level, 1),
                resolution=(20000 / 2**level,) * 2,
                resolutionunit="CENTIMETER",
                **options,
            )
    with open_slide(path) as slide:
        assert slide.reader == "fast" and slide.mpp == 0.5
    compare(path)


def pasted(slide: Slide, x: int, y: int, w: int, h: int) -> np.ndarray:
    """A region put together from its pieces; every pixel must come once."""
    out, times = np.zeros((h, w, 3), np.uint8), np.zeros((h, w), int)
    for piece, left, top in slide.parts(0, x, y, w, h):
        x0, y0 = max(x, left), max(y, top)
        x1, y1 = min(x + w, left + piece.shape[1]), min(y + h, top + piece.shape[0])
        out[y0 - y : y1 - y, x0 - x : x1 - x] = piece[y0 - top : y1 - top, x0 - left : x1 - left]
        times[y0 - y : y1 - y, x0 - x : x1 - x] += 1
    assert (times == 1).all()
    return out


def test_any_region_and_any_cache(tmp_path: Path, rgb: np.ndarray, monkeypatch) -> None:
    monkeypatch.setattr(fast_tiff, "CACHE_BYTES", 300_000)
    rng = np.random.default_rng(0)
    with open_fast(CMU) as slide:
        width, height = slide.size_wh
        whole = slide.read(0, 0, 0, width, height)
        np.testing.assert_array_equal(whole[:1000, :1100], rgb)
        for _ in range(100):
            x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
            w, h = int(rng.integers(1, min(600, width - x) + 1)), int(rng.integers(1, min(600, height - y) + 1))
            np.testing.assert_array_equal(slide.read(0, x, y, w, h), whole[y : y + h, x : x + w])
            np.testing.assert_array_equal(pasted(slide, x, y, w, h), whole[y : y + h, x : x + w])
        assert slide._cached_bytes <= 300_000


def test_bands_decode_every_tile_once(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (2048, 4096, 3), np.uint8)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, picture, tile=(256, 256), photometric="rgb", compression="jpeg")
    with open_fast(path) as slide:
        for top in range(0, 2048, 512):  # as a region is scanned, with its halo
            a, b = max(0, top - 10), min(2048, top + 522)
            slide.read(0, 0, a, 4096, b - a)
        assert slide.decoded_tiles == 8 * 16 and slide.decoded_px == 2048 * 4096
        assert slide.read_bytes == sum(tifffile.TiffFile(path).pages[0].databytecounts)


def test_regions_decode_every_tile_once_and_keep_their_sides(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "x.tif"
    picture = rng.integers(0, 255, (2048, 2048, 3), np.uint8)
    tifffile.imwrite(path, picture, tile=(128, 128), photometric="rgb", compression="jpeg")
    with open_fast(path) as slide:
        reader = FrameReader(slide, make_frame(slide.size_wh, 2048))
        spec = RegionSpec(2048, (2048, 2048), 8, 9, "auto", 512)
        for index in rng.permutation(16).tolist():  # ranks take them in any order
            y, x = divmod(index, 4)
            scan = scan_region(reader.read, None, spec, 512 * x, 512 * y, reader.parts)
            shown = slide.read(0, 512 * x, 512 * y, 512, 512)
            np.testing.assert_array_equal(scan.sums[0], shown[..., 0].reshape(128, 4, 128, 4).sum((1, 3)))
            slide.decoded_tiles -= 4  # `read` had to decode the inner ones again
        assert slide.decoded_tiles == 16 * 16


def test_equal_tiles_are_decoded_once(tmp_path: Path) -> None:
    path = tmp_path / "white.tif"
    tifffile.imwrite(
        path, np.full((2048, 2048, 3), 244, np.uint8), tile=(256, 256), photometric="rgb", compression="jpeg"
    )
    with open_fast(path) as slide:
        assert (slide.read(0, 0, 0, 2048, 2048) == 244).all()
        assert slide.decoded_tiles == 1
        assert (pasted(slide, 5, 7, 2000, 1900) == 244).all()
        assert {piece.strides for piece, _, _ in slide.parts(0, 0, 0, 2048, 2048)} == {(0, 0, 1)}


def test_tiles_that_the_file_leaves_out(tmp_path: Path, rgb: np.ndarray) -> None:
    path = tmp_path / "sparse.tif"
    tiles = [rgb[:256, :256], None, None, rgb[256:512, 256:512]]
    tifffile.imwrite(
        path, iter(tiles), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb", compression="jpeg"
    )
    with open_slide(path) as slide, open_slide(path, "openslide") as slow:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 512, 512), slow.read(0, 0, 0, 512, 512))


@pytest.mark.parametrize("kind", ["strips", "16 bit", "gray", "jpeg"])
def test_other_files_are_left_to_others(tmp_path: Path, rgb: np.ndarray, kind: str) -> None:
    path = tmp_path / ("x.jpg" if kind == "jpeg" else "x.tif")
    if kind == "jpeg":
        path.write_bytes((WSI.parent / "glomeruli24" / "images" / "10003.jpg").read_bytes())
    elif kind == "strips":
        tifffile.imwrite(path, rgb, photometric="rgb")
    elif kind == "16 bit":
        tifffile.imwrite(path, rgb.astype(np.uint16) * 257, photometric="rgb", tile=(256, 256))
    else:
        tifffile.imwrite(path, rgb[..., 0], photometric="minisblack", tile=(256, 256), compression="jpeg")
    with open_slide(path) as slide:
        assert slide.reader != "fast"


def test_disagreement_means_openslide(tmp_path: Path, rgb: np.ndarray, monkeypatch) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", compression="jpeg")
    real = fast_tiff._TiledPage.decode
    monkeypatch.setattr(fast_tiff._TiledPage, "decode", lambda self, data, index: real(self, data, index) ^ 1)
    with pytest.raises(UnsuitableError, match=r"x\.tif: pixels of level 0 differ"):
        open_fast(path)
    with open_slide(path) as slide:
        assert slide.reader == "openslide"


def jpeg_slide(path: Path, rgb: np.ndarray) -> tuple[list[int], list[int]]:
    tifffile.imwrite(path, rgb[:768, :1024], tile=(256, 256), photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        return list(tiff.pages[0].dataoffsets), list(tiff.pages[0].databytecounts)


@pytest.mark.parametrize("damage", ["zeros", "early end", "noise"])
def test_a_damaged_jpeg_tile(tmp_path: Path, rgb: np.ndarray, damage: str) -> None:
    path = tmp_path / "x.tif"
    offsets, counts = jpeg_slide(path, rgb)
    with open_fast(path) as slide:
        whole = slide.read(0, 0, 0, 1024, 768)
    data = bytearray(path.read_bytes())
    start, count = offsets[6], counts[6]  # not one of those that are compared when the slide is opened
    if damage == "zeros":
        data[start : start + count] = bytes(count)
    elif damage == "early end":
        data[start + count // 2 : start + count] = bytes(count - count // 2)
    else:
        data[start : start + 200] = os.urandom(200)
    path.write_bytes(data)
    whole[256:512, 512:768] = 255
    with open_slide(path) as slide:
        assert slide.reader == "fast"
        np.testing.assert_array_equal(slide.read(0, 0, 0, 1024, 768), whole)
        assert slide.damaged == [(0, 512, 256, 256, 256)]
    with open_slide(path) as slide:
        np.testing.assert_array_equal(pasted(slide, 0, 0, 1024, 768), whole)
        assert slide.damaged == [(0, 512, 256, 256, 256)]
    with open_slide(path) as slide:
        list(slide.parts(0, 0, 0, 1024, 768, done=(0, 0, 1024, 768)))
        assert slide.damaged and slide._cached_bytes == 0  # damage does not make the tiles after it worth keeping
