"""Pictures that are decoded whole: modes, orientation, sizes, memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from data_prep.slides import memory
from data_prep.slides.base import SlideError
from data_prep.slides.open import open_slide
from tests.helpers.slide_files import failure, whole, write_png

# ---- pictures decoded whole


def test_picture_modes(tmp_path: Path, rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    three = gray[..., None].repeat(3, axis=2)
    alpha = np.linspace(0, 255, 300).astype(np.uint8)[None].repeat(200, axis=0)
    blend = np.floor(rgb * (alpha[..., None] / 255) + (255 - alpha[..., None]) + 0.5)
    gray_blend = np.floor(three * (alpha[..., None] / 255) + (255 - alpha[..., None]) + 0.5)
    palette = image.quantize(64)
    bits = Image.fromarray(gray > 128)
    cases: dict[str, tuple[Image.Image, np.ndarray]] = {
        "rgb.png": (image, rgb),
        "rgb.bmp": (image, rgb),
        "gray.png": (Image.fromarray(gray), three),
        "gray16.png": (Image.fromarray(gray.astype(np.uint16) * 256 + 77), three),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), blend),
        "la.png": (Image.fromarray(np.dstack([gray, alpha])), gray_blend),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "bit.png": (bits, (three > 128) * 255),
    }
    for name, (picture, shown) in cases.items():
        picture.save(tmp_path / name)
        with open_slide(tmp_path / name) as slide:
            assert (slide.reader, slide.size_wh, slide.mpp) == ("raster", (300, 200), None)
            got = slide.read(0, 0, 0, 300, 200)
            np.testing.assert_array_equal(got, shown, err_msg=name)
            np.testing.assert_array_equal(slide.read(0, 299, 7, 1, 190), got[7:197, 299:300], err_msg=name)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "x.png", transparency=1)
    assert whole(tmp_path / "x.png").tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_jpeg_gray_and_cmyk(tmp_path: Path, rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb)
    for mode in ("L", "CMYK"):
        image.convert(mode).save(tmp_path / "x.jpg", quality=95)
        assert np.abs(whole(tmp_path / "x.jpg").astype(int) - np.asarray(image.convert(mode).convert("RGB"))).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "strips.tif"])
def test_orientation(tmp_path: Path, rgb: np.ndarray, orientation: int, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix.endswith("tif"):
        options = {} if suffix == "strips.tif" else {"tile": (64, 96)}
        tag = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, rgb, photometric="rgb", metadata=None, extratags=tag, **options)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(rgb).save(path, exif=exif)
    stored = Image.fromarray(rgb)
    if suffix == "jpg":  # as the codec left it
        with Image.open(path) as picture:
            stored = Image.fromarray(np.asarray(picture))
    stored.getexif()[274] = orientation
    shown = np.asarray(ImageOps.exif_transpose(stored))
    with open_slide(path) as slide:
        assert slide.size_wh == ((200, 300) if orientation >= 5 else (300, 200))
        np.testing.assert_array_equal(slide.read(0, 0, 0, *slide.size_wh), shown)
        np.testing.assert_array_equal(slide.read(0, 31, 43, 100, 80), shown[43:123, 31:131])


def test_a_png_of_400_megapixels_is_read_without_a_word(tmp_path: Path) -> None:
    side = 20000
    row = b"\x00" + b"\x0f" * (side // 8)  # filter 0, then four black and four white pixels in turn
    path = write_png(tmp_path / "bits.png", side, side, 1, row * side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_slide(path) as slide:
            assert slide.size_wh == (side, side)
            region = slide.read(0, 12000, 19990, 16, 10)
            assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own guard is untouched for everybody else
    assert region[9, :, 1].tolist() == [0, 0, 0, 0, 255, 255, 255, 255] * 2


def test_a_png_that_claims_too_much_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APF_MAX_RASTER_GIB", raising=False)
    path = write_png(tmp_path / "bomb.png", 200_000, 200_000, 8, b"\x00" * 100)
    monkeypatch.setenv("APF_MAX_RASTER_GIB", "2")
    assert "200000 x 200000 pixels need 37.3 GiB decoded, more than the 2.0 GiB allowed by APF_MAX_RASTER_GIB" in (
        failure(path)
    )
    with pytest.raises(SlideError, match=r"more than the 3\.0 GiB allowed; convert it to a tiled TIFF"):
        open_slide(path, max_raster_gib=3)
    monkeypatch.delenv("APF_MAX_RASTER_GIB")
    available = memory.available_bytes()
    assert available is not None
    if available < 37 * 2**30:
        assert "GiB of memory available" in failure(path)
    monkeypatch.setenv("APF_MAX_RASTER_GIB", "plenty")
    assert "APF_MAX_RASTER_GIB='plenty' is not a positive number" in failure(path)


def test_memory_limit_of_tiff(tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips are decoded whole, so they count in full; tiles count one at a time."""
    monkeypatch.setenv("APF_MAX_RASTER_GIB", str(150_000 / 2**30))
    tifffile.imwrite(tmp_path / "strips.tif", rgb, photometric="rgb", rowsperstrip=10)
    tifffile.imwrite(tmp_path / "tiles.tif", rgb, photometric="rgb", tile=(64, 64))
    assert "300 x 200 pixels need" in failure(tmp_path / "strips.tif")
    np.testing.assert_array_equal(whole(tmp_path / "tiles.tif", "tifffile"), rgb)


def test_available_memory_is_the_smallest_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.available_bytes()
    assert machine is not None
    assert 2**20 < machine < 2**50
    # A cgroup v2 tree as the kernel lays it out, with a limit on the parent of the process's own group.
    own = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)
    if own[1]:
        pytest.skip("this machine has no unified cgroup hierarchy")
    folder = tmp_path / own[2].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 400000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 900_000
