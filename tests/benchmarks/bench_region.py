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

import cv2
import numpy as np
import tifffile

from data_prep.edges import scan as kernel
from data_prep.edges.canny import ROOM, auto_thresholds, blurred, gaussian, luma
from data_prep.edges.hysteresis import resolve_pixels
from data_prep.edges.kernels.pixels import cell_ranges, maxima, take
from data_prep.edges.scan import RegionScan, RegionSpec, edges_of_maxima, scan_region
from tests.helpers.frames import gradient
from tests.helpers.mosaics import TILE_PX, mosaic

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
    """Seconds of the scan, and of the edges from the maxima it kept (0 with fixed thresholds)."""
    scan_s = seconds(lambda: scan(rgb, spec))
    if spec.thresholds != "auto":
        return scan_s, 0.0
    done = scan(rgb, spec)
    lo, hi = auto_thresholds(done.hist)
    return scan_s, seconds(lambda: edges_of_maxima(done.maxima, spec, 0, 0, lo, hi))


def bench_stages(rgb: np.ndarray, patch: int) -> None:
    """Every stage over all blocks of a picture, beside what OpenCV takes for the same, each a pass of its own."""
    step, halo, (h, w) = kernel.BLOCK_PX, BLUR // 2, rgb.shape[:2]
    pixels, flat = h * w, np.ascontiguousarray(rgb).reshape(h, 3 * w)
    gray = cv2.copyMakeBorder(luma(rgb), halo, halo, halo, halo, cv2.BORDER_REFLECT_101)
    sums, hist = np.zeros((3, h // 8, w // 8), np.uint16), np.zeros((2, 2048), np.uint32)
    low, high = (np.zeros([-(-side // 32) for side in gray.shape], np.uint8) for _ in range(2))
    frame = (halo, halo, halo + w, halo + h)
    corners = [(x, y) for y in range(0, h, step) for x in range(0, w, step)]
    sizes = {(x, y): (min(step, w - x), min(step, h - y)) for x, y in corners}
    place, size = np.empty(step * step + ROOM, np.uint32), np.empty(step * step + ROOM, np.uint16)

    def find(at: tuple[int, int], lo: int, counted: bool) -> tuple[np.ndarray, np.ndarray]:
        (x, y), (across, down) = (at[0] + halo, at[1] + halo), sizes[at]
        n = maxima(
            gray,
            frame,
            (x, y, x + across, y + down),
            gaussian(BLUR),
            lo,
            frame[2:] if counted else (0, 0),
            hist,
            (0, across),
            place,
            size,
        )
        return place[:n], size[:n]

    for at in corners:
        find(at, 2040, True)
    auto = auto_thresholds(hist.sum(0)[:2041])
    smooth = blurred(luma(rgb), BLUR)
    grads = gradient(smooth)
    print(f"stages on tissue, {w} x {h}, blur {BLUR}, patch {patch}")
    for name, stage in {
        "gray and sums over 8 x 8": lambda: take(flat, (0, 0), (0, 0, w, h), gray, (-halo, -halo), sums, 8),
        "  OpenCV: gray alone": lambda: luma(rgb),
        "smallest and largest of 32 x 32": lambda: cell_ranges(gray, 32, low, high),
        f"  OpenCV: blur {BLUR} alone": lambda: blurred(gray, BLUR),
        "  OpenCV: gradient alone": lambda: gradient(smooth),
        "  OpenCV: histogram alone": lambda: cv2.calcHist([grads[2].view(np.uint16)], [0], None, [2041], [0, 2041]),
    }.items():
        line(name, seconds(stage), pixels)
    for lo, hi in (auto, FIXED):
        found = [tuple(part.copy() for part in find(at, lo, False)) for at in corners]
        print(f"  thresholds {lo},{hi}: {100 * sum(len(pixel) for pixel, _ in found) / pixels:.1f} % weak pixels")
        for name, stage in {
            "  blur, gradient, histogram, maxima": lambda lo=lo: [find(at, lo, True) for at in corners],
            "  the same without the histogram": lambda lo=lo: [find(at, lo, False) for at in corners],
            "    OpenCV: Canny(lo, lo) of the gradient": lambda lo=lo: cv2.Canny(*grads[:2], lo, lo),
            "  components, decisions and counts": lambda found=found, lo=lo, hi=hi: [
                resolve_pixels(*part, (lo, hi), (*at, *sizes[at]), patch)
                for part, at in zip(found, corners, strict=True)
            ],
        }.items():
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
                line("  and edges of its maxima", edges_s, side * side)


def bench_against_decode(rgb: np.ndarray, share: float, patch: int) -> None:
    side = len(rgb)
    picture = slide_like(rgb, share)
    with tempfile.TemporaryDirectory(prefix="bench_region_") as folder:
        path = Path(folder) / "slide.tif"
        tifffile.imwrite(
            path,
            picture,
            tile=(TILE_PX, TILE_PX),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 90},
            metadata=None,
        )
        decode_s = seconds(lambda: tifffile.imread(path, maxworkers=1))
        picture = tifffile.imread(path, maxworkers=1)  # with what JPEG adds
    print(f"{share:.0%} tissue on white, {side} x {side}, against decoding it from JPEG tiles of {TILE_PX} px")
    line("decoding, tifffile and imagecodecs", decode_s, side * side)
    for name, spec in specs(side, patch).items():
        scan_s, edges_s = region_seconds(picture, spec)
        line(f"thresholds {name}: scan and edges", scan_s + edges_s, side * side)
        total = decode_s + scan_s + edges_s
        print(
            f"  with decoding {total / decode_s:.2f} x the bare decode, "
            f"{1 + (scan_s + edges_s) / (2.4e-9 * side * side):.2f} x one of 2.4 ns/px"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="side of the region in pixels (default 4096)")
    parser.add_argument("--share", type=float, default=0.35, help="share of tissue against decoding (default 0.35)")
    parser.add_argument("--patch", type=int, default=8, help="side of the smallest leaf (default 8)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rgb = np.ascontiguousarray(mosaic(args.side)[: args.side, : args.side])
    bench_stages(rgb, args.patch)
    bench_regions(rgb, args.patch)
    bench_against_decode(rgb, args.share, args.patch)


if __name__ == "__main__":
    main()
