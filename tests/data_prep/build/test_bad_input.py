"""Bad input at the command line: one line that names the cause, the exit code, and nothing half-written."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.build.run import prepare_out
from data_prep.system import files
from tests.helpers.builds import TREE, command, leftovers, plain_env, run, some_slides, token_bytes
from tests.helpers.repository import GLOMERULI, ROOT, WSI

IMAGE = str(GLOMERULI / "images" / "10003.jpg")


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    code = main([*map(str, args)])
    done = capsys.readouterr()
    return code, done.out, done.err


def one_error(text: str) -> str:
    """The only line of stderr, which must be an error in words."""
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


BAD_ARGUMENTS = {
    "length-3": ("--resolution 1024 --patch 16 --length 3", "--length 3: must be at least 4"),
    "patch-12": ("--resolution 1024 --patch 12 --length 64", "--patch 12: must be a power of two"),
    "patch-0": ("--resolution 1024 --patch 0 --length 64", "--patch 0: must be a power of two"),
    "ratio": ("--resolution 1000 --patch 8 --length 64", "must be --patch 8 times a power of two, e.g. 512 or 1024"),
    "too-small": ("--resolution 8 --patch 16 --length 64", "--resolution 8: must be at least --patch 16"),
    "too-large": ("--resolution 2097152 --patch 16 --length 64", "--resolution 2097152: must be at most 1048576"),
    "neither": ("--resolution 1024 --patch 16", "apf needs exactly one of --length L and --split-value v, got neither"),
    "both": ("--resolution 1024 --patch 16 --length 64 --split-value 9", "--length L and --split-value v, got both"),
    "uniform-length": ("--resolution 64 --patch 16 --length 4 --patching uniform", "--length: only with --patching"),
    "split": ("--resolution 1024 --patch 16 --split-value -1", "--split-value -1: must be 0 or more"),
    "blur": ("--resolution 1024 --patch 16 --length 64 --blur 4", "--blur 4: must be an odd number"),
    "thresholds": ("--resolution 1024 --patch 16 --length 64 --thresholds 100", "'100' is neither auto nor LOW,HIGH"),
    "thresholds-order": ("--resolution 64 --patch 16 --length 64 --thresholds 9,1", "9,1: must be LOW,HIGH"),
    "quantile": ("--resolution 64 --patch 16 --length 64 --auto-quantile .855", "'.855' is no quantile in hundredths"),
    "quantile-range": ("--resolution 64 --patch 16 --length 64 --auto-quantile 1", "'1' is no quantile in hundredths"),
    "quantile-fixed": (
        "--resolution 64 --patch 16 --length 64 --auto-quantile .8 --thresholds 9,10",
        "--auto-quantile 0.8: only with --patching apf and --thresholds auto",
    ),
    "quantile-uniform": (
        "--resolution 64 --patch 16 --patching uniform --auto-quantile 0.95",
        "--auto-quantile 0.95: only with",
    ),
    "classes": ("--resolution 1024 --patch 16 --length 64 --classes 0", "--classes 0: must be 1 to 255"),
    "tile": ("--resolution 1024 --patch 16 --length 64 --tile 8", "--tile 8: must be 64 to 16384 pixels"),
    "tile-large": ("--resolution 32768 --patch 16 --length 64 --tile 32768", "--tile 32768: must be 64 to 16384"),
    "jobs": ("--resolution 1024 --patch 16 --length 64 --jobs -2", "--jobs -2: must be 0"),
    "drop": ("--resolution 1024 --patch 16 --split-value 64 --fit drop", "--fit drop: needs --length"),
    "seed": ("--resolution 64 --patch 16 --length 64 --seed -1", "--seed -1: must be 0"),
    "unknown-flag": ("--resolution 1024 --patch 16 --lenght 64", "unrecognized arguments: --lenght"),
    "abbreviated": ("--resolution 1024 --patch 16 --len 64", "unrecognized arguments: --len"),
    "unknown-value": ("--resolution 1024 --patch 16 --length 64 --aspect wide", "invalid choice: 'wide' (choose from"),
    "no-number": ("--resolution 1k --patch 16 --length 64", "argument --resolution: invalid int value: '1k'"),
    "missing-flag": ("--patch 16 --length 64", "the following arguments are required: --resolution"),
    "masks": ("--resolution 1024 --patch 16 --length 64 --masks /nowhere", "--masks /nowhere: no such folder"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str, tmp_path: Path, capsys):
    args, words = BAD_ARGUMENTS[name]
    out = tmp_path / "out"
    code, _, err = cli(capsys, "build", IMAGE, "--out", out, *args.split())
    assert code == 64
    assert words in one_error(err)
    assert not out.exists()


def test_paths_that_are_not_there(tmp_path: Path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for path, words in ((tmp_path / "no.svs", "no such file"), (empty, "no slides in this folder")):
        code, _, err = cli(capsys, "build", path, "--out", out, *TREE)
        assert code == 64 and f"{path}: {words}" in one_error(err)
        assert not out.exists()
    missing = tmp_path / "no.svs"
    for args in (("verify", empty), ("verify", missing), ("inspect", missing, "--out", out / "x.png")):
        code, _, err = cli(capsys, *args)
        assert code == 64 and str(args[1]) in one_error(err)


def test_two_slides_of_one_name(tmp_path: Path, capsys):
    for name in ("a.jpg", "a.jpeg"):
        shutil.copy(IMAGE, tmp_path / name)
    code, _, err = cli(capsys, "build", tmp_path, "--out", tmp_path / "out", *TREE)
    assert code == 64 and "same name as" in one_error(err)


def test_an_out_folder_that_cannot_be(tmp_path: Path, capsys):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    for out in (blocked, blocked / "deeper", Path("/proc/tokens")):
        code, _, err = cli(capsys, "build", IMAGE, "--out", out, *TREE)
        assert code == 64 and f"--out {out}: cannot be written" in one_error(err)
    assert blocked.read_text() == "a file"
    code, _, err = cli(capsys, "inspect", IMAGE, "--length", "16", "--out", blocked / "x.png")
    assert code == 64 and f"--out {blocked / 'x.png'}: cannot be written" in one_error(err)
    code, _, err = cli(capsys, "inspect", IMAGE, "--length", "16", "--out", tmp_path / "x.gif")
    assert code == 64 and "must end in .png or .pdf" in one_error(err)
    for dpi in ("0", "-3", "100000"):
        code, _, err = cli(capsys, "inspect", IMAGE, "--out", tmp_path / "x.png", "--dpi", dpi)
        assert code == 64 and f"--dpi {dpi}: must be 10 to 1200" in one_error(err)
    code, _, err = cli(capsys, "inspect", tmp_path, "--out", tmp_path / "x.png")
    assert code == 64 and f"{tmp_path}: a folder, not a slide" in one_error(err)


def test_a_second_run_into_the_folder_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two runs try at once whether it can be written; the other one takes the file away first."""
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), path.unlink()))
    assert prepare_out(tmp_path / "out") == []


