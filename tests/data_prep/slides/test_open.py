"""Slide readers on real slides, TIFF layouts and files that cannot be read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep.inspect.doctor import slides_of
from data_prep.masks.masks import find_masks
from data_prep.slides.base import SlideError
from data_prep.slides.open import find_slides, open_slide
from tests.helpers.repository import WSI
from tests.helpers.slide_files import CMU, KIDNEY, TCGA, failure, whole

# ---- real slides


def test_aperio_one_level() -> None:
    with open_slide(CMU) as slide:
        assert (slide.name, slide.reader, slide.size_wh, slide.mpp) == (CMU.stem, "fast", (2220, 2967), 0.499)
        assert slide.level_sizes_wh == [(2220, 2967)]
        region = slide.read(0, 500, 600, 40, 30)
    assert (region.shape, region.dtype) == ((30, 40, 3), np.uint8)
    assert region.flags.c_contiguous
    np.testing.assert_array_equal(region, whole(CMU)[600:630, 500:540])


def test_pyramid_with_an_odd_factor_has_one_value_per_pixel() -> None:
    """Factor 2.0005: OpenSlide interpolates such a level differently for every region asked for."""
    with open_slide(TCGA) as slide:
        assert slide.mpp is None
        assert slide.level_sizes_wh == [(4443, 3567), (2221, 1783)]
        level_1 = slide.read(1, 0, 0, 2221, 1783)
        for x, y, w, h in [(1000, 900, 100, 50), (1023, 1023, 2, 2), (2220, 1782, 1, 1), (7, 1600, 2000, 20)]:
            np.testing.assert_array_equal(slide.read(1, x, y, w, h), level_1[y : y + h, x : x + w])
        level_0 = slide.read(0, 0, 0, 4442, 3566).reshape(1783, 2, 2221, 2, 3).mean(axis=(1, 3))
    inner = (slice(900, 1300), slice(900, 1300))  # four chunks meet here; the shift is largest
    errors = {
        (x, y): float(np.abs(np.roll(level_1, (y, x), axis=(0, 1))[inner] - level_0[inner]).mean())
        for x in (-1, 0, 1)
        for y in (-1, 0, 1)
    }
    assert min(errors, key=errors.__getitem__) == (0, 0)  # the same picture at half the size, nowhere a pixel off
    assert errors[0, 0] < 0.7 * sorted(errors.values())[1]


def test_the_same_pixels_through_tifffile() -> None:
    assert np.abs(whole(CMU, "tifffile").astype(int) - whole(CMU)).max() <= 2  # two JPEG decoders


@pytest.mark.parametrize(
    "where", [(0, -1, 0, 5, 5), (0, 0, 0, 2221, 1), (0, 0, 0, 0, 1), (1, 0, 0, 1, 1), (-1, 0, 0, 1, 1)]
)
def test_regions_outside_the_slide_are_refused(where: tuple[int, int, int, int, int]) -> None:
    with open_slide(CMU) as slide, pytest.raises(SlideError, match=r"not inside the 2220 x 2967|has no level"):
        slide.read(*where)


def test_reading_after_close_is_an_error() -> None:
    for path in (CMU, KIDNEY):
        with open_slide(path) as slide:
            pass
        with pytest.raises(SlideError, match="after close"):
            slide.read(0, 0, 0, 1, 1)


def test_a_handle_that_failed_is_replaced(tmp_path: Path, rgb: np.ndarray) -> None:
    """OpenSlide's errors end the handle: after a damaged tile the sound ones must still be readable."""
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, rgb, tile=(128, 128), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    with open_slide(path, "openslide", strict=True) as slide:
        with pytest.raises(SlideError, match=r"damaged\.tif: cannot read level 0, region x=260 y=130 w=20 h=20"):
            slide.read(0, 260, 130, 20, 20)
        np.testing.assert_array_equal(slide.read(0, 10, 10, 100, 100), rgb[10:110, 10:110])
    with open_slide(path, "tifffile", strict=True) as slide:
        with pytest.raises(SlideError, match=r"damaged\.tif: tile or strip 5 cannot be decoded"):
            slide.read(0, 260, 130, 20, 20)
        np.testing.assert_array_equal(slide.read(0, 10, 10, 100, 100), rgb[10:110, 10:110])


