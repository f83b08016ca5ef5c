"""Large slides by regions: the same bytes as in memory, for any region side, any ranks, after any kill."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.build import run as build_run
from data_prep.build import slide as build_slide
from data_prep.build import steps as big_slide
from data_prep.build.log import read_log
from data_prep.build.options import BuildOptions
from data_prep.build.run import build, prepare_out, region_side
from data_prep.build.scratch import Scratch, ScratchError, remove_scratch, scratch_key, scratch_sides
from data_prep.edges.canny import edge_map
from data_prep.edges.scan import RegionSpec
from data_prep.system.files import writer_name
from data_prep.token_files.token_file import read_meta
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import command, leftovers, plain_env, run, some_slides, token_bytes
from tests.helpers.damaged_slides import damaged_slide
from tests.helpers.frames import counts_from_map
from tests.helpers.mpi import needs_mpi, run_on_ranks
from tests.helpers.region_builds import BY_REGIONS, REGION_OPTIONS, built_bytes, stop_after
from tests.helpers.repository import GLOMERULI, ROOT
from tests.helpers.slide_files import CMU


@pytest.fixture(scope="module")
def kidneys(tmp_path_factory):
    return some_slides(tmp_path_factory.mktemp("kidneys"), 1)


CASES = {
    "budget": {"resolution": 1024, "patch": 8, "length": 256, "masks": True},
    "fine patches": {"resolution": 1024, "patch": 1, "length": 4096, "masks": True},
    "coarse patches": {"resolution": 1024, "patch": 64, "length": 16, "masks": True, "thresholds": (50, 100)},
    "threshold rule": {"resolution": 1024, "patch": 2, "split_value": 30, "masks": True},
    "as the paper": {
        "resolution": 1024,
        "patch": 4,
        "split_value": 50,
        "length": 300,
        "fit": "drop",
        "thresholds": (100, 200),
        "packing": "strip",
        "masks": True,
    },
    "frame larger than slide": {"resolution": 4096, "patch": 16, "length": 512, "masks": True},
    "scaled down": {"resolution": 512, "patch": 8, "length": 200, "masks": True},
    "few leaves": {"resolution": 1024, "patch": 2, "length": 4, "masks": True},
    "more edges": {"resolution": 1024, "patch": 8, "length": 256, "masks": True, "auto_percent": 55},
    "fewer edges": {"resolution": 2048, "patch": 4, "length": 1024, "svs": True, "auto_percent": 97},
    "squashed": {"resolution": 1024, "patch": 8, "length": 128, "aspect": "squash", "svs": True},
    "no edge": {"resolution": 1024, "patch": 8, "length": 128, "thresholds": (2000, 2040)},
}


@pytest.mark.parametrize("name", CASES)
def test_any_region_side_gives_the_bytes_of_the_frame_in_memory(name: str, kidneys, tmp_path: Path):
    options = dict(CASES[name])
    images, masks = kidneys
    slides = [CMU] if options.pop("svs", False) else sorted(images.iterdir())
    if options.pop("masks", False):
        options["masks"] = masks
    size_px = options["resolution"]
    assert region_side(BuildOptions(**options), 1) == size_px
    expected = built_bytes(slides, tmp_path / "memory", **options)
    for side in (size_px // 8, size_px // 2):
        assert region_side(BuildOptions(**options, tile_px=side), 1) == max(side, options["patch"])
        assert built_bytes(slides, tmp_path / str(side), tile_px=side, **options) == expected, side


def test_three_classes_and_a_pool(kidneys, tmp_path: Path):
    images, _ = kidneys
    name = next(images.iterdir()).stem
    three = tmp_path / "masks"
    three.mkdir()
    ids = np.random.default_rng(0).integers(0, 4, (64, 64), np.uint8).repeat(16, 0).repeat(16, 1)
    tifffile.imwrite(three / f"{name}.tif", ids)
    options = {"resolution": 1024, "patch": 16, "length": 64, "masks": three, "classes": 3}
    slides = sorted(images.iterdir())
    expected = built_bytes(slides, tmp_path / "a", **options)
    assert built_bytes(slides, tmp_path / "b", jobs=3, tile_px=128, **options) == expected
    above = build(slides, BuildOptions(**{**options, "classes": 2, "tile_px": 256}), tmp_path / "b", rebuild=True)
    assert above[0].status == "failed" and "class 3, but only classes 1 to 2" in above[0].reason
    assert token_bytes(tmp_path / "b") == expected


@needs_mpi
@pytest.mark.mpi
def test_same_bytes_for_any_number_of_ranks(kidneys, tmp_path: Path):
    images, _ = kidneys
    args = ["build", CMU, images, *BY_REGIONS]
    assert run("build", CMU, images, *BY_REGIONS[:-2], "--out", tmp_path / "alone").returncode == 0
    expected = token_bytes(tmp_path / "alone")
    assert len(expected) == 2
    for ranks in (1, 2, 3, 4, 7):
        out = tmp_path / str(ranks)
        done = run_on_ranks(ranks, *args, "--out", out)
        assert done.returncode == 0 and "2 done, 0 skipped, 0 failed" in done.stdout, done.stderr
        assert token_bytes(out) == expected and leftovers(out) == []
    entry = next(e for e in read_log(tmp_path / "3") if e["slide"] == CMU.stem)
    kinds = {"scan", "limits", "edges", "light", "plan", "tree", "tokens", "write", "hash"}
    assert kinds <= set(entry["stage_seconds"])
    assert entry["counted"]["blocks_total"] > 0


def _killed_build(out: Path, after_s: float, rng: random.Random) -> bool:
    """Start a build on 2 ranks, kill -9 one of them after a while; whether it was still running."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    launcher = str(mpiexec) if mpiexec.exists() else "mpiexec"
    process = subprocess.Popen(
        [launcher, "-n", "2", *command("build", CMU, "--out", out, *BY_REGIONS)],
        cwd=ROOT,
        env=plain_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = f".{CMU.stem}.*.work"
    until_s = time.monotonic() + 60
    while process.poll() is None and not list(out.glob(work)) and time.monotonic() < until_s:
        time.sleep(0.01)
    time.sleep(after_s)
    ranks = [int(pid.name) for pid in Path("/proc").iterdir() if pid.name.isdigit() and _is_rank(pid, out)]
    if ranks:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    process.wait(60)
    for pid in ranks:  # the launcher ends the others; do not leave it to chance what the next build meets
        while Path(f"/proc/{pid}").exists() and _is_rank(Path(f"/proc/{pid}"), out):
            time.sleep(0.01)
    return bool(ranks)


def _is_rank(pid: Path, out: Path) -> bool:
    try:
        words = (pid / "cmdline").read_bytes().split(b"\0")
        return b"data_prep" in words and str(out).encode() in words and b"/python" in words[0]
    except OSError:
        return False


def check_killed_builds(tmp_path: Path, kills: int, longest_s: float) -> None:
    assert run("build", CMU, "--out", tmp_path / "calm", *BY_REGIONS).returncode == 0
    expected = token_bytes(tmp_path / "calm")
    rng = random.Random(kills)
    hit = 0
    for number in range(kills):
        out = tmp_path / f"killed{number}"
        hit += _killed_build(out, rng.random() * longest_s, rng)
        again = run("build", CMU, "--out", out, *BY_REGIONS)
        assert again.returncode == 0, again.stderr
        assert token_bytes(out) == expected and leftovers(out) == []
    assert hit >= kills // 2, "most kills came too late to mean anything"


@needs_mpi
@pytest.mark.mpi
def test_kill_of_any_rank_then_the_same_bytes(tmp_path: Path):
    check_killed_builds(tmp_path, 2, 0.8)


@pytest.mark.slow
@needs_mpi
@pytest.mark.mpi
def test_twenty_kills(tmp_path: Path):
    check_killed_builds(tmp_path, 20, 1.2)


@pytest.mark.parametrize("steps", [3, 12, 20, 33, 40, 54])
def test_only_what_was_not_done_is_done_again(steps: int, monkeypatch, tmp_path: Path):
    prepare_out(tmp_path)
    expected = built_bytes([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512)
    prepare_out(tmp_path / "all")
    everything = stop_after(monkeypatch, 10**6, tmp_path / "all", REGION_OPTIONS)
    out = tmp_path / "out"
    prepare_out(out)
    before = stop_after(monkeypatch, steps, out, REGION_OPTIONS)
    assert len(before) == steps < len(everything) and [name.split(".")[1] for name in leftovers(out)] == [CMU.stem]
    after = stop_after(monkeypatch, 10**6, out, REGION_OPTIONS)
    assert token_bytes(out) == expected and leftovers(out) == []
    # Twice are only the start and the hash of the source.
    assert len(before) + len(after) - len(everything) <= 2


@pytest.mark.parametrize("kind", ["scan", "maxima", "edges", "limits", "tree", "rows"])
def test_damaged_scratch_is_made_again(kind: str, monkeypatch, tmp_path: Path):
    out = tmp_path / "out"
    prepare_out(out)
    stop_after(monkeypatch, {"maxima": 12, "scan": 30, "limits": 30}.get(kind, 55), out, REGION_OPTIONS)
    files = sorted(out.glob(f".{CMU.stem}.*.work/{kind}*.arrays"))
    assert files
    data = bytearray(files[0].read_bytes())
    if kind == "tree":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    assert built_bytes([CMU], out, resolution=2048, patch=8, length=512, tile_px=512) == built_bytes(
        [CMU], tmp_path / "calm", resolution=2048, patch=8, length=512
    )


def test_scratch_of_other_parameters_is_not_used(monkeypatch, tmp_path: Path):
    out = tmp_path / "out"
    prepare_out(out)
    stop_after(monkeypatch, 30, out, BuildOptions(2048, 8, length=512, tile_px=512, thresholds=(30, 60)))
    assert built_bytes([CMU], out, resolution=2048, patch=8, length=512, tile_px=256) == built_bytes(
        [CMU], tmp_path / "calm", resolution=2048, patch=8, length=512
    )


def test_removed_scratch_is_told(monkeypatch, tmp_path: Path):
    prepare_out(tmp_path)
    stop_after(monkeypatch, 10, tmp_path, BuildOptions(2048, 8, length=400, tile_px=512))
    assert "interrupted build with other parameters" in build([CMU], REGION_OPTIONS, tmp_path)[0].reason
    assert build([CMU], REGION_OPTIONS, tmp_path, rebuild=True)[0].reason == ""


def test_a_slide_that_changes_while_it_is_built_is_refused(monkeypatch, tmp_path: Path):
    slide, out = tmp_path / "slide.svs", tmp_path / "out"
    shutil.copy(CMU, slide)
    real = build_run.run_step

    def touching(step, beat=None):
        if step.kind == "plan" and step.index == 0:
            os.utime(slide, ns=(1, 1))
        return real(step, beat)

    prepare_out(out)
    monkeypatch.setattr("data_prep.build.run.run_step", touching)
    outcome = build([slide], REGION_OPTIONS, out)[0]
    assert outcome.status == "failed" and "slide.svs: it or its mask changed while it was built" in outcome.reason
    assert token_bytes(out) == {} and leftovers(out) == []
    monkeypatch.setattr("data_prep.build.run.run_step", real)
    assert build([slide], REGION_OPTIONS, out)[0].status == "done" and leftovers(out) == []


def test_a_frame_in_memory_decodes_the_slide_once(monkeypatch, tmp_path: Path):
    counted = []
    real = build_slide.FrameReader.read

    def counting(reader, x, y, w, h):
        counted.append(w * h)
        return real(reader, x, y, w, h)

    monkeypatch.setattr(build_slide.FrameReader, "read", counting)
    built_bytes([CMU], tmp_path, resolution=2048, patch=8, length=512)
    width, height = read_meta(tmp_path / f"{CMU.stem}.tokens.h5")["content_wh"]
    assert sum(counted) == width * height


def test_a_frame_whose_parts_have_another_contrast_is_scanned_again(monkeypatch):
    """Thresholds guessed from the upper part are too high for the frame; the edges are those of OpenCV all the same."""
    rng = np.random.default_rng(0)
    rgb = np.full((4096, 2048, 3), 128, np.uint8)
    rgb[:1024] = rng.integers(0, 256, (1024, 2048, 1))
    rgb[1024:] += rng.integers(0, 6, (3072, 2048, 1)).astype(np.uint8)
    scans = []
    real = build_slide.scan_region
    monkeypatch.setattr(build_slide, "scan_region", lambda *args: (scans.append(args), real(*args))[1])
    spec = RegionSpec(4096, (2048, 4096), 16, 3, "auto", 4096, auto_percent=50)
    _, basis = build_slide._find_edges(lambda x, y, w, h: rgb[y : y + h, x : x + w], None, spec)
    frame = np.full((4096, 4096, 3), 255, np.uint8)
    frame[:, :2048] = rgb
    np.testing.assert_array_equal(basis.counts, counts_from_map(edge_map(frame, basis.lo, basis.hi, 3), 16))
    assert len(scans) == 2 and basis.edge_pixels == basis.counts.sum() > 10_000


def test_a_side_that_was_not_asked_for_is_the_one_that_was_begun(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(build_run, "IN_MEMORY_PX", 1024)
    out = tmp_path / "out"
    prepare_out(out)
    monkeypatch.setattr("data_prep.build.run.region_side", lambda options, workers: 512)
    options = BuildOptions(2048, 8, length=512)
    before = stop_after(monkeypatch, 10, out, options)
    monkeypatch.setattr("data_prep.build.run.region_side", lambda options, workers: 1024)
    after = stop_after(monkeypatch, 10**6, out, options)
    assert before.count("scan") + after.count("scan") == 4 * 3 + 4 or before.count("scan") >= 8
    assert token_bytes(out) == built_bytes([CMU], tmp_path / "calm", resolution=2048, patch=8, length=512, tile_px=2048)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path):
    out = tmp_path / "out"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    args = command("build", CMU, GLOMERULI / "images" / "10003.jpg", "--out", out, *BY_REGIONS[:-1], "1024")
    done = subprocess.run(args, cwd=ROOT, env=plain_env(), capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith(f"failed: {CMU.stem}"))
    assert "File too large" in line and ".work/" in line
    assert not list(out.rglob("*.tmp-*")) and token_bytes(out).keys() <= {"10003.tokens.h5"}
    again = run("build", CMU, "--out", out, *BY_REGIONS)
    assert again.returncode == 0 and f"{CMU.stem}.tokens.h5" in token_bytes(out)


def test_a_damaged_tile_is_in_file_log_and_table(tmp_path: Path):
    slide = tmp_path / "bad.tif"
    tile = damaged_slide(slide)
    out = tmp_path / "out"
    files = []
    tree = ["--resolution", "1024", "--patch", "8", "--length", "256"]
    for more in ([], ["--tile", "256"], ["--tile", "64"]):
        done = run("build", slide, "--out", out, *tree, "--rebuild", *more)
        assert done.returncode == 0, done.stderr
        where = f"first at level 0, x={tile[1]} y={tile[2]}"
        assert f"warning: bad: a damaged tile filled with white, {where}: " in done.stderr
        (noted,) = read_log(out)[-1]["damaged"]
        assert noted["tile"] == tile and "DEFLATE" in noted["cause"].upper() and noted["cause"] in done.stderr
        assert "a damaged tile" in done.stdout and "a damaged tile" in json.dumps(read_log(out)[-1]["warnings"])
        assert read_meta(out / "bad.tokens.h5")["damaged"] == [tile] and verify_file(out / "bad.tokens.h5") == []
        files.append((out / "bad.tokens.h5").read_bytes())
    assert files[0] == files[1] == files[2]
    for more in ([], ["--tile", "256"]):
        strict = run("build", slide, "--out", tmp_path / "strict", *tree, "--strict", *more)
        assert strict.returncode == 1 and "bad.tif: cannot read level 0" in strict.stderr, strict.stderr
        assert token_bytes(tmp_path / "strict") == {}


def test_scratch_says_what_is_wrong(tmp_path: Path):
    scratch = Scratch(tmp_path, "slide", scratch_key({"a": 1}, 512))
    scratch.begin()
    scratch.save("x", a=np.arange(3), b=np.ones(2))
    assert scratch.has("x") and list(scratch.load("x", "b", "none")) == ["b"]
    np.testing.assert_array_equal(scratch.load("x")["a"], [0, 1, 2])
    with pytest.raises(ScratchError, match=r"\.slide\..*-512\.work/y\.arrays: not a whole result"):
        scratch.load("y")
    scratch.begin()
    assert scratch.has("x") and scratch_sides(tmp_path, "slide", {"a": 1}) == [512]
    other = Scratch(tmp_path, "slide", scratch_key({"a": 2}, 512))
    other.begin()
    assert not other.has("x") and scratch_sides(tmp_path, "slide.x", {"a": 1}) == []
    assert remove_scratch(tmp_path, "slide", other.folder) == [scratch.folder] and other.folder.exists()
    # Of a build that lives, and of another slide: left alone.
    (other.folder / "manifest.json").write_text(json.dumps({"owner": writer_name().replace(str(os.getpid()), "1")}))
    assert remove_scratch(tmp_path, "slide") == remove_scratch(tmp_path, "slid") == []
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_builds_with_other_parameters_at_the_same_time_do_not_mix(monkeypatch, tmp_path: Path):
    """One stops halfway, another runs to its middle in the same folder, the first goes on: both as if alone."""
    first = BuildOptions(2048, 8, length=512, tile_px=512, thresholds=(100, 200))
    second = BuildOptions(2048, 8, length=512, tile_px=512, thresholds=(20, 40))
    monkeypatch.setattr(big_slide, "remove_scratch", lambda *args: [])  # the other build lives
    prepare_out(tmp_path / "both")
    stop_after(monkeypatch, 14, tmp_path / "both", first)
    stop_after(monkeypatch, 14, tmp_path / "both", second)
    for options in (first, second):
        alone = tmp_path / str(options.thresholds)
        prepare_out(alone)
        stop_after(monkeypatch, 10**6, alone, options)
        stop_after(monkeypatch, 10**6, tmp_path / "both", options)
        assert token_bytes(tmp_path / "both") == token_bytes(alone)


@pytest.mark.parametrize(
    ("options", "workers", "side"),
    [
        ({"resolution": 4096, "patch": 16}, 1, 4096),
        ({"resolution": 8192, "patch": 16}, 1, 4096),
        ({"resolution": 65536, "patch": 32}, 16, 8192),
        ({"resolution": 65536, "patch": 32}, 17, 4096),
        ({"resolution": 1024, "patch": 32, "tile_px": 700}, 1, 512),
        ({"resolution": 1024, "patch": 256, "tile_px": 64}, 1, 256),
        ({"resolution": 1024, "patch": 32, "tile_px": 5000}, 1, 1024),
    ],
)
def test_default_region_sides(options: dict, workers: int, side: int):
    assert region_side(BuildOptions(length=64, **options), workers) == side


def _mosaic(path: Path, fields: int) -> Path:
    """A JPEG-tiled slide of so many squares of 1024 px of real texture per side, written tile by tile."""
    rgb = np.asarray(tifffile.imread(CMU, key=0))

    def tiles():
        for row, column in np.ndindex(2 * fields, 2 * fields):
            which = (3 * (row // 2) + column // 2) % 4
            y, x = 900 * (which // 2) + 512 * (row % 2), 900 * (which % 2) + 512 * (column % 2)
            yield np.ascontiguousarray(rgb[y : y + 512, x : x + 512])

    tifffile.imwrite(
        path,
        tiles(),
        shape=(1024 * fields, 1024 * fields, 3),
        dtype=np.uint8,
        tile=(512, 512),
        photometric="rgb",
        compression="jpeg",
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("thresholds", ["auto", (100, 200)])
def test_8192_of_real_texture_by_regions_and_in_memory(thresholds, tmp_path: Path):
    slide = _mosaic(tmp_path / "mosaic.tif", 8)
    options = {"resolution": 8192, "patch": 8, "length": 16384, "thresholds": thresholds}
    expected = built_bytes([slide], tmp_path / "memory", tile_px=8192, **options)
    for side in (256, 1024, 4096):
        assert built_bytes([slide], tmp_path / str(side), jobs=2, tile_px=side, **options) == expected
        shutil.rmtree(tmp_path / str(side))


PEAK = """
import resource, sys
from data_prep.commands.parser import main
from data_prep.__main__ import main
from data_prep.__main__ import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_16384_in_bounded_memory(tmp_path: Path):
    slide = _mosaic(tmp_path / "mosaic.tif", 16)
    files = []
    for side in (1024, 4096, 16384):
        out = tmp_path / str(side)
        args = ["build", slide, "--out", out, "--resolution", 16384, "--patch", 8, "--length", 16384, "--tile", side]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, args)], cwd=ROOT, env=plain_env(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if side < 16384:
            assert int(done.stderr.split()[-1]) < 2**20, "more than 1 GiB resident"
        files.append(token_bytes(out))
    assert files[0] == files[1] == files[2]
