"""Slide and mask readers on real slides, on every pixel layout, and on files that cannot be read."""

from __future__ import annotations

import struct
import warnings
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from data_prep import memory
from data_prep.slides import (
    SlideError,
    check_mask_size,
    find_mask,
    find_slides,
    open_mask,
    open_slide,
)

SAMPLES = Path(__file__).parents[2] / "sample_data"
CMU = SAMPLES / "wsi" / "CMU-1-Small-Region.svs"
TCGA = SAMPLES / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs"
KIDNEY = SAMPLES / "glomeruli24" / "images" / "10003.jpg"


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    """A real picture, 200 x 300, neither square nor a multiple of a tile."""
    with Image.open(KIDNEY) as picture:
        return np.asarray(picture)[100:300, 200:500].copy()


def whole(path: Path, reader: str = "auto") -> np.ndarray:
    with open_slide(path, reader) as slide:
        return slide.read(0, 0, 0, *slide.size_wh)


def failure(path: Path, reader: str = "auto") -> str:
    """The one line that opening and reading the file ends with."""
    with pytest.raises(SlideError) as caught:
        whole(path, reader)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def write_png(path: Path, width: int, height: int, bit_depth: int, rows: bytes) -> Path:
    """A gray PNG from its filtered rows; works for sizes that no library would write here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


# ---- real slides


def test_aperio_one_level() -> None:
    with open_slide(CMU) as slide:
        assert (slide.name, slide.reader, slide.size_wh, slide.mpp) == (CMU.stem, "openslide", (2220, 2967), 0.499)
        assert slide.level_sizes_wh == [(2220, 2967)]
        assert slide.level_scale_xy(0) == (1, 1)
        region = slide.read(0, 500, 600, 40, 30)
    assert (region.shape, region.dtype) == ((30, 40, 3), np.uint8)
    assert region.flags.c_contiguous
    np.testing.assert_array_equal(region, whole(CMU)[600:630, 500:540])


def test_pyramid_with_an_odd_factor_has_one_value_per_pixel() -> None:
    """Factor 2.0005: OpenSlide interpolates such a level differently for every region asked for."""
    with open_slide(TCGA) as slide:
        assert slide.mpp is None
        assert slide.level_sizes_wh == [(4443, 3567), (2221, 1783)]
        assert slide.level_scale_xy(1) == (Fraction(4443, 2221), Fraction(3567, 1783))
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
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        with pytest.raises(SlideError, match=r"damaged\.tif: cannot read level 0, region x=260 y=130 w=20 h=20"):
            slide.read(0, 260, 130, 20, 20)
        np.testing.assert_array_equal(slide.read(0, 10, 10, 100, 100), rgb[10:110, 10:110])
    with open_slide(path, "tifffile") as slide:
        with pytest.raises(SlideError, match=r"damaged\.tif: tile or strip 5 cannot be decoded"):
            slide.read(0, 260, 130, 20, 20)
        np.testing.assert_array_equal(slide.read(0, 10, 10, 100, 100), rgb[10:110, 10:110])


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
    for reader, chosen in (("auto", "openslide" if tile else "tifffile"), ("tifffile", "tifffile")):
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
        assert slide.level_scale_xy(1) == (2, Fraction(301, 150))
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


# ---- files that cannot be read


def test_unreadable_slide_names_file_and_region() -> None:
    message = failure(SAMPLES / "wsi" / "unreadable.svs")
    assert "cannot read level 0, region x=0 y=0 w=16 h=16: Bogus marker length" in message


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
    with pytest.raises(ValueError, match="choose from auto, openslide, tifffile, raster"):
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


def test_find_slides_errors(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="nowhere: no such file or folder"):
        find_slides([tmp_path / "nowhere"])
    with pytest.raises(SlideError, match="no slides in this folder"):
        find_slides([tmp_path])


# ---- masks


def mask_values(path: Path) -> np.ndarray:
    with open_mask(path) as mask:
        ids = mask.read(0, 0, *mask.size_wh)
        np.testing.assert_array_equal(mask.read(1, 2, 50, 40), ids[2:42, 1:51])
    assert ids.dtype == np.uint8
    return ids


def test_masks_of_every_kind(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 4, (150, 130), dtype=np.uint8)
    two = (ids > 1).astype(np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    pictures = {
        "gray.png": (Image.fromarray(ids), ids),
        "gray16.png": (Image.fromarray(ids.astype(np.uint16)), ids),
        "palette.png": (palette, ids),
        "bit.png": (Image.fromarray(two.astype(bool)), two),
        "rgb.png": (Image.fromarray(ids[..., None].repeat(3, axis=2)), ids),
        "drawn.png": (Image.fromarray(two * 255), two),
        "drawn_rgba.png": (Image.fromarray(np.dstack([two * 255] * 3 + [np.full_like(ids, 255)])), two),
        "la.png": (Image.fromarray(np.dstack([ids, np.full_like(ids, 255)])), ids),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(mask_values(tmp_path / name), expected, err_msg=name)
    arrays = {
        "ids": (ids, {"photometric": "minisblack"}, ids),
        "drawn": (two * 255, {"photometric": "minisblack"}, two),
        "bit": (two.astype(bool), {"photometric": "minisblack"}, two),
        "bit_inverted": (~two.astype(bool), {"photometric": "miniswhite"}, two),
        "ids16": (ids.astype(np.uint16), {"photometric": "minisblack"}, ids),
        "colours": (ids, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, ids),
    }
    for name, (array, options, expected) in arrays.items():
        for tile in (None, (64, 32)):
            for compression in (None, "deflate", "lzw"):
                path = tmp_path / f"{name}.tif"
                tifffile.imwrite(path, array, tile=tile, compression=compression, metadata=None, **options)
                np.testing.assert_array_equal(mask_values(path), expected, err_msg=f"{name} {tile} {compression}")


def test_255_is_an_id_where_other_ids_are_present(tmp_path: Path) -> None:
    """The rule looks at the whole mask: a corner that happens to hold only 0 and 255 keeps its 255."""
    ids = np.zeros((5000, 2100), np.uint8)
    ids[:100] = 255
    ids[4999, 2099] = 7
    tifffile.imwrite(tmp_path / "x.tif", ids, tile=(256, 256), compression="deflate")
    with open_mask(tmp_path / "x.tif") as mask:
        assert mask.read(0, 0, 1, 1)[0, 0] == 255
    ids[4999, 2099] = 0
    tifffile.imwrite(tmp_path / "x.tif", ids, tile=(256, 256), compression="deflate")
    with open_mask(tmp_path / "x.tif") as mask:
        assert mask.read(0, 0, 1, 1)[0, 0] == 1


def test_bad_masks(tmp_path: Path, rgb: np.ndarray) -> None:
    def mask_error(path: Path) -> str:
        with pytest.raises(SlideError) as caught, open_mask(path) as mask:
            mask.read(0, 0, *mask.size_wh)
        assert str(path) in str(caught.value)
        return str(caught.value)

    Image.fromarray(rgb).save(tmp_path / "colour.png")
    assert "a colour picture, not a mask" in mask_error(tmp_path / "colour.png")
    Image.fromarray(np.full((9, 9), 300, np.uint16)).save(tmp_path / "large.png")
    assert "class id 300 is larger than 255" in mask_error(tmp_path / "large.png")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((9, 9), np.float32))
    assert "no fixed range" in mask_error(tmp_path / "float.tif")
    assert "must be lossless" in mask_error(KIDNEY)
    assert "no such mask file" in mask_error(tmp_path / "none.png")
    (tmp_path / "text.tif").write_text("nothing")
    assert "not a readable TIFF" in mask_error(tmp_path / "text.tif")


def test_find_mask_and_its_size(tmp_path: Path) -> None:
    masks = SAMPLES / "glomeruli24" / "masks"
    path = find_mask(KIDNEY, masks)
    assert path == masks / "10003.png"
    assert find_mask(CMU, masks) is None
    with pytest.raises(SlideError, match="no such folder of masks"):
        find_mask(KIDNEY, tmp_path / "none")
    Image.new("L", (30, 20)).save(tmp_path / "10003.PNG")
    found = find_mask(KIDNEY, tmp_path)
    assert found is not None
    with open_slide(KIDNEY) as slide, open_mask(path) as right, open_mask(found) as wrong:
        check_mask_size(slide, right)
        with pytest.raises(SlideError, match=r"mask is 30 x 20 pixels, its slide 10003\.jpg is 1024 x 1024"):
            check_mask_size(slide, wrong)
    (tmp_path / "10003.tif").touch()
    with pytest.raises(SlideError, match=r"several masks for 10003\.jpg: 10003\.PNG, 10003\.tif"):
        find_mask(KIDNEY, tmp_path)