@pytest.mark.parametrize("reader", ["auto", "openslide", "tifffile"])
def test_a_damaged_tile_is_white_and_noted(tmp_path: Path, rgb: np.ndarray, reader: str) -> None:
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, rgb, tile=(128, 128), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        across = -(-rgb.shape[1] // 128)
        at = tiff.pages[0].dataoffsets[across + 2]
    data = bytearray(path.read_bytes())
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    expected = rgb.copy()
    expected[128:256, 256:384] = 255
    tile = (0, 256, 128, min(128, rgb.shape[1] - 256), min(128, rgb.shape[0] - 128))
    with open_slide(path, reader) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 100, 100), rgb[:100, :100])
        assert slide.damaged == []
        np.testing.assert_array_equal(slide.read(0, 0, 0, *slide.size_wh), expected)
        assert slide.damaged == [tile]
        np.testing.assert_array_equal(slide.read(0, 260, 130, 20, 20), expected[130:150, 260:280])
        assert slide.damaged == [tile]


# ---- TIFF layouts


@pytest.mark.parametrize("tile", [None, (64, 96), (256, 256)])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("separate", [False, True])
def test_tiff_rgb(
    tmp_path: Path, rgb: np.ndarray, tile: tuple[int, int] | None, compression: str | None, separate: bool
) -> None:
    path = tmp_path / "a.tif"
    data = np.ascontiguousarray(rgb.transpose(2, 0, 1)) if separate else rgb
    options = {"tile": tile} if tile else {"rowsperstrip": 33}
    tifffile.imwrite(
        path,
        data,
        photometric="rgb",
        planarconfig="separate" if separate else "contig",
        compression=compression,
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
        **options,
    )
    best = ("openslide" if separate else "fast") if tile else "tifffile"
    for reader, chosen in (("auto", best), ("tifffile", "tifffile")):
        with open_slide(path, reader) as slide:
            assert slide.reader == chosen
            assert slide.size_wh == (300, 200)
            assert slide.mpp == 0.25
            np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), rgb)
            np.testing.assert_array_equal(slide.read(0, 61, 97, 40, 33), rgb[97:130, 61:101])


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_tiff_pixel_types(tmp_path: Path, rgb: np.ndarray, tile: tuple[int, int] | None) -> None:
    gray = rgb[..., 0]
    three = gray[..., None].repeat(3, axis=2)
    alpha = np.linspace(0, 255, 300).astype(np.uint8)[None].repeat(200, axis=0)
    colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    blend = np.floor((rgb * (alpha[..., None] / 255)) + (255 - alpha[..., None]) + 0.5)
    cases: dict[str, tuple[np.ndarray, dict[str, object], np.ndarray]] = {
        "gray8": (gray, {"photometric": "minisblack"}, three),
        "inverted": (255 - gray, {"photometric": "miniswhite"}, three),
        "gray16": (gray.astype(np.uint16) * 256 + 200, {"photometric": "minisblack"}, three),
        "rgb16": (rgb.astype(np.uint16) * 256 + 255, {"photometric": "rgb"}, rgb),
        "bit": (gray > 128, {"photometric": "minisblack"}, (three > 128) * 255),
        "palette": (gray, {"photometric": "palette", "colormap": colours}, (colours >> 8).T[gray]),
        "alpha": (np.dstack([rgb, alpha]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, blend),
        "cmyk": (np.dstack([255 - rgb, np.zeros_like(gray)]), {"photometric": "separated"}, rgb),
    }
    for name, (stored, options, shown) in cases.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, stored, tile=tile, metadata=None, **options)
        for reader in ("auto", "tifffile"):
            got = whole(path, reader)
            assert got.shape == (200, 300, 3), name
            premultiplied = reader == "auto" and name == "alpha"  # by OpenSlide, in 8 bits
            assert np.abs(got.astype(int) - shown).max() <= (1 if premultiplied else 0), (name, reader)


