"""`build`: the same bytes however it is run, resuming, going on past bad slides, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.build import log as build_log
from data_prep.build.log import SlideOutcome, SlideTask, read_log
from data_prep.build.options import BuildOptions
from data_prep.build.run import summary
from data_prep.edges.canny import blur_for, edge_map
from data_prep.parallel.pool import run_pool
from data_prep.token_files.token_file import read_meta, read_tokens
from data_prep.token_files.verify import verify_file
from data_prep.tokens.ceiling import ceiling
from data_prep.tree.quadtree import budget_tree
from tests.helpers.builds import TREE, build_one, command, leftovers, plain_env, run, some_slides, token_bytes
from tests.helpers.repository import ROOT


@pytest.fixture
def slides(tmp_path: Path) -> tuple[Path, Path]:
    return some_slides(tmp_path)


def build(slides: tuple[Path, Path], out: Path, *more: object, tree: list[str] = TREE) -> int:
    images, masks = slides
    return main([*map(str, ("build", images, "--masks", masks, "--out", out, *tree, *more))])


def test_a_file_holds_the_slide(slides, tmp_path: Path):
    out = tmp_path / "out"
    assert build(slides, out) == 0
    for image in slides[0].iterdir():
        rgb = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(slides[1] / f"{image.stem}.png"), cv2.IMREAD_UNCHANGED)
        token_set, meta = read_tokens(out / f"{image.stem}.tokens.h5", check=True)
        params = meta["params"]
        # Whole-image reference, a few lines long: edges, counts, tree; then every token by its own slice.
        edges = edge_map(rgb, params["lo"], params["hi"], params["blur"])
        assert params["blur"] == blur_for(1024) and meta["edge_pixels"] == edges.sum()
        leaves = budget_tree(edges.reshape(64, 16, 64, 16).sum(axis=(1, 3)), 16, 256)
        np.testing.assert_array_equal(token_set.leaf_xy, leaves.xy)
        np.testing.assert_array_equal(token_set.leaf_size, leaves.size)
        for i in (0, 17, 100, len(leaves) - 1):
            (x, y), s = leaves.xy[i], leaves.size[i]
            square = rgb[y : y + s, x : x + s].reshape(16, s // 16, 16, s // 16, 3).astype(np.int64).sum(axis=(1, 3))
            area = (s // 16) ** 2
            np.testing.assert_array_equal(token_set.tokens[i], (2 * square + area) // (2 * area))
        assert token_set.mask_counts.sum() == meta["mask_pixels"][0] == (mask == 1).sum()
        assert meta["ceiling"] == pytest.approx(ceiling(token_set.mask_counts, token_set.content_counts), abs=1e-6)
        assert meta["budget_used"] == 1.0 and meta["size0_wh"] == [1024, 1024]


def test_same_bytes_whatever_jobs_and_tile(slides, tmp_path: Path):
    outs = {"one": [], "tile": ["--tile", "200"], "pool": ["--jobs", "2"], "squash-as-keep": ["--aspect", "keep"]}
    for name, more in outs.items():
        assert build(slides, tmp_path / name, *more) == 0
        assert token_bytes(tmp_path / name) == token_bytes(tmp_path / "one"), name
    assert len(token_bytes(tmp_path / "one")) == 3


DROP = ["--fit", "drop", "--length"]


@pytest.mark.parametrize(
    "tree",
    [
        ["--resolution", "512", "--patch", "8", "--split-value", "50", "--thresholds", "100,200"],
        ["--resolution", "2048", "--patch", "16", "--length", "100", "--blur", "5"],
        ["--resolution", "512", "--patch", "32", "--patching", "uniform"],
        ["--resolution", "512", "--patch", "16", "--length", "100", "--aspect", "squash"],
        ["--resolution", "1024", "--patch", "16", *DROP, "3000", "--split-value", "40", "--thresholds", "250,500"],
        ["--resolution", "1024", "--patch", "16", *DROP, "101", "--split-value", "100", "--packing", "strip"],
    ],
    ids=["threshold", "padded", "uniform", "squash", "duplicated", "strip"],
)
def test_every_kind_of_build_passes_verify(slides, tmp_path: Path, tree: list[str], capsys):
    out = tmp_path / "out"
    assert build(slides, out, tree=tree) == 0
    assert main(["verify", str(out)]) == 0
    assert "3 of 3 token files are good" in capsys.readouterr().out
    for path in out.glob("*.tokens.h5"):
        meta = read_meta(path)
        if meta["params"]["fit"] == "drop":
            assert meta["rows"] == meta["params"]["length"]
            inside = int(read_tokens(path)[0].content_counts.sum())
            assert (inside < 1024 * 1024) == ("strip" in tree), "a longer tree loses leaves, a shorter one none"
        if meta["params"]["patching"] == "uniform":
            assert meta["rows"] == 256 and meta["params"]["lo"] is None and meta["ceiling"][0] > 0.9
    assert build(slides, out, tree=tree) == 0
    assert "3 skipped" in capsys.readouterr().out


def test_whole_slides_without_masks(tmp_path: Path):
    wsi = ROOT / "data_prep" / "sample_data" / "wsi"
    out = tmp_path / "out"
    args = ["build", wsi / "CMU-1-Small-Region.svs", wsi / "small_16x16.svs", "--out", out]
    assert main([*map(str, args), "--resolution", "1024", "--patch", "16", "--length", "64"]) == 0
    meta = read_meta(out / "CMU-1-Small-Region.tokens.h5")
    assert meta["size0_wh"] == [2220, 2967] and meta["content_wh"] == [766, 1024]
    assert meta["mpp"] == pytest.approx(0.499) and meta["classes"] == 0 and meta["ceiling"] is None
    assert read_meta(out / "small_16x16.tokens.h5")["content_wh"] == [16, 16]
    assert all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))


def test_rerun_skips_and_every_change_rebuilds(slides, tmp_path: Path, capsys):
    out = tmp_path / "out"
    first = sorted(path.stem for path in slides[0].iterdir())[0]
    image, mask, target = slides[0] / f"{first}.jpg", slides[1] / f"{first}.png", out / f"{first}.tokens.h5"
    assert build(slides, out) == 0
    clean, stamp = token_bytes(out), target.stat().st_mtime_ns
    capsys.readouterr()

    def again(*more: object) -> str:
        assert build(slides, out, *more) == 0
        done = capsys.readouterr()
        return done.out + done.err

    assert "0 done, 3 skipped, 0 failed" in again()
    assert target.stat().st_mtime_ns == stamp
    target.write_bytes(clean[target.name][: len(clean[target.name]) // 2])  # cut in half
    assert main(["verify", str(out)]) == 1
    assert f"{target}: not a whole token file" in capsys.readouterr().out
    assert f"{first}: rebuilt: not a whole token file (" in (text := again()) and "1 done, 2 skipped" in text
    damaged = bytearray(clean[target.name])
    damaged[len(damaged) // 2] ^= 4
    target.write_bytes(damaged)
    assert "rebuilt: content does not match its checksum" in again()
    assert token_bytes(out) == clean
    assert "rebuilt: parameter length 256 -> 250" in (text := again("--length", "250")) and "3 done" in text
    assert "rebuilt: parameter aspect keep -> squash" in again("--length", "250", "--aspect", "squash")
    again()
    assert token_bytes(out) == clean
    cv2.imwrite(str(image), cv2.imread(str(image))[::-1])
    assert "rebuilt: the slide's content changed" in (text := again()) and "1 done, 2 skipped" in text
    cv2.imwrite(str(mask), 1 - cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
    assert "rebuilt: the mask changed" in (text := again()) and "1 done, 2 skipped" in text
    assert "3 done" in again("--rebuild")


def test_a_bad_slide_does_not_stop_the_rest(slides, tmp_path: Path, capsys):
    out = tmp_path / "out"
    images, masks = slides
    (images / "broken.svs").write_bytes(b"II*\0 no slide at all")
    names = sorted(path.stem for path in images.glob("*.jpg"))
    (masks / f"{names[0]}.png").unlink()
    for jobs in ("1", "2"):
        assert build(slides, out / jobs, "--jobs", jobs) == 1
        text = capsys.readouterr().out
        assert "2 done, 0 skipped, 2 failed of 4 slides" in text
        table = {line.split()[0]: line for line in text.splitlines()[2:6]}
        assert "failed" in table["broken"] and "broken.svs" in table["broken"]
        assert "failed" in table[names[0]] and "no mask" in table[names[0]]
        assert set(token_bytes(out / jobs)) == {f"{name}.tokens.h5" for name in names[1:]}
        assert leftovers(out / jobs) == []
        by_slide = {entry["slide"]: entry for entry in read_log(out / jobs)}
        assert {slide: entry["status"] for slide, entry in by_slide.items()} == {
            "broken": "failed",
            names[0]: "failed",
            names[1]: "done",
            names[2]: "done",
        }


def test_the_log_survives_a_torn_line_and_remembers_hashes(slides, tmp_path: Path):
    out = tmp_path / "out"
    assert build(slides, out) == 0
    log = out / "build_log.jsonl"
    entries = read_log(out)
    assert len(entries) == 3 and all(e["seconds"] > 0 and e["tokens"] == 256 and e["ceiling"] for e in entries)
    log.write_text(log.read_text() + '{"slide": "half')
    assert build(slides, out) == 0
    assert [entry["status"] for entry in read_log(out)] == ["done"] * 3 + ["skipped"] * 3
    assert all(json.loads(line) for line in log.read_text().splitlines() if "half" not in line)


def test_a_rerun_hashes_only_what_was_touched(slides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    jpeg = sorted(slides[0].iterdir())[0]
    image = jpeg.with_suffix(".bmp")  # no checks of its own, so one byte may change
    cv2.imwrite(str(image), cv2.imread(str(jpeg)))
    jpeg.unlink()
    assert build(slides, out) == 0
    hashed: list[str] = []
    real = build_log.sha256_of
    monkeypatch.setattr(build_log, "sha256_of", lambda path: (hashed.append(path.name), real(path))[1])
    assert build(slides, out) == 0
    assert hashed == []
    before = image.stat()
    changed = bytearray(image.read_bytes())
    changed[-1] ^= 1
    image.write_bytes(changed)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time of modification
    assert build(slides, out) == 0
    assert hashed == [image.name]
    assert [entry["reason"] for entry in read_log(out)[-3:]].count("rebuilt: the slide's content changed") == 1
    (out / "build_log.jsonl").write_text('{"sources": {"x": 3}}\n{"sources": 4}\n[]\n')
    assert build(slides, out) == 0
    assert len(hashed) == 1 + 6


def test_a_large_slide_shows_that_it_moves(slides, tmp_path: Path):
    notes: list[str] = []
    image = sorted(slides[0].iterdir())[0]
    task = SlideTask(image, tmp_path, BuildOptions(1024, 16, length=64))
    assert build_one(task, notes.append).status == "done"
    assert len(notes) >= 2 and notes[-1].startswith(f"{image.stem}: ") and notes[-1].endswith(" Mpx read")


def test_the_table_of_a_long_run_keeps_the_failures(tmp_path: Path):
    outcomes = [SlideOutcome(f"s{i:04d}", "", "done", seconds=1.0, tokens=9, ceiling=[0.9, 0.8]) for i in range(500)]
    outcomes[333] = SlideOutcome("s0333", "", "failed", "broken")
    text = summary(outcomes, tmp_path, 125.0)
    assert "s0333  failed" in text and "broken" in text and "... and 440 more" in text
    assert text.splitlines()[-1] == f"499 done, 0 skipped, 1 failed of 500 slides in 2:05 -> {tmp_path}"
    assert "0.900/0.800" in text


def test_warnings_of_trees_that_cannot_show_the_mask(slides, tmp_path: Path, capsys):
    name = sorted(path.stem for path in slides[0].iterdir())[0]
    noise = np.random.default_rng(0).integers(0, 2, (1024, 1024), np.uint8)
    cv2.imwrite(str(slides[1] / f"{name}.png"), noise)
    assert build(slides, tmp_path / "out", "--thresholds", "4000,8000") == 0
    text = capsys.readouterr().err
    assert "leaves used: no edges are left to split at, use --thresholds auto" in text
    assert f"warning: {name}: ceiling" in text
    assert build(slides, tmp_path / "out", "--thresholds", "4000,8000") == 0
    again = capsys.readouterr()
    assert f"warning: {name}: ceiling" in again.err and "3 skipped" in again.out, "skipping does not mend the tree"
    assert build(slides, tmp_path / "fine", "--length", "9999", "--thresholds", "0,0", "--patch", "128") == 0
    assert "only 64 of 9999 leaves used: every leaf has the side of --patch already" in capsys.readouterr().err


def test_a_lower_quantile_of_auto_finds_more_edges_and_makes_other_files(slides, tmp_path: Path, capsys):
    metas = {}
    for asked in ("", "0.90", "0.8", ".95"):
        out = tmp_path / f"out{asked}"
        assert build(slides, out, *(["--auto-quantile", asked] if asked else [])) == 0
        metas[asked] = [read_meta(path) for path in sorted(out.glob("*.tokens.h5"))]
    assert metas[""] == metas["0.90"] and "auto_quantile" not in metas[""][0]["params"]
    for few, some, many in zip(metas[".95"], metas[""], metas["0.8"], strict=True):
        assert few["edge_pixels"] < some["edge_pixels"] < many["edge_pixels"]
        assert few["params"]["hi"] > some["params"]["hi"] > many["params"]["hi"]
        assert (few["params"]["auto_quantile"], many["params"]["auto_quantile"]) == (0.95, 0.8)
    capsys.readouterr()
    out = tmp_path / "out0.8"
    assert build(slides, out, "--auto-quantile", "0.80") == 0 and "3 skipped" in capsys.readouterr().out
    assert build(slides, out) == 0
    assert [entry["reason"] for entry in read_log(out)[-3:]] == 3 * ["rebuilt: parameter auto_quantile 0.8 -> None"]


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def test_killed_while_writing_leaves_a_temporary_that_the_next_run_removes(slides, tmp_path: Path):
    out, clean = tmp_path / "out", tmp_path / "clean"
    assert build(slides, clean) == 0
    # The real command line, which kills itself in the third fsync (file, folder, file): the second file is written, but
    # not yet renamed.
    code = (
        "import os, signal, sys\n"
        "from data_prep.system import files\n"
        "from data_prep.__main__ import main\n"
        "sync, calls = os.fsync, []\n"
        "def fsync(fd):\n"
        "    calls.append(fd)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 3 else sync(fd)\n"
        "files.os.fsync = fsync\n"
        "main(sys.argv[1:])\n"
    )
    images, masks = slides
    args = [*map(str, ("build", images, "--masks", masks, "--out", out, *TREE))]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=plain_env(), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert len(token_bytes(out)) == 1 and len(leftovers(out)) == 1
    assert all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))
    again = run(*args)
    assert again.returncode == 0 and "left by a run that was killed" in again.stderr
    assert "2 done, 1 skipped" in again.stdout
    assert token_bytes(out) == token_bytes(clean) and leftovers(out) == []


def test_killed_at_any_moment_leaves_only_whole_files(tmp_path: Path):
    slides = some_slides(tmp_path, 6)
    out, clean = tmp_path / "out", tmp_path / "clean"
    assert build(slides, clean) == 0
    images, masks = slides
    args = command("build", images, "--masks", masks, "--out", out, *TREE)
    quiet = subprocess.DEVNULL
    for number in range(4):  # killed when so many files are there
        process = subprocess.Popen(args, cwd=ROOT, env=plain_env(), stdout=quiet, stderr=quiet)
        give_up_s = time.monotonic() + 60
        while process.poll() is None and len(token_bytes(out)) <= number and time.monotonic() < give_up_s:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))
    assert build(slides, out) == 0
    assert token_bytes(out) == token_bytes(clean) and leftovers(out) == []


def test_a_worker_that_dies_costs_its_task_only():
    # raise_signal returns None; SIGCONT does nothing to a running process, SIGKILL ends it.
    tasks = [signal.SIGCONT, signal.SIGKILL, signal.SIGCONT, signal.SIGCONT]
    results = list(run_pool(signal.raise_signal, tasks, 2, died=lambda task, why: f"{task}: {why}"))
    why = "its worker process was killed by SIGKILL (out of memory?), twice"
    assert sorted(map(str, results)) == [f"9: {why}", *["None"] * 3]
    why = "its worker process ended with exit code 5, twice"
    assert list(run_pool(os._exit, [5], 2, died=lambda task, why: why)) == [why]
    assert list(run_pool(abs, [], 2, died=lambda task, why: 0)) == []
    idle: list[int] = []
    assert list(run_pool(time.sleep, [0.5], 1, lambda task, why: None, lambda: idle.append(1), idle_s=0.05)) == [None]
    assert len(idle) >= 2


def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(tmp_path: Path):
    slides = some_slides(tmp_path, 24)  # enough that some are left when the signal comes
    out = tmp_path / "out"
    images, masks = slides
    args = command("build", images, "--masks", masks, "--out", out, *TREE, "--jobs", "2", "--rebuild")
    process = subprocess.Popen(
        args,
        cwd=ROOT,
        env=plain_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    give_up_s = time.monotonic() + 60
    while not token_bytes(out) and time.monotonic() < give_up_s:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to every process of the group
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "interrupted: the same command goes on" in text and "Traceback" not in text
    assert build(slides, out) == 0
    assert len(token_bytes(out)) == 24 and leftovers(out) == []
