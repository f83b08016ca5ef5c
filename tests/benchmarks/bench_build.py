"""What a build costs, as ratios measured in one run (never a test of wall-clock times):

  tree    edge map of 8192 x 8192 to L=16384 leaves, against a plain-Python best-first scan of a list   target >= 20 x
  build   a JPEG-tiled TIFF of 16384 x 16384 to its token file, against only decoding it                target <= 4 x
  memory  largest resident set of that build, in a process of its own                                   target < 1.5 GiB

Run: python tests/benchmarks/bench_build.py [--side 16384] [--repeats 2]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2

from data_prep.build.options import BuildOptions
from data_prep.build.run import build as build_slides
from data_prep.edges.canny import edge_map
from data_prep.slides.open import open_slide
from data_prep.tree.quadtree import budget_tree
from tests.helpers.frames import counts_from_map
from tests.helpers.heap import list_scan
from tests.helpers.mosaics import TILE_PX, mosaic, write_mosaic

LENGTH = 16384


def decode(path: Path) -> None:
    """Read every pixel once with the reader that build uses."""
    step = 2048
    with open_slide(path) as slide:
        width, height = slide.size_wh
        for y in range(0, height, step):
            for x in range(0, width, step):
                slide.read(0, x, y, min(step, width - x), min(step, height - y))


def build(path: Path, out: Path, side_px: int) -> None:
    """One whole build, from the slide to the renamed token file."""
    (outcome,) = build_slides([path], BuildOptions(side_px, 16, length=LENGTH), out, rebuild=True)
    assert outcome.status == "done", outcome.reason
    print(json.dumps(outcome.stage_seconds), file=sys.stderr)


def child(what: str, path: Path, out: Path, side_px: int) -> None:
    """Time one of the two in this fresh process and print seconds (wall clock, processor) and peak memory."""
    cv2.setNumThreads(1)
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    decode(path) if what == "decode" else build(path, out, side_px)
    seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_gib": peak_gib}))


def in_child(what: str, path: Path, out: Path, side_px: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(path), str(out), "--side", str(side_px)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def timed(function: Callable[[], object]) -> tuple[float, object]:
    started_s = time.perf_counter()
    result = function()
    return time.perf_counter() - started_s, result


def bench_tree(side_px: int = 8192, p_min: int = 8) -> None:
    cv2.setNumThreads(1)
    edges = edge_map(mosaic(side_px), 100, 200, 9)

    def ours() -> object:
        return budget_tree(counts_from_map(edges, p_min), p_min, LENGTH)

    ours_s, leaves = min((timed(ours) for _ in range(3)), key=lambda pair: pair[0])
    scan_s, expected = timed(lambda: list_scan(edges, p_min, LENGTH))
    assert sorted(zip(*leaves.xy.T.tolist(), leaves.size.tolist(), strict=True)) == expected, "trees differ"
    print(
        f"tree    {side_px} x {side_px}, L={LENGTH}, same {len(leaves)} leaves: {1000 * ours_s:.0f} ms, list scan "
        f"{scan_s:.2f} s: {scan_s / ours_s:.0f} x faster (target >= 20)",
        flush=True,
    )


def bench_build(side_px: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench_build_") as folder:
        path, out = Path(folder) / "mosaic.tif", Path(folder)
        write_mosaic(path, side_px)
        with open_slide(path) as slide:
            how = f"{path.stat().st_size / 2**20:.0f} MiB JPEG tiles of {TILE_PX}, read by {slide.reader}"
        runs = [(in_child("decode", path, out, side_px), in_child("build", path, out, side_px)) for _ in range(repeats)]
    decode_s, build_s = (min(run[i]["seconds"] for run in runs) for i in (0, 1))
    cpu_ratio = min(run["cpu_s"] for _, run in runs) / min(run["cpu_s"] for run, _ in runs)
    peak_gib = max(run["peak_gib"] for _, run in runs)
    print(
        f"build   {side_px} x {side_px}, {how}: {build_s:.1f} s, decoding alone {decode_s:.1f} s: "
        f"{build_s / decode_s:.2f} x, {cpu_ratio:.2f} x in processor time (target <= 4)"
    )
    print(f"memory  peak resident set of that build {peak_gib:.2f} GiB (target < 1.5)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16384, help="side of the slide in pixels (default 16384)")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest of so many counts (default 2)")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SLIDE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, path, out = args.child
        child(what, Path(path), Path(out), args.side)
        return
    bench_tree()
    bench_build(args.side, args.repeats)


if __name__ == "__main__":
    main()