def test_tiff_pyramid_without_openslide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 65536, (h, w), dtype=np.uint16) for w, h in ((500, 301), (250, 150), (125, 75))]
    label = rng.integers(0, 65536, (80, 70), dtype=np.uint16)  # no level: another shape
    with tifffile.TiffWriter(tmp_path / "p.tif") as tiff:
        for i, page in enumerate([*levels, label]):
            tiff.write(page, tile=(64, 64), photometric="minisblack", metadata=None, subfiletype=int(i > 0))
    with open_slide(tmp_path / "p.tif") as slide:
        assert (slide.reader, slide.level_sizes_wh) == ("tifffile", [(500, 301), (250, 150), (125, 75)])
        assert slide.tile_wh(1) == (64, 64)
        np.testing.assert_array_equal(slide.read(1, 100, 20, 70, 90)[..., 2], levels[1][20:110, 100:170] >> 8)


def test_tiff_tiles_left_out_are_white(tmp_path: Path) -> None:
    tile = np.full((64, 64, 3), 9, np.uint8)
    for photometric in ("rgb", "miniswhite"):
        data = tile if photometric == "rgb" else tile[..., 0]
        tiles = (data if i == 0 else None for i in range(4))
        path = tmp_path / f"{photometric}.tif"
        shape = (128, 128, 3) if photometric == "rgb" else (128, 128)
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(tiles, shape=shape, dtype="u1", tile=(64, 64), photometric=photometric, compression="deflate")
        got = whole(path, "tifffile")
        assert (got[:64, :64] == (9 if photometric == "rgb" else 246)).all()
        assert (got[64:] == 255).all()


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint32"])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_tiff_types_without_a_range_are_refused(tmp_path: Path, dtype: str, tile: tuple[int, int] | None) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((80, 90), dtype), tile=tile, photometric="minisblack")
    assert "no fixed range" in failure(tmp_path / "x.tif")


def test_tiff_stack_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 80, 90), np.uint8), photometric="minisblack")
    assert "a stack with axes" in failure(tmp_path / "x.tif")


def test_tiff_that_only_pillow_decodes(tmp_path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).convert("YCbCr").save(tmp_path / "x.tif", compression="tiff_lzw")
    with open_slide(tmp_path / "x.tif") as slide:
        assert slide.reader == "raster"
        assert np.abs(slide.read(0, 0, 0, 300, 200).astype(int) - rgb).max() <= 3


def test_a_printers_resolution_is_no_mpp(tmp_path: Path, rgb: np.ndarray) -> None:
    for dpi, expected in ((72, None), (300, None), (0, None), (50800, 0.5)):
        for tile in (None, (64, 64)):
            path = tmp_path / "x.tif"
            tifffile.imwrite(path, rgb, tile=tile, photometric="rgb", resolution=(dpi, dpi), resolutionunit="INCH")
            with open_slide(path, "tifffile") as slide:
                assert slide.mpp == expected
            with open_slide(path) as slide:
                assert slide.mpp == expected


# ---- files that cannot be read


def test_unreadable_slide_names_file_and_region() -> None:
    message = failure(WSI / "unreadable.svs")
    assert "cannot read level 0, region x=0 y=0 w=64 h=64: Bogus marker length" in message


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.99])
@pytest.mark.parametrize("source", [CMU, TCGA])
@pytest.mark.parametrize("suffix", [".svs", ".tif"])
def test_truncated_slide(tmp_path: Path, source: Path, keep: float, suffix: str) -> None:
    data = source.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * keep)])
    assert "truncated" in failure(path)


@pytest.mark.parametrize("options", [{"rowsperstrip": 16}, {"rowsperstrip": 16, "compression": "lzw"}])
def test_truncated_strips(tmp_path: Path, rgb: np.ndarray, options: dict[str, object]) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", **options)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "truncated TIFF: pixels reach to byte" in failure(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_picture_is_never_gray(tmp_path: Path, rgb: np.ndarray, suffix: str, keep: float) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    failure(path)


