"""`inspect`: the picture is that of a real build, in its place, and of every kind of slide."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.build.log import SlideTask
from data_prep.build.options import BuildOptions
from data_prep.inspect.figure import caption
from data_prep.inspect.look import default_resolution, look_at, paint
from data_prep.token_files.token_file import read_tokens
from data_prep.tokens.token_set import rebuild
from tests.helpers.builds import build_one, leftovers, make_set, plain_env
from tests.helpers.repository import GLOMERULI, ROOT, WSI

IMAGE = GLOMERULI / "images" / "10063.jpg"
CMU = WSI / "CMU-1-Small-Region.svs"


def test_the_command_draws_a_picture(tmp_path: Path, capsys):
    out = tmp_path / "look.png"
    args = ["inspect", IMAGE, "--masks", GLOMERULI / "masks", "--resolution", 1024, "--patch", 16, "--length", 256]
    assert main([*map(str, args), "--out", str(out), "--dpi", "60"]) == 0
    text = capsys.readouterr().out
    for word in ("R = 1024", "p = 16", "L = 256", "Canny auto 126/252", "256 of 256 leaves used", "ceiling Dice 0.996"):
        assert word in text
    picture = cv2.imread(str(out))
    assert picture.shape == (561, 702, 3)
    panels = [picture[y : y + 190, x : x + 190] for y in (70, 320) for x in (20, 250, 485)]
    assert all(panel.std() > 20 for panel in panels), "a panel is blank"
    assert [p.name for p in tmp_path.iterdir()] == ["look.png"]


@pytest.mark.parametrize(
    "more",
    [
        [CMU],
        [IMAGE, "--patching", "uniform", "--patch", "64"],
        [CMU, "--split-value", "300", "--thresholds", "100,200"],
        [WSI / "small_16x16.svs", "--patch", "4", "--length", "4"],
        [CMU, "--aspect", "squash", "--resolution", "512"],
    ],
    ids=["defaults", "uniform", "threshold", "tiny", "squash"],
)
def test_every_kind_can_be_drawn(more: list[object], tmp_path: Path):
    out = tmp_path / "look.png"
    assert main([*map(str, ["inspect", *more, "--out", out, "--dpi", "40"])]) == 0
    assert cv2.imread(str(out)).std() > 10


def test_a_pdf_can_be_drawn(tmp_path: Path):
    out = tmp_path / "look.pdf"
    assert main(["inspect", str(IMAGE), "--length", "64", "--out", str(out), "--dpi", "40"]) == 0
    assert out.read_bytes().startswith(b"%PDF")


def test_it_shows_the_tokens_of_a_build(tmp_path: Path):
    options = BuildOptions(1024, 16, length=256, masks=GLOMERULI / "masks")
    look = look_at(IMAGE, options)
    outcome = build_one(SlideTask(IMAGE, tmp_path, options))
    built, meta = read_tokens(tmp_path / "10063.tokens.h5")
    np.testing.assert_array_equal(look.token_set.tokens, built.tokens)
    np.testing.assert_array_equal(look.token_set.leaf_xy, built.leaf_xy)
    assert look.ceiling == meta["ceiling"] == outcome.ceiling
    assert look.edges.sum() == meta["edge_pixels"] == look.basis.edge_pixels
    np.testing.assert_array_equal(look.seen, rebuild(built.tokens, built.leaf_xy, built.leaf_size, 1024))
    # At full size the picture's own Dice (the majority of each cell) comes close to the ceiling and does not pass it.
    inter = ((look.best == 1) & (look.truth == 1)).sum()
    shown = 2 * inter / ((look.best == 1).sum() + (look.truth == 1).sum())
    assert look.ceiling[0] - 0.01 < shown <= look.ceiling[0] + 1e-6
    assert leftovers(tmp_path) == []


def test_a_reduced_frame_keeps_everything_in_place():
    look = look_at(CMU, BuildOptions(4096, 16, length=400))
    assert look.shown_px == 2048 and look.token_set.content_wh == (2220, 2967) and look.content_wh == (1110, 1483)
    inside = look.rgb[: look.content_wh[1], : look.content_wh[0]].astype(float)
    seen = look.seen[: look.content_wh[1], : look.content_wh[0]].astype(float)
    assert np.corrcoef(inside.ravel(), seen.ravel())[0, 1] > 0.8
    assert (look.rgb[1490:] == 255).all() and (look.seen[1600:] == 255).all()
    assert look.edges[:1483, :1110].sum() > 0.99 * look.edges.sum() > 0


def test_paint_reduces_exactly():
    token_set = make_set(size_px=512, p=8, length=200, content_wh=(512, 512))
    whole = rebuild(token_set.tokens, token_set.leaf_xy, token_set.leaf_size, 512).astype(np.float64)
    np.testing.assert_array_equal(paint(token_set.tokens, token_set, 512), whole)
    for shown in (256, 64, 32, 4, 1):  # below 64 the smallest leaves share a pixel
        factor = 512 // shown
        mean = whole.reshape(shown, factor, shown, factor, 3).mean(axis=(1, 3))
        assert np.abs(paint(token_set.tokens, token_set, shown) - mean).max() <= 0.5


def test_a_large_frame_of_small_leaves_is_shown_small():
    look = look_at(IMAGE, BuildOptions(8192, 2, length=3000))
    assert look.shown_px == 2048 and look.rgb.shape == look.seen.shape == (2048, 2048, 3)
    assert look.edges.shape == (2048, 2048)
    assert look.content_wh == (256, 256) and (look.seen[260:] == 255).all()
    inside = [picture[:256, :256].astype(float).ravel() for picture in (look.rgb, look.seen)]
    assert np.corrcoef(*inside)[0, 1] > 0.9


def test_default_resolution_fills_the_frame():
    assert default_resolution(CMU, 16) == 2048
    assert default_resolution(IMAGE, 16) == 1024
    assert default_resolution(WSI / "TCGA-CR-7395-01A-01-TS1.svs", 16) == 4096
    assert default_resolution(WSI / "small_16x16.svs", 16) == 16


def test_caption_of_uniform_names_no_edges():
    text = caption(look_at(IMAGE, BuildOptions(512, 32, patching="uniform")))
    assert text == "R = 512, p = 32, uniform, 256 tokens"


def test_caption_says_how_many_leaves_the_mask_needs():
    look = look_at(IMAGE, BuildOptions(1024, 32, patching="uniform", masks=GLOMERULI / "masks"))
    mask = cv2.imread(str(GLOMERULI / "masks" / "10063.png"), cv2.IMREAD_UNCHANGED)
    blocks = mask.reshape(32, 32, 32, 32).swapaxes(1, 2).reshape(1024, -1)
    mixed = int((blocks.min(1) != blocks.max(1)).sum())
    assert 20 < mixed < 500 and caption(look).endswith(f"boundary in {mixed} leaves")


def test_a_mask_that_is_missing_is_told(tmp_path: Path, capsys):
    args = ["inspect", CMU, "--masks", GLOMERULI / "masks", "--out", tmp_path / "x.png"]
    assert main([*map(str, args)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {CMU}: no mask CMU-1-Small-Region.png")
    assert not (tmp_path / "x.png").exists()


def test_matplotlib_is_loaded_only_to_draw():
    code = "import data_prep.inspect.figure, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain_env(), capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
