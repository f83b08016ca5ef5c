"""The maker of test slides: pure function of place, a pyramid that OpenSlide reads, the same bytes for a seed."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.masks.masks import open_mask
from data_prep.slides.open import open_slide
from data_prep.synth.pictures import BACKGROUND, SynthSlide
from data_prep.synth.tiff import level_sizes, write_slide
from tests.helpers.builds import command, plain_env
from tests.helpers.repository import ROOT

SLIDE = SynthSlide((3000, 2500), seed=3, tissue=0.4)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("synth")
    write_slide(SLIDE, folder / "x.tif", folder / "m.tif", tile_px=256, mpp=0.25)
    return folder / "x.tif", folder / "m.tif"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2600), st.integers(0, 2100), st.integers(1, 400), st.integers(1, 400))
def test_a_pixel_is_the_same_whatever_asked_for_it(x: int, y: int, w: int, h: int):
    rgb, ids = SLIDE.tile(x, y, w, h)
    around, ids_around = SLIDE.tile(max(0, x - 700), max(0, y - 300), w + 900, h + 500)
    a, b = x - max(0, x - 700), y - max(0, y - 300)
    np.testing.assert_array_equal(rgb, around[b : b + h, a : a + w])
    np.testing.assert_array_equal(ids, ids_around[b : b + h, a : a + w])
    if SLIDE.is_background(x, y, w, h):
        assert (rgb == BACKGROUND).all() and not ids.any()


@pytest.mark.parametrize(("seed", "tissue"), [(0, 0.35), (1, 0.35), (2, 0.1), (3, 0.8)])
def test_share_of_tissue(seed: int, tissue: float):
    slide = SynthSlide((65536, 65536), seed, tissue)
    rng = np.random.default_rng(0)
    inside = [float(slide._outline(int(x), int(y), 1, 1)[0, 0]) > 0 for x, y in rng.integers(0, 65536, (4000, 2))]
    assert abs(np.mean(inside) - tissue) < 0.03


def test_openslide_reads_a_pyramid_and_its_mask(files: tuple[Path, Path]):
    slide = openslide.OpenSlide(files[0])
    assert list(slide.level_dimensions) == level_sizes(SLIDE.size_wh) == [(3000, 2500), (1500, 1250)]
    assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == 0.25
    shown = np.asarray(slide.read_region((0, 0), 0, SLIDE.size_wh).convert("RGB")).astype(int)
    made, ids = SLIDE.tile(0, 0, *SLIDE.size_wh)
    assert np.abs(shown - made).mean() < 4  # JPEG
    half = np.asarray(slide.read_region((0, 0), 1, (1500, 1250)).convert("RGB")).astype(int)
    assert np.abs(half - made.reshape(1250, 2, 1500, 2, 3).mean((1, 3))).mean() < 4
    with open_slide(files[0]) as ours, open_mask(files[1]) as mask:
        assert ours.reader == "fast" and ours.size_wh == mask.size_wh
        np.testing.assert_array_equal(mask.read(0, 0, *mask.size_wh), ids)
    with tifffile.TiffFile(files[1]) as tiff:
        np.testing.assert_array_equal(tiff.pages[1].asarray(), ids[::2, ::2])
    assert 0.002 < ids.mean() < 0.2 and set(np.unique(ids)) == {0, 1}


def test_a_seed_is_its_bytes(files: tuple[Path, Path], tmp_path: Path):
    write_slide(SLIDE, tmp_path / "x.tif", tmp_path / "m.tif", tile_px=256, mpp=0.25)
    assert (tmp_path / "x.tif").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "m.tif").read_bytes() == files[1].read_bytes()
    other = SynthSlide(SLIDE.size_wh, seed=4, tissue=0.4)
    assert not np.array_equal(other.tile(0, 0, 3000, 2500)[0], SLIDE.tile(0, 0, 3000, 2500)[0])


def test_command(tmp_path: Path, capsys):
    out = tmp_path / "new" / "x.tif"
    args = ["synth", "--size", "1024,700", "--out", str(out), "--mask-out", str(tmp_path / "m.tif")]
    assert main(args) == 0
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"x.tif", "m.tif"}
    assert main(args) == 64 and "is there already; --force" in capsys.readouterr().err
    assert main([*args, "--force", "--seed", "9"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "100"], "sides must be 256"),
        (["--tissue", "2"], "must be 0.01 to 0.95"),
        (["--tile", "100"], "multiple of 16"),
        (["--quality", "0"], "quality must be 1 to 100"),
        (["--seed", "-1"], "seed -1"),
        (["--out", "x.svs"], "must end in .tif"),
        (["--out", "/proc/x.tif"], "/proc/"),
    ],
)
def test_bad_arguments(more: list[str], words: str, tmp_path: Path, capsys):
    code = main(["synth", "--size", "512", "--out", str(tmp_path / "x.tif"), *more])
    err = capsys.readouterr().err
    assert code in (1, 64) and words in err and err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_leaves_nothing(tmp_path: Path):
    process = subprocess.Popen(
        command("synth", "--size", "30000", "--out", tmp_path / "x.tif"),
        cwd=ROOT,
        env=plain_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    until_s = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < until_s:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
