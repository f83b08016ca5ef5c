"""What a build refuses or says rather than do it badly: damage under --strict, too many tokens, names, regions."""

import shutil
import signal
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from data_prep.build.log import SlideOutcome
from data_prep.build.options import BuildOptions
from data_prep.build.run import build, prepare_out, region_side
from data_prep.slides import fast_tiff, memory, tiff
from data_prep.slides.open import open_slide
from data_prep.system import ctrl_c
from tests.helpers.builds import leftovers, token_bytes
from tests.helpers.damaged_slides import damaged_slide, retagged
from tests.helpers.repository import GLOMERULI
from tests.helpers.slide_files import TCGA

IMAGE = GLOMERULI / "images" / "10003.jpg"


def kidney() -> np.ndarray:
    with open_slide(IMAGE) as slide:
        return slide.read(0, 0, 0, *slide.size_wh)


def one(slide: Path, out: Path, **options) -> SlideOutcome:
    prepare_out(out)
    return build([slide], BuildOptions(1024, 8, **options), out)[0]


def test_strict_refuses_what_an_earlier_build_filled(tmp_path: Path):
    slide, out = tmp_path / "bad.tif", tmp_path / "out"
    damaged_slide(slide)
    assert one(slide, out, length=256).status == "done"
    filled = token_bytes(out)
    for tile_px in (None, 256):
        strict = one(slide, out, length=256, strict=True, tile_px=tile_px)
        assert strict.status == "failed" and "bad.tif: cannot read level 0" in strict.reason
        assert leftovers(out) == []
    assert token_bytes(out) == filled  # left as it was
    assert one(slide, out, length=256).status == "skipped"


def test_strict_refuses_odd_directories_of_a_slide_that_was_built(tmp_path: Path):
    """A level that OpenSlide leaves out: built with a warning, which the token file does not hold."""
    slide, out = retagged(TCGA, tmp_path / "odd.svs", 2, 257, (8449, 3, 1, 1783)), tmp_path / "out"
    built = one(slide, out, length=256)
    assert built.status == "done" and "no height" in built.warnings[0]
    strict = one(slide, out, length=256, strict=True)
    assert strict.status == "failed" and strict.reason.endswith(built.warnings[0])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"patching": "uniform"}, "lower --resolution"),
        ({"split_value": 0}, "raise --split-value"),
        ({"split_value": 0, "tile_px": 256}, "raise --split-value"),
        ({"length": 100_000, "tile_px": 256}, "lower --length"),
    ],
)
def test_tokens_that_do_not_fit_in_memory_are_refused(options: dict, remedy: str, tmp_path: Path, monkeypatch):
    slide = tmp_path / "kidney.tif"
    tifffile.imwrite(slide, kidney(), tile=(256, 256), photometric="rgb")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    outcome = one(slide, tmp_path / "out", **options)
    assert outcome.status == "failed" and remedy in outcome.reason and "kidney.tif" in outcome.reason
    assert "of memory available" in outcome.reason and leftovers(tmp_path / "out") == []
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    assert one(slide, tmp_path / "out", **options).status == "done"


@pytest.mark.parametrize("kind", ["fast", "tifffile"])
@pytest.mark.parametrize("short", [True, False])
def test_want_of_memory_is_no_damage(kind: str, short: bool, tmp_path: Path, monkeypatch):
    """A damaged header may ask for any size; but where not even a sound tile fits, white would be a lie."""
    slide, out = tmp_path / "kidney.tif", tmp_path / "out"
    pixels = kidney() if kind == "fast" else kidney().astype(np.uint16) * 257
    tifffile.imwrite(slide, pixels, tile=(256, 256), photometric="rgb", compression="zlib")
    with open_slide(slide) as opened:
        assert opened.reader == kind
    where, name = (fast_tiff._TiledPage, "decode") if kind == "fast" else (tiff.TiffPlane, "_decoded")
    real = getattr(where, name)

    def decode(self, data, index):
        if index == 5:  # not among those that the fast reader is tried with
            raise MemoryError("Unable to allocate")
        return real(self, data, index)

    def empty(*_):
        raise MemoryError("Unable to allocate 384 KiB")

    monkeypatch.setattr(where, name, decode)
    if short:
        monkeypatch.setattr(memory, "np", types.SimpleNamespace(empty=empty, uint8=np.uint8, full=np.full))
    outcome = one(slide, out, length=256)
    if short:
        assert outcome.status == "failed" and outcome.reason == "Unable to allocate 384 KiB" and not token_bytes(out)
    else:
        assert outcome.status == "done" and [entry["tile"][:3] for entry in outcome.damaged] == [[0, 256, 256]]


@pytest.mark.parametrize("tile_px", [None, 256])
def test_a_class_too_many_names_the_mask_and_leaves_nothing(tile_px: int | None, tmp_path: Path):
    masks = tmp_path / "masks"
    masks.mkdir()
    ids = np.zeros((1024, 1024), np.uint8)
    ids[700, 900] = 3
    cv2.imwrite(str(masks / "10003.png"), ids)
    outcome = one(IMAGE, tmp_path / "out", length=256, masks=masks, tile_px=tile_px, classes=2)
    assert outcome.status == "failed" and leftovers(tmp_path / "out") == []
    assert outcome.reason == f"{masks / '10003.png'}: has class 3, but only classes 1 to 2 are expected; see --classes"
    assert one(IMAGE, tmp_path / "out", length=256, masks=masks, tile_px=tile_px, classes=3).status == "done"


@pytest.mark.parametrize("name", ["a\nb.jpg", b"a\xff.jpg".decode(errors="surrogateescape")])
def test_names_that_no_file_can_hold(name: str, tmp_path: Path):
    try:
        slide = Path(shutil.copy(IMAGE, tmp_path / name))
    except OSError:
        pytest.skip("this file system takes no such names")
    outcome = one(slide, tmp_path / "out", length=64)
    assert outcome.status == "failed" and "rename it" in outcome.reason and outcome.reason.isprintable()


@pytest.mark.parametrize(("resolution", "tile_px", "side"), [(16384, 256, 256), (65536, 256, 1024), (4096, 64, 64)])
def test_no_more_than_64_regions_across(resolution: int, tile_px: int, side: int):
    assert region_side(BuildOptions(resolution, 16, length=64, tile_px=tile_px), 1) == side


@pytest.mark.parametrize(("rank", "said"), [(None, b"interrupted\n"), ("0", b"interrupted\n"), ("3", b"")])
def test_of_many_ranks_one_says_that_it_was_interrupted(rank: str | None, said: bytes, monkeypatch):
    written: list[bytes] = []
    left: list[int] = []
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("PMI_RANK", rank)
    monkeypatch.setattr(ctrl_c.os, "write", lambda _, text: written.append(text))
    monkeypatch.setattr(ctrl_c.os, "_exit", left.append)
    monkeypatch.setattr(ctrl_c, "_RANK_0_FIRST_S", 0.01)
    handler = signal.getsignal(signal.SIGINT)
    try:
        ctrl_c.end()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert b"".join(written) == said and left == [ctrl_c.INTERRUPTED]