@pytest.mark.parametrize("what", ["truncated", "cut-late", "zip", "empty", "text", "undecodable"])
def test_slides_that_are_none(what: str, tmp_path: Path, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    bad = slides / "bad.svs"
    whole = (WSI / "CMU-1-Small-Region.svs").read_bytes()
    if what == "zip":
        with zipfile.ZipFile(bad, "w") as archive:
            archive.write(WSI / "small_16x16.svs")
    elif what == "undecodable":
        shutil.copy(WSI / "unreadable.svs", bad)
    else:
        keep = {"truncated": len(whole) // 2, "cut-late": len(whole) - 2000, "empty": 0, "text": None}[what]
        bad.write_bytes(b"this is no slide" if keep is None else whole[:keep])
    shutil.copy(IMAGE, slides / "good.jpg")
    out = tmp_path / "out"
    code, text, err = cli(capsys, "build", slides, "--out", out, *TREE)
    assert code == 1
    row = next(line for line in text.splitlines() if line.startswith("bad "))
    assert "failed" in row and "bad.svs" in row
    assert f"failed: bad: {bad}" in err and "Traceback" not in err
    assert "1 done, 0 skipped, 1 failed" in text
    assert set(token_bytes(out)) == {"good.tokens.h5"} and leftovers(out) == []


def test_masks_that_do_not_fit(tmp_path: Path, capsys):
    images, masks = some_slides(tmp_path, 4)
    other, missing, colour, _ = sorted(path.stem for path in images.iterdir())
    cv2.imwrite(str(masks / f"{other}.png"), np.zeros((512, 1024), np.uint8))
    (masks / f"{missing}.png").unlink()
    cv2.imwrite(str(masks / f"{colour}.png"), np.full((1024, 1024), 3, np.uint8))
    out = tmp_path / "out"
    code, text, err = cli(capsys, "build", images, "--masks", masks, "--out", out, *TREE)
    assert code == 1 and "1 done, 0 skipped, 3 failed" in text
    assert f"{other}.png: mask is 1024 x 512 pixels, its slide {other}.jpg is 1024 x 1024" in err
    assert f"{missing}.jpg: no mask {missing}.png, .tif, .xml or .geojson in {masks}" in err
    assert "class 3, but only classes 1 to 1 are expected" in err
    assert len(token_bytes(out)) == 1 and leftovers(out) == []


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def test_full_disk_injected(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    images, _ = some_slides(tmp_path, 2)
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        code, text, err = cli(capsys, "build", images, "--out", out, *TREE)
    assert code == 1 and "0 done, 0 skipped, 2 failed" in text
    assert err.count(".tokens.h5: No space left on device") == 2 and "Traceback" not in err
    assert token_bytes(out) == {} and leftovers(out) == []
    assert cli(capsys, "build", images, "--out", out, *TREE)[0] == 0
    assert len(token_bytes(out)) == 2


def test_a_write_that_really_fails(tmp_path: Path):
    """The kernel refuses files above 64 KiB; unlike a full disk it needs no mount, but takes the same way."""
    images, _ = some_slides(tmp_path, 2)
    out = tmp_path / "out"
    done = subprocess.run(
        command("build", images, "--out", out, *TREE),
        cwd=ROOT,
        env=plain_env(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(".tokens.h5: File too large") == 2 and "Traceback" not in done.stderr
    assert token_bytes(out) == {} and leftovers(out) == []


def test_full_disk_for_real(tmp_path: Path):
    images, _ = some_slides(tmp_path, 3)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        done = run("build", images, "--out", disk, *TREE)
        assert done.returncode == 1
        assert "1 done, 0 skipped, 2 failed" in done.stdout, done.stdout
        assert done.stderr.count("No space left on device") >= 2 and "Traceback" not in done.stderr
        assert len(token_bytes(disk)) == 1 and leftovers(disk) == []
        assert run("verify", disk).returncode == 0
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# As a process


def test_exit_codes_of_the_process(tmp_path: Path):
    out = tmp_path / "out"
    bad = run("build", IMAGE, "--out", out, "--resolution", "1024", "--patch", "16", "--length", "3")
    assert (bad.returncode, bad.stdout) == (64, "") and one_error(bad.stderr)
    assert run("build", IMAGE, "--out", out, *TREE).returncode == 0
    assert run("verify", out).returncode == 0
    target = out / "10003.tokens.h5"
    target.write_bytes(target.read_bytes()[:-5])
    found = run("verify", out)
    assert found.returncode == 1 and str(target) in found.stdout
    assert "0 of 1 token files are good, 1 is not" in found.stdout
    assert run("frobnicate").returncode == 64
    done = run("--help")
    assert done.returncode == 0
    listed = done.stdout.split("commands:")[1]
    for name in (
        "build",
        "verify",
        "inspect",
        "synth",
        "convert",
        "doctor",
        "export",
        "volume",
        "volume score",
        "volume reassemble",
        "pack",
        "unpack",
    ):
        assert re.search(rf"^    {name}  +\w", listed, re.MULTILINE), name


def test_help_teaches():
    text = run("build", "--help").stdout
    for word in ("examples:", "mpiexec -n 8", "--thresholds", "100,200", "default auto", "in pixels", "exit code"):
        assert word in text
    assert "--length" in run("inspect", "--help").stdout
    assert "fault" in run("verify", "--help").stdout


def test_a_plain_run_never_loads_mpi_or_torch(tmp_path: Path):
    code = (
        "import sys; from data_prep.__main__ import main; code = main(sys.argv[1:]);"
        "print([m for m in ('mpi4py', 'torch', 'matplotlib') if m in sys.modules]); sys.exit(code)"
    )
    args = [sys.executable, "-c", code, "build", IMAGE, "--out", str(tmp_path / "out"), *TREE]
    done = subprocess.run(args, cwd=ROOT, env=plain_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