def test_damaged_png(tmp_path: Path, rgb: np.ndarray) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(rgb).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert "damaged or truncated image" in failure(path)
    path.write_bytes(path.read_bytes()[:-12])
    assert "without an IEND chunk" in failure(path)


def test_files_that_are_no_slides(tmp_path: Path) -> None:
    archive = tmp_path / "archive.svs"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("slide.txt", "x" * 5000)
    assert failure(archive).endswith("not a slide that can be read: it is a zip archive")
    text = tmp_path / "text.tif"
    text.write_text("not a picture\n" * 50)
    assert failure(text).endswith("it is no image format known here")
    empty = tmp_path / "empty.svs"
    empty.touch()
    assert failure(empty).endswith("the file is empty")
    assert failure(tmp_path).endswith("a folder, not a slide")
    assert failure(tmp_path / "nothing.svs").endswith("no such file")
    assert "OpenSlide cannot open it" in failure(KIDNEY, "openslide")
    assert "not a readable TIFF" in failure(KIDNEY, "tifffile")
    with pytest.raises(ValueError, match="choose from auto, fast, openslide, tifffile, raster"):
        open_slide(CMU, "vips")


def test_a_header_alone_is_an_error(tmp_path: Path) -> None:
    for name, head in {
        "a.tif": b"II*\x00\x08\x00\x00\x00",
        "b.tif": b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(50),
        "c.svs": b"II+\x00\x08\x00\x00\x00" + bytes(8),
        "d.jpg": b"\xff\xd8\xff\xe0",
        "e.png": b"\x89PNG\r\n\x1a\n",
    }.items():
        (tmp_path / name).write_bytes(head)
        failure(tmp_path / name)


# ---- finding slides


def test_find_slides(tmp_path: Path) -> None:
    for name in ("b.svs", "a.SVS", "c.tif", "notes.txt", ".hidden.svs"):
        (tmp_path / name).touch()
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "odd.name").touch()
    assert [p.name for p in find_slides([tmp_path])] == ["a.SVS", "b.svs", "c.tif"]
    assert [p.name for p in find_slides([tmp_path, tmp_path / "odd.name", tmp_path / "b.svs"])] == [
        "a.SVS",
        "b.svs",
        "c.tif",
        "odd.name",
    ]
    (tmp_path / "b.png").touch()
    with pytest.raises(SlideError, match=r"b\.svs: same name as .*b\.png"):
        find_slides([tmp_path])


def test_masks_beside_their_slides_are_no_slides(tmp_path: Path) -> None:
    """PAIP comes with slides, XML and both masks in one folder; a slide is not its own mask either."""
    for name in ("01.SVS", "01.xml", "01_whole.tif", "01_VIABLE.TIF", "02_whole.tif", "03.tif", "x_whole.svs"):
        (tmp_path / name).touch()
    assert [p.name for p in find_slides([tmp_path])] == ["01.SVS", "02_whole.tif", "03.tif", "x_whole.svs"]
    assert [p.name for p in slides_of([tmp_path])] == ["01.SVS", "02_whole.tif", "03.tif", "x_whole.svs"]
    assert find_slides([tmp_path / "01_whole.tif"]) == [tmp_path / "01_whole.tif"]  # as given
    assert find_masks(tmp_path / "03.tif", tmp_path) == []
    (tmp_path / "03.geojson").touch()
    assert find_masks(tmp_path / "03.tif", tmp_path) == [tmp_path / "03.geojson"]
    assert [p.name for p in find_masks(tmp_path / "01.SVS", tmp_path, "both")] == ["01_whole.tif", "01_VIABLE.TIF"]


def test_find_slides_errors(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="nowhere: no such file or folder"):
        find_slides([tmp_path / "nowhere"])
    with pytest.raises(SlideError, match="no slides in this folder"):
        find_slides([tmp_path])
