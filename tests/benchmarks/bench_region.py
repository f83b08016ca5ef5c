"""What one region of a frame costs, in nanoseconds and millions of pixels per second on one core, and against decoding.

Texture is the bundled kidney fields, a different one in every 1024 px square, with the blur of a 65,536 px frame. Three
tables: every stage on tissue only; a region of tissue, of white and of faint noise; and a region that is tissue in a
disc on white, as a slide is, against decoding the same pixels from JPEG tiles.

Run: python tests/benchmarks/bench_region.py [--side 4096] [--share 0.35] [--patch 8]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import tifffile  # noqa: E402

from data_prep import region as kernel  # noqa: E402
from data_prep.edges import REACH_PX, auto_thresholds, block_edges, blurred, gradient, luma, maxima  # noqa: E402
from data_prep.hysteresis import resolve_block  # noqa: E402
from data_prep.region import RegionScan, RegionSpec, edges_of_luma, scan_region  # noqa: E402
from tests.benchmarks.bench_build import TILE_PX, mosaic_block, texture  # noqa: E402

BLUR = 15
FIXED = (100, 200)


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """The fastest of a few runs, processor time."""
    best = float("inf")
    for _ in range(repeats):
        started_s = time.process_time()
        function()
        best = min(best, time.process_time() - started_s)
    return best


def line(name: str, spent_s: float, pixels: int) -> None:
    print(f"  {name:<44}{1e9 * spent_s / pixels:7.2f} ns/px{pixels / spent_s / 1e6:9.0f} Mpx/s", flush=True)


def tissue(side: int) -> np.ndarray:
    fields = texture()
    rows = [np.hstack([mosaic_block(fields, r, c) for c in range(max(1, side // 1024))])
            for r in range(max(1, side // 1024))]  # fmt: skip
    return np.ascontiguousarray(np.vstack(rows)[:side, :side])


def slide_like(rgb: np.ndarray, share: float) -> np.ndarray:
    """Tissue in a disc of this share of the area, white around."""
    side = len(rgb)
    y, x = np.ogrid[:side, :side]
    disc = (x - side / 2) ** 2 + (y - side / 2) ** 2 < share / np.pi * side**2
    return np.where(disc[..., None], rgb, np.uint8(255))


def scan(rgb: np.ndarray, spec: RegionSpec) -> RegionScan:
    return scan_region(lambda x, y, w, h: rgb[y : y + h, x : x + w], None, spec, 0, 0)


def specs(side: int, patch: int) -> dict[str, RegionSpec]:
    return {
        str(thresholds): RegionSpec(side, (side, side), patch, BLUR, thresholds, side) for thresholds in ("auto", FIXED)
    }


def region_seconds(rgb: np.ndarray, spec: RegionSpec) -> tuple[float, float]:
    """Seconds of the scan, and of the edges from spooled luma (0 with fixed thresholds)."""
    scan_s = seconds(lambda: scan(rgb, spec))
    if spec.thresholds != "auto":
        return scan_s, 0.0
    done = scan(rgb, spec)
    lo, hi = auto_thresholds(done.hist)
    return scan_s, seconds(lambda: edges_of_luma(done.luma, spec, 0, 0, lo, hi))


def bench_stages(rgb: np.ndarray, patch: int) -> None:
    """Every stage over all blocks of a picture, so that caches and branches see what they see in a run."""
    step, pixels = kernel.BLOCK_PX, rgb.shape[0] * rgb.shape[1]
    bands = [rgb[y : y + step] for y in range(0, len(rgb), step)]
    grays = [luma(band) for band in bands]
    smooth = [blurred(gray, BLUR) for gray in grays]
    blocks = [band[:, x : x + step] for band in smooth for x in range(0, rgb.shape[1], step)]
    grads = [gradient(block) for block in blocks]
    sums = np.zeros((3, *(n // 8 for n in rgb.shape[:2])), np.uint16)
    hist = sum(np.bincount(size.ravel(), minlength=2041) for _, _, size in grads)
    auto = auto_thresholds(hist)
    print(f"stages on tissue, {rgb.shape[1]} x {rgb.shape[0]}, blur {BLUR}, patch {patch}")
    for name, stage in {
        "minimum and maximum of RGB": lambda: [cv2.minMaxLoc(band.reshape(len(band), -1)) for band in bands],
        "sums over 8 x 8": lambda: [
            kernel._sum_colours(sums, band, i * step, 8, [False] * -(-band.shape[1] // step))
            for i, band in enumerate(bands)
        ],
        "gray": lambda: [luma(band) for band in bands],
        f"blur {BLUR}": lambda: [blurred(gray, BLUR) for gray in grays],
        "gradient": lambda: [int(gradient(block)[2][0, 0]) for block in blocks],
        "histogram": lambda: [cv2.calcHist([size.view(np.uint16)], [0], None, [2041], [0, 2041]) for *_, size in grads],
    }.items():
        line(name, seconds(stage), pixels)
    for lo, hi in (auto, FIXED):
        weak = [cv2.Canny(dx, dy, lo, lo) != 0 for dx, dy, _ in grads]
        strong = [size > hi for *_, size in grads]
        print(f"  thresholds {lo},{hi}: {100 * np.mean([w.mean() for w in weak]):.1f} % weak pixels")
        for name, stage in {
            "  Canny(lo, lo)": lambda lo=lo: [cv2.Canny(dx, dy, lo, lo).any() for dx, dy, _ in grads],
            "  the same by arithmetic (maxima)": lambda lo=lo: [maxima(*grad, lo).any() for grad in grads],
            "  components": lambda weak=weak: [
                cv2.connectedComponentsWithAlgorithm(w.view(np.uint8), 8, cv2.CV_16U, cv2.CCL_BOLELLI) for w in weak
            ],
            "  components, decisions and counts": lambda weak=weak, strong=strong: [
                resolve_block(w, s, 0, 0, patch) for w, s in zip(weak, strong, strict=True)
            ],
            "  a whole block from blurred luma": lambda lo=lo, hi=hi: [
                block_edges(
                    block, (slice(REACH_PX, -REACH_PX),) * 2, (0, 0, *(n - 2 * REACH_PX for n in block.shape[::-1])),
                    lo, hi, patch,
                )
                for block in blocks
            ],
        }.items():  # fmt: skip
            line(name, seconds(stage), pixels)


def bench_regions(rgb: np.ndarray, patch: int) -> None:
    side = len(rgb)
    faint = np.random.default_rng(0).integers(240, 246, rgb.shape, np.uint8)
    for what, picture in {"tissue": rgb, "white": np.full_like(rgb, 255), "faint noise": faint}.items():
        print(f"a region of {what}, {side} x {side}")
        for name, spec in specs(side, patch).items():
            scan_s, edges_s = region_seconds(picture, spec)
            line(f"thresholds {name}: scan", scan_s, side * side)
            if edges_s:
                line("  and edges of its luma", edges_s, side * side)


def bench_against_decode(rgb: np.ndarray, share: float, patch: int) -> None:
    side = len(rgb)
    picture = slide_like(rgb, share)
    with tempfile.TemporaryDirectory(prefix="bench_region_") as folder:
        path = Path(folder) / "slide.tif"
        tifffile.imwrite(path, picture, tile=(TILE_PX, TILE_PX), photometric="rgb", compression="jpeg",
                         compressionargs={"level": 90}, metadata=None)
        decode_s = seconds(lambda: tifffile.imread(path, maxworkers=1))
        picture = tifffile.imread(path, maxworkers=1)  # with what JPEG adds
    print(f"{share:.0%} tissue on white, {side} x {side}, against decoding it from JPEG tiles of {TILE_PX} px")
    line("decoding, tifffile and imagecodecs", decode_s, side * side)
    for name, spec in specs(side, patch).items():
        scan_s, edges_s = region_seconds(picture, spec)
        line(f"thresholds {name}: scan and edges", scan_s + edges_s, side * side)
        total = decode_s + scan_s + edges_s
        print(f"  with decoding {total / decode_s:.2f} x the bare decode, "
              f"{1 + (scan_s + edges_s) / (2.4e-9 * side * side):.2f} x one of 2.4 ns/px")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="side of the region in pixels (default 4096)")
    parser.add_argument("--share", type=float, default=0.35, help="share of tissue against decoding (default 0.35)")
    parser.add_argument("--patch", type=int, default=8, help="side of the smallest leaf (default 8)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rgb = tissue(args.side)
    bench_stages(rgb, args.patch)
    bench_regions(rgb, args.patch)
    bench_against_decode(rgb, args.share, args.patch)


if __name__ == "__main__":
    main()
