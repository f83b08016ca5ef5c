"""Directories that do not fit are told: by opening, by building, by the doctor; `strict` refuses them."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.__main__ import main
from data_prep.slides.base import SlideError
from data_prep.slides.fast_tiff import FastSlide
from data_prep.slides.open import open_slide
from tests.helpers.builds import run
from tests.helpers.damaged_slides import retagged
from tests.helpers.slide_files import CMU, TCGA


@pytest.mark.parametrize(
    ("directory", "tag", "new", "said"),
    [
        (1, 273, (273, 4, 48, 2**32 - 1), "the file holds a level of 2221 x 1783 pixels that OpenSlide leaves out"),
        (2, 257, (8449, 3, 1, 1783), "directory 2 of the file has no height"),
        (2, 257, (257, 3, 1, 1700), "directory 2 of the file has 2221 x 1700 pixels, its description says 2221 x 1783"),
        (
            0,
            323,
            (323, 3, 1, 257),
            "directory 0 of the file has tiles of 256 x 257 pixels, its description says 256 x 256",
        ),
    ],
    ids=["thumbnail", "height gone", "height", "tile height"],
)
def test_a_slide_that_lost_a_level(tmp_path: Path, directory: int, tag: int, new: tuple, said: str) -> None:
    path = retagged(TCGA, tmp_path / "x.svs", directory, tag, new)
    with open_slide(path) as slide:
        assert said in slide.faults
    with pytest.raises(SlideError, match=r"x\.svs: ") as caught:
        open_slide(path, strict=True)
    assert str(caught.value) == f"{path}: {slide.faults[0]}"


def test_sound_slides_have_no_faults() -> None:
    for path in (TCGA, CMU):
        with open_slide(path, strict=True) as slide:
            assert slide.faults == () and isinstance(slide, FastSlide)


def test_too_few_tiles_are_refused(tmp_path: Path) -> None:
    path = retagged(TCGA, tmp_path / "x.svs", 0, 323, (323, 3, 1, 1))
    with pytest.raises(SlideError, match="252 tiles are listed for 4443 x 3567 pixels, 64206 are needed"):
        open_slide(path)


def test_a_description_that_is_gone(tmp_path: Path) -> None:
    path = retagged(CMU, tmp_path / "x.svs", 0, 270, (270, 2, 1, 0))
    with open_slide(path) as slide:
        assert "not Aperio's" in slide.faults[0]


def test_tiles_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.svs"
    data = bytearray(TCGA.read_bytes())
    with tifffile.TiffFile(TCGA) as tiff:
        table = tiff.pages[0].tags[324].valueoffset
    struct.pack_into("<I", data, table + 4 * 7, len(data) - 10)
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert slide.faults == ("1 of 252 tiles of 4443 x 3567 pixels lie beyond the end of the file",)


def test_build_and_doctor_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = retagged(TCGA, tmp_path / "x.svs", 1, 273, (273, 4, 48, 2**32 - 1))
    lost = "the file holds a level of 2221 x 1783 pixels that OpenSlide leaves out"
    args = ("build", path, "--out", tmp_path / "out", "--resolution", 256, "--patch", 16, "--length", 64)
    done = run(*args)
    assert done.returncode == 0 and f"warning: x: {lost}" in done.stderr and lost in done.stdout
    done = run(*args, "--strict", "--rebuild")
    assert done.returncode == 1 and f"failed: x: {path}: {lost}" in done.stderr
    assert main(["doctor", str(path), "--jobs", "1"]) == 1
    assert f"error    x.svs: {lost}" in capsys.readouterr().out


def noisy(path: Path, indices: list[int]) -> Path:
    """A copy of CMU with tiles (10 a row) whose JPEG data are noise from a third on, with an intact end."""
    data = bytearray(CMU.read_bytes())
    with tifffile.TiffFile(CMU) as tiff:
        where = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    for index in indices:
        start, count = where[index]
        begin = start + count // 3
        noise = np.random.default_rng(index).integers(0, 255, start + count - 2 - begin, np.uint8)  # no 0xff
        data[begin : start + count - 2] = noise.tobytes()
    path.write_bytes(data)
    return path


def test_damage_in_the_tiles_that_are_compared(tmp_path: Path) -> None:
    """The first and the last tile are among those that both readers are compared on; the other damage is seen too."""
    path = noisy(tmp_path / "x.svs", [0, 57, 129])
    with open_slide(path) as slide, open_slide(path, "openslide") as slow:
        assert slide.reader == "fast"
        np.testing.assert_array_equal(slide.read(0, 0, 0, *slide.size_wh), slow.read(0, 0, 0, *slide.size_wh))
        assert [(tile.x_px, tile.y_px) for tile in slide.damaged] == [(0, 0), (1680, 1200), (2160, 2880)]
        assert slide.damaged == slow.damaged
