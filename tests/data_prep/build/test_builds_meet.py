"""Builds by regions among other builds: gone on with, failed for good, two at once, and what they read twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.build import scratch, steps
from data_prep.build.log import SlideOutcome, SlideTask
from data_prep.build.options import BuildOptions
from data_prep.build.run import SlidePlan, build, prepare_out
from data_prep.parallel.queue import Schedule
from data_prep.slides import fast_tiff
from data_prep.system.files import writer_name
from tests.helpers.builds import command, leftovers, plain_env, run, token_bytes
from tests.helpers.damaged_slides import damaged_slide
from tests.helpers.region_builds import BY_REGIONS, REGION_OPTIONS, built_bytes, stop_after
from tests.helpers.repository import ROOT
from tests.helpers.slide_files import CMU


def prepared(out: Path) -> Path:
    prepare_out(out)
    return out


def test_a_frame_in_memory_goes_on_with_the_regions_of_a_killed_build(monkeypatch, tmp_path: Path):
    """The same parameters without --tile: what was done is used, and the file is the same."""
    out = tmp_path / "out"
    prepare_out(out)
    before = stop_after(monkeypatch, 20, out, REGION_OPTIONS)
    after = stop_after(monkeypatch, 10**6, out, BuildOptions(2048, 8, length=512))
    assert before.count("scan") > 8 and after.count("scan") == 4 * 4 - before.count("scan") and "write" in after
    assert token_bytes(out) == built_bytes([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512)
    assert leftovers(out) == []
    assert stop_after(monkeypatch, 10**6, out, BuildOptions(2048, 8, length=512)) == ["begin"]  # skipped


def test_what_cannot_be_built_leaves_no_scratch(monkeypatch, tmp_path: Path):
    slide = tmp_path / "bad.tif"
    damaged_slide(slide)
    outcome = build(
        [slide], BuildOptions(1024, 8, length=256, tile_px=128, strict=True), prepared(tmp_path / "strict")
    )[0]
    assert outcome.status == "failed" and "cannot read level 0" in outcome.reason
    assert leftovers(tmp_path / "strict") == []

    real = steps.Scratch.save

    def full(scratch, name, **arrays):
        if name == "plan-3":
            raise OSError(28, "No space left on device", str(scratch.folder / name))
        real(scratch, name, **arrays)

    monkeypatch.setattr(steps.Scratch, "save", full)
    outcome = build([slide], BuildOptions(1024, 8, length=256, tile_px=128), prepared(tmp_path / "full"))[0]
    assert outcome.status == "failed" and outcome.reason.endswith(
        "plan-3: No space left on device; what was done is kept, the same command goes on from there"
    )
    (left,) = leftovers(tmp_path / "full")
    assert left.endswith(".work") and len(list((tmp_path / "full" / left).glob("scan-*.arrays"))) == 64


def test_a_second_build_of_the_same_says_who_is_at_it(monkeypatch, tmp_path: Path):
    out = prepared(tmp_path / "out")
    stop_after(monkeypatch, 20, out, REGION_OPTIONS)
    (folder,) = out.glob(".*.work")
    before = {path.name: path.read_bytes() for path in folder.glob("*.arrays")}
    (folder / "manifest.json").write_text(json.dumps({"owner": writer_name().replace(str(os.getpid()), "1")}))
    outcome = build([CMU], REGION_OPTIONS, out)[0]
    host = writer_name().rpartition("-")[0]
    assert outcome.status == "failed"
    assert outcome.reason == f"{CMU}: process 1 on {host} is building it into {out}; wait for it, or stop it"
    assert {path.name: path.read_bytes() for path in folder.glob("*.arrays")} == before


def test_a_build_of_another_host_is_gone_on_with_at_once(monkeypatch, tmp_path: Path):
    """The next job of a chain does not wait to see whether the last one, on another node, is gone."""
    out = prepared(tmp_path / "out")
    before = stop_after(monkeypatch, 10, out, REGION_OPTIONS)
    folder = next(out.glob(".*.work"))
    (folder / "manifest.json").write_text(json.dumps({"owner": "node7-4242"}))
    after = stop_after(monkeypatch, 10**6, out, REGION_OPTIONS)
    assert before.count("scan") > 4 and after.count("scan") == 4 * 4 - before.count("scan") and "write" in after
    assert token_bytes(out) == built_bytes([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512)
    assert leftovers(out) == []


@pytest.mark.parametrize("ahead", [0, 7, 20, 33, 50])
def test_builds_of_two_hosts_take_turns_in_one_folder(ahead: int, tmp_path: Path):
    """Neither sees the other, as of two hosts: step by step both do the same, and the file is as of one alone."""
    out = prepared(tmp_path / "out")
    queues = [Schedule([SlidePlan(SlideTask(CMU, out, REGION_OPTIONS, {}, False), 512)]) for _ in range(2)]
    outcomes: list[SlideOutcome] = []

    def one_step(queue: Schedule) -> None:
        if not queue.over:
            step = queue.take()
            told = queue.done(step, steps.run_step(step))
            outcomes.extend(one for one in told if isinstance(one, SlideOutcome))

    for _ in range(ahead):
        one_step(queues[0])
    while not all(queue.over for queue in queues):
        for queue in queues:
            one_step(queue)
    first, last = outcomes
    assert first.status == "done" and not last.traceback
    assert last.status == "done" or last.reason.endswith("build again"), last.reason
    assert token_bytes(out) == built_bytes([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512)
    assert build([CMU], REGION_OPTIONS, out)[0].status == "skipped" and leftovers(out) == []


_ON_NODE_7 = """
import sys
from data_prep.__main__ import main
from data_prep.system import files
files._host = lambda: "node7"
sys.exit(main(sys.argv[1:]))
"""


def test_builds_of_two_hosts_at_once_end_well(tmp_path: Path):
    out = tmp_path / "out"
    here = command("build", CMU, "--out", out, *BY_REGIONS)
    there = [sys.executable, "-c", _ON_NODE_7, *here[3:]]
    both = [
        subprocess.Popen(args, cwd=ROOT, env=plain_env(), text=True, stderr=subprocess.PIPE) for args in (here, there)
    ]
    texts = [process.communicate(timeout=300)[1] for process in both]
    assert 0 in [process.returncode for process in both], texts
    assert all(process.returncode in (0, 1) for process in both) and "Traceback" not in "".join(texts), texts
    assert run("build", CMU, "--out", out, *BY_REGIONS).returncode == 0 and leftovers(out) == []
    assert run("build", CMU, "--out", tmp_path / "calm", *BY_REGIONS).returncode == 0
    assert token_bytes(out) == token_bytes(tmp_path / "calm")


def test_two_builds_at_once_end_well(tmp_path: Path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        command("build", CMU, "--out", out, *BY_REGIONS),
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
        second = run("build", CMU, "--out", out, *BY_REGIONS)
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
    assert build([CMU], BuildOptions(tile_px=128, **options), prepared(tmp_path / "a"))[0].status == "done"
    assert loads.count("tree") == 2  # for the tokens of all regions, and to write
    assert token_bytes(tmp_path / "a") == built_bytes([CMU], tmp_path / "b", **options)


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
    outcome = build([tmp_path / "x.tif"], options, prepared(tmp_path / "out"))[0]
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
