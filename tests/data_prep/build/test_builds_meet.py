"""Builds by regions among other builds: gone on with, failed for good, two at once, and what they read twice."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.build import scratch, steps
from data_prep.build.options import BuildOptions
from data_prep.build.run import build, prepare_out
from data_prep.slides import fast_tiff
from data_prep.system.files import writer_name
from tests.data_prep.build.test_steps import CMU, OPTIONS, SHARED, damaged_slide, made, stop_after
from tests.helpers.builds import ROOT, command, leftovers, plain_env, run, token_bytes


def _made(out: Path) -> Path:
    prepare_out(out)
    return out


def test_a_frame_in_memory_goes_on_with_the_regions_of_a_killed_build(monkeypatch, tmp_path: Path):
    """The same parameters without --tile: what was done is used, and the file is the same."""
    out = tmp_path / "out"
    prepare_out(out)
    before = stop_after(monkeypatch, 20, out, OPTIONS)
    after = stop_after(monkeypatch, 10**6, out, BuildOptions(2048, 8, length=512))
    assert before.count("scan") > 8 and after.count("scan") == 4 * 4 - before.count("scan") and "write" in after
    assert token_bytes(out) == made([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512)
    assert leftovers(out) == []
    assert stop_after(monkeypatch, 10**6, out, BuildOptions(2048, 8, length=512)) == ["begin"]  # skipped


def test_what_cannot_be_built_leaves_no_scratch(monkeypatch, tmp_path: Path):
    slide = tmp_path / "bad.tif"
    damaged_slide(slide)
    outcome = build([slide], BuildOptions(1024, 8, length=256, tile_px=128, strict=True), _made(tmp_path / "strict"))[0]
    assert outcome.status == "failed" and "cannot read level 0" in outcome.reason
    assert leftovers(tmp_path / "strict") == []

    real = steps.Scratch.save

    def full(scratch, name, **arrays):
        if name == "plan-3":
            raise OSError(28, "No space left on device", str(scratch.folder / name))
        real(scratch, name, **arrays)

    monkeypatch.setattr(steps.Scratch, "save", full)
    outcome = build([slide], BuildOptions(1024, 8, length=256, tile_px=128), _made(tmp_path / "full"))[0]
    assert outcome.status == "failed" and outcome.reason.endswith(
        "plan-3: No space left on device; what was done is kept, the same command goes on from there"
    )
    (left,) = leftovers(tmp_path / "full")
    assert left.endswith(".work") and len(list((tmp_path / "full" / left).glob("scan-*.arrays"))) == 64


def test_a_second_build_of_the_same_says_who_is_at_it(monkeypatch, tmp_path: Path):
    out = _made(tmp_path / "out")
    stop_after(monkeypatch, 20, out, OPTIONS)
    (folder,) = out.glob(".*.work")
    before = {path.name: path.read_bytes() for path in folder.glob("*.arrays")}
    (folder / "manifest.json").write_text(json.dumps({"owner": writer_name().replace(str(os.getpid()), "1")}))
    outcome = build([CMU], OPTIONS, out)[0]
    host = writer_name().rpartition("-")[0]
    assert outcome.status == "failed"
    assert outcome.reason == f"{CMU}: process 1 on {host} is building it into {out}; wait for it, or stop it"
    assert {path.name: path.read_bytes() for path in folder.glob("*.arrays")} == before


@pytest.mark.parametrize("lives", [True, False])
def test_a_build_of_another_host_is_watched(lives: bool, monkeypatch, tmp_path: Path):
    """The next job of a chain goes on at once where the last one was killed, on another node, and fails only if that
    one still writes."""
    out = tmp_path / "out"
    prepare_out(out)
    stop_after(monkeypatch, 10, out, OPTIONS)
    folder = next(out.glob(".*.work"))
    (folder / "manifest.json").write_text(json.dumps({"owner": "node7-4242"}))
    monkeypatch.setattr(scratch, "_OTHER_HOST_S", 1.0)
    monkeypatch.setattr(scratch, "_LOOK_S", 0.05)
    looks = 0
    real = scratch._owner

    def looked(where: Path):
        nonlocal looks
        looks += 1
        if lives and looks == 3:
            (folder / "scan-900.arrays").touch()
        return real(where)

    monkeypatch.setattr(scratch, "_owner", looked)
    outcome = build([CMU], OPTIONS, out)[0]
    if lives:
        assert outcome.status == "failed" and "process 4242 on node7 is building it" in outcome.reason
        assert folder.is_dir()
    else:
        assert outcome.status == "done" and looks >= 3 and leftovers(out) == []


def test_two_builds_at_once_end_well(tmp_path: Path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        command("build", CMU, "--out", out, *SHARED),
        cwd=ROOT,
        env=plain_env(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until_s = time.monotonic() + 60
    while first.poll() is None and not list(out.glob(".*.work/scan-*.arrays")) and time.monotonic() < until_s:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGSTOP)  # so that it lives, however slow this machine is
    try:
        second = run("build", CMU, "--out", out, *SHARED)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 1 and f"process {first.pid} on " in second.stderr and "Traceback" not in second.stderr
    _, text = first.communicate(timeout=120)
    assert first.returncode == 0, text
    assert token_bytes(out).keys() == {f"{CMU.stem}.tokens.h5"} and leftovers(out) == []


def test_many_regions_read_the_tree_once(monkeypatch, tmp_path: Path):
    loads: list[str] = []
    real = steps.Scratch.load

    def counting(scratch, name, *keys):
        loads.append(name)
        return real(scratch, name, *keys)

    monkeypatch.setattr(steps.Scratch, "load", counting)
    options = {"resolution": 1024, "patch": 16, "length": 128}
    assert build([CMU], BuildOptions(tile_px=128, **options), _made(tmp_path / "a"))[0].status == "done"
    assert loads.count("tree") == 2  # for the tokens of all regions, and to write
    assert token_bytes(tmp_path / "a") == made([CMU], tmp_path / "b", **options)


@pytest.mark.parametrize(("length", "most"), [(256, 1.5), (1024, 1.5), (4096, 2.0)])
def test_how_often_a_pixel_is_decoded(length: int, most: float, monkeypatch, tmp_path: Path):
    """A 64K build in small: 16 file tiles along a region's side, and a cache of one and a third regions.

    With leaves of 128 px and more on average (cells of 16) hardly any pixel is read again; leaves with cells below 8 px
    have theirs decoded a second time.
    """
    rgb = np.asarray(tifffile.imread(CMU, key=0))[:2048, :2048]
    tifffile.imwrite(tmp_path / "x.tif", np.tile(rgb, (2, 2, 1)), tile=(64, 64), photometric="rgb", compression="jpeg")
    monkeypatch.setattr(fast_tiff, "CACHE_BYTES", 4 * 2**20)
    monkeypatch.setattr(fast_tiff, "_ALIKE_BYTES", 0)  # or equal tiles would be decoded once
    options = BuildOptions(4096, 8, length=length, tile_px=1024)
    outcome = build([tmp_path / "x.tif"], options, _made(tmp_path / "out"))[0]
    assert outcome.status == "done" and 4096**2 <= outcome.counted["decoded_px"] <= most * 4096**2


def test_what_others_still_write_does_not_keep_a_folder(monkeypatch, tmp_path: Path):
    """A rank that is at work on a slide which another one gives up writes once more, at the worst moment."""
    given_up = scratch.Scratch(tmp_path, "a.b", "key-64")
    given_up.begin()
    given_up.save("scan-0", sums=np.zeros(100))
    real, late = os.rmdir, []

    def rmdir(*where, **more):
        try:
            given_up.save("scan-1", sums=np.zeros(100))
        except OSError as error:
            late.append(error.strerror)
        real(*where, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    given_up.remove()
    monkeypatch.undo()
    assert late == ["No such file or directory"] and list(tmp_path.iterdir()) == []
    given_up.remove()  # of many ranks one is first
