"""`python -m data_prep convert`: ids survive exactly, OpenSlide agrees, memory is bounded, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from data_prep.__main__ import main
from data_prep.masks.convert import convert_mask, level_sizes, plan
from data_prep.masks.masks import open_mask
from data_prep.slides.base import SlideError
from data_prep.slides.open import open_slide
from data_prep.token_files.token_file import read_tokens, token_path
from tests.helpers.annotations import image_scope, layer, region, square
from tests.helpers.repository import GLOMERULI, ROOT
from tests.helpers.slide_files import CMU, KIDNEY


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blobs of ids 0 to 3, with single pixels between them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (-(-height // 37), -(-width // 41)), dtype=np.uint8)
    ids = ids.repeat(37, axis=0).repeat(41, axis=1)[:height, :width].copy()
    ids[rng.integers(0, height, 200), rng.integers(0, width, 200)] = 3
    return ids


def read(path: Path) -> np.ndarray:
    with open_mask(path) as mask:
        return mask.read(0, 0, *mask.size_wh)


@pytest.mark.parametrize("rows", [1, 7, 512, 700, 1300])
def test_strips_of_any_height(tmp_path: Path, rows: int) -> None:
    ids = picture(1300, 900)
    tifffile.imwrite(tmp_path / "a.tif", ids, rowsperstrip=rows, compression="lzw", metadata=None)
    assert main(["convert", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out")]) == 0
    made = tmp_path / "out" / "a.tif"
    np.testing.assert_array_equal(read(made), ids)
    with tifffile.TiffFile(made) as tiff:
        assert tiff.is_bigtiff
        assert [page.shape for page in tiff.pages] == [(1300, 900), (650, 450), (325, 225)]
        assert [page.subfiletype for page in tiff.pages] == [0, 1, 1]
        assert {(page.tilewidth, page.tilelength, page.compression) for page in tiff.pages} == {(512, 512, 8)}
        for k, page in enumerate(tiff.pages):
            at = (2 * np.arange(page.shape[0]) + 1) * 1300 // (2 * page.shape[0])
            across = (2 * np.arange(page.shape[1]) + 1) * 900 // (2 * page.shape[1])
            np.testing.assert_array_equal(page.asarray(), ids[at][:, across], err_msg=f"level {k}")


def test_openslide_reads_the_same_ids_at_every_level(tmp_path: Path) -> None:
    ids = picture(2300, 1300)
    tifffile.imwrite(tmp_path / "CMU-1.tif", ids)
    tifffile.imwrite(
        tmp_path / "CMU-1.svs",
        ids.repeat(3).reshape(2300, 1300, 3),
        tile=(256, 256),
        photometric="rgb",
        resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
    )
    slides = tmp_path / "slides"
    slides.mkdir()
    (tmp_path / "CMU-1.svs").rename(slides / "cmu-1.tif")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "CMU-1.tif"), "--out", str(out), "--slides", str(slides)]) == 0
    with openslide.OpenSlide(out / "CMU-1.tif") as slide:
        assert slide.level_dimensions == ((1300, 2300), (650, 1150), (325, 575), (162, 287))
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        with tifffile.TiffFile(out / "CMU-1.tif") as tiff:
            for level, size in enumerate(slide.level_dimensions):
                seen = np.asarray(slide.read_region((0, 0), level, size))
                np.testing.assert_array_equal(seen[..., 0], tiff.pages[level].asarray())
        np.testing.assert_array_equal(np.asarray(slide.read_region((0, 0), 0, (1300, 2300)))[..., 1], ids)


def test_every_kind_of_picture(tmp_path: Path) -> None:
    """Drawn 0 / 255, one bit, palette, 16 bit, turned, tiled: as `open_mask` reads them."""
    ids = picture(600, 800)
    two = (ids > 1).astype(np.uint8)
    folder = tmp_path / "masks"
    folder.mkdir()
    Image.fromarray(two * 255).save(folder / "drawn.png")
    tifffile.imwrite(folder / "strips.tif", two * 255, rowsperstrip=16)
    tifffile.imwrite(folder / "bits.TIF", two.astype(bool), photometric="miniswhite", rowsperstrip=100)
    tifffile.imwrite(folder / "deep.tiff", ids.astype(np.uint16), rowsperstrip=100, compression="deflate")
    tifffile.imwrite(folder / "turned.tif", ids, rowsperstrip=16, extratags=[(274, "H", 1, 6, True)])
    tifffile.imwrite(folder / "tiled.tif", ids, tile=(128, 64))
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 0
    for path in sorted(folder.iterdir()):
        np.testing.assert_array_equal(read(tmp_path / "out" / f"{path.stem}.tif"), read(path), err_msg=path.name)
    assert read(tmp_path / "out" / "turned.tif").shape == (800, 600)
    assert read(tmp_path / "out" / "drawn.tif").max() == 1


SLIDES = str(GLOMERULI / "images")


@pytest.fixture
def polygons(tmp_path: Path) -> Path:
    """An XML file of two classes, the second with a hole."""
    (tmp_path / "masks").mkdir()
    return image_scope(
        tmp_path / "masks" / "10003.xml",
        layer(1, region(square(100.25, 50.5, 700))),
        layer(2, region(square(300, 200, 300)), region(square(350, 250, 90), True)),
    )


def test_polygons_are_drawn_as_they_are_read(
    polygons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_slide(KIDNEY) as slide:
        size_wh = slide.size_wh
    assert main(["convert", str(polygons.parent), "--out", str(tmp_path / "no")]) == 1
    assert f"{polygons}: polygons do not say how large their slide is" in capsys.readouterr().err
    assert main(["convert", str(polygons.parent), "--out", str(tmp_path / "out"), "--slides", SLIDES]) == 0
    with open_mask(polygons, size_wh) as mask:
        np.testing.assert_array_equal(read(tmp_path / "out" / "10003.tif"), mask.read(0, 0, *size_wh))


def test_a_kind_or_classes_of_polygons_can_be_chosen(polygons: Path, tmp_path: Path) -> None:
    viable = ["--out", str(tmp_path / "viable"), "--mask-kind", "viable"]
    assert main(["convert", str(polygons), "--slides", SLIDES, *viable]) == 0
    assert read(tmp_path / "viable" / "10003.tif").sum() == 300 * 300 - 90 * 90
    chosen = ["--class", "1=4", "--class", "2=none"]
    assert main(["convert", str(polygons), "--out", str(tmp_path / "four"), "--slides", SLIDES, *chosen]) == 0
    assert set(np.unique(read(tmp_path / "four" / "10003.tif"))) == {0, 4}


def test_builds_with_polygons_and_with_their_converted_mask_give_the_same_masks(polygons: Path, tmp_path: Path) -> None:
    assert main(["convert", str(polygons.parent), "--out", str(tmp_path / "out"), "--slides", SLIDES]) == 0
    tree = ["--resolution", "512", "--patch", "16", "--length", "64", "--classes", "2"]
    for name, folder in (("a", polygons.parent), ("b", tmp_path / "out")):
        assert main(["build", str(KIDNEY), "--masks", str(folder), "--out", str(tmp_path / name), *tree]) == 0
    a, b = (read_tokens(token_path(tmp_path / name, "10003"))[0].mask_counts for name in "ab")
    assert a is not None and b is not None and (a.sum(axis=(0, 1, 2)) > 10_000).all()
    np.testing.assert_array_equal(a, b)


def test_builds_of_whole_and_viable_tumour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PAIP's two files as one class each or as two classes; in one region or many; and the choice is remembered."""
    masks, out = tmp_path / "masks", tmp_path / "t"
    masks.mkdir()
    ids = np.zeros((1024, 1024), np.uint8)
    ids[100:800, 64:900] = 1
    tifffile.imwrite(masks / "10003_WHOLE.tif", ids)
    ids[:300] = 0
    tifffile.imwrite(masks / "10003_viable.TIF", ids)
    whole, viable = 700 * 836, 500 * 836
    command = ["build", str(KIDNEY), "--masks", str(masks), "--out", str(out)]
    command += ["--resolution", "1024", "--patch", "16", "--length", "64", "--classes", "2"]
    assert main(command) == 1
    assert "10003_WHOLE.tif, 10003_viable.TIF; choose with --mask-kind" in capsys.readouterr().out
    for tile in ([], ["--tile", "256"]):
        for kind, sums in (("whole", [whole, 0]), ("viable", [viable, 0]), ("both", [whole - viable, viable])):
            assert main([*command, "--mask-kind", kind, *tile]) == 0
            token_set, meta = read_tokens(token_path(out, "10003"))
            assert token_set.mask_counts is not None
            assert token_set.mask_counts.sum(axis=(0, 1, 2)).tolist() == sums == meta["mask_pixels"]
            assert main([*command, "--mask-kind", kind]) == 0
            assert "1 skipped" in capsys.readouterr().out
    assert (
        main(
            [
                "inspect",
                str(KIDNEY),
                "--masks",
                str(masks),
                "--mask-kind",
                "both",
                "--classes",
                "2",
                "--out",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    assert main(["verify", str(out)]) == 0
    assert main([*command[:2], *command[4:], "--mask-kind", "both"]) == 64
    assert "only with --masks" in capsys.readouterr().err


def test_what_is_complete_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.tif", tmp_path / "out"
    tifffile.imwrite(source, picture(700, 600))
    command = ["convert", str(source), "--out", str(out)]
    assert main(command) == 0
    made = out / "a.tif"
    first = made.read_bytes()
    stamp = made.stat().st_mtime_ns
    assert main(command) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert made.stat().st_mtime_ns == stamp
    made.write_bytes(first[: len(first) // 2])
    assert main(command) == 0
    assert made.read_bytes() == first, "the same bytes from the same mask"
    tifffile.imwrite(source, picture(700, 600, seed=1))
    assert main(command) == 0
    np.testing.assert_array_equal(read(made), picture(700, 600, seed=1))


def test_nothing_is_left_of_a_mask_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "in" / "good.tif", tmp_path / "in" / "bad.tif"
    good.parent.mkdir()
    tifffile.imwrite(good, picture(900, 600), rowsperstrip=50)
    tifffile.imwrite(bad, picture(900, 600), rowsperstrip=50, compression="deflate")
    with tifffile.TiffFile(bad) as tiff:
        at = tiff.pages[0].dataoffsets[12]
    raw = bytearray(bad.read_bytes())
    raw[at : at + 40] = bytes(40)
    bad.write_bytes(raw)
    out = tmp_path / "out"
    assert main(["convert", str(good.parent), "--out", str(out)]) == 1
    streams = capsys.readouterr()
    assert f"error: {bad}: tile or strip 12 cannot be decoded" in streams.err
    assert "1 converted, 1 failed" in streams.out
    assert [path.name for path in out.iterdir()] == ["good.tif"]


_LIMITED = """
import resource, sys
from data_prep.__main__ import main
from data_prep.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The system refuses the write half way, as a full disk does: one line, and only the old file is there."""
    source, out = tmp_path / "a.tif", tmp_path / "out"
    tifffile.imwrite(source, picture(70, 60))
    assert main(["convert", str(source), "--out", str(out)]) == 0
    before = (out / "a.tif").read_bytes()
    tifffile.imwrite(source, picture(2000, 2000))
    command = [sys.executable, "-c", _LIMITED, "convert", str(source), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"{out / 'a.tif'}" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["a.tif"]
    assert (out / "a.tif").read_bytes() == before


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == 64
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    source, out = tmp_path / "a.tif", tmp_path / "out"
    assert "no such file or folder" in complaint(source, "--out", out)
    assert "no masks in this folder" in complaint(tmp_path, "--out", out)
    tifffile.imwrite(source, picture(70, 60))
    assert "must be NAME=ID" in complaint(source, "--out", out, "--class", "Tumor")
    assert "must be NAME=ID" in complaint(source, "--out", out, "--class", "Tumor=256")
    assert "replaced by its own conversion" in complaint(source, "--out", tmp_path)
    assert "no such folder of slides" in complaint(source, "--out", out, "--slides", tmp_path / "none")
    Image.fromarray(picture(70, 60)).save(tmp_path / "A.png")
    assert "and so would" in complaint(tmp_path, "--out", out)
    assert not out.exists()


def test_a_mask_of_another_size_than_its_slide(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / f"{CMU.stem}_whole.tif", picture(70, 60))
    (job,) = plan([tmp_path], tmp_path / "out", CMU.parent)
    assert job.slide == CMU
    with pytest.raises(SlideError, match=r"mask is 60 x 70 pixels, its slide CMU-1-Small-Region\.svs is 2220 x 2967"):
        convert_mask(job)


def test_level_sizes() -> None:
    assert level_sizes((65536, 65536))[-1] == (512, 512)
    assert len(level_sizes((65536, 65536))) == 8
    assert level_sizes((4000, 1)) == [(4000, 1), (2000, 1), (1000, 1), (500, 1)]
    assert level_sizes((512, 512)) == [(512, 512)]


_MEASURE = """
import resource, sys
from pathlib import Path
from data_prep.masks.convert import convert_mask, plan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(job,) = plan([Path(sys.argv[1])], Path(sys.argv[2]), None)
convert_mask(job)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_mask(tmp_path: Path) -> None:
    """A mask of 128 MiB in strips of 64 rows is converted in less than half of that."""
    band = picture(64, 16384)
    tifffile.imwrite(
        tmp_path / "a.tif",
        (zlib.compress(band) for _ in range(128)),
        shape=(8192, 16384),
        dtype=np.uint8,
        rowsperstrip=64,
        compression="adobe_deflate",
        metadata=None,
    )
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "a.tif"), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 64 * 2**20
    with open_mask(tmp_path / "out" / "a.tif") as mask:
        np.testing.assert_array_equal(mask.read(0, 8128, 16384, 64), band)
