"""What a gigapixel build costs, as ratios measured in one run (never a test of wall-clock times):

  ratio       whole `build` on one rank over bare decoding: every level-0 tile once with imagecodecs   target <= 2.0
  efficiency  1 rank over 2 x 2 ranks; beside it, what two bare decodings at once reach                target >= 0.9
  memory      largest resident set of any rank                                                         target <= 1 GiB
  decoded     pixels decoded over pixels of level 0                                                    target <= 1.5
  skipped     share of the blocks seen to be too flat for an edge before Canny
  whole image the usual way at 16K: OpenSlide, OpenCV on the whole, best-first scan of a list          target >= 10 x

Run: python tests/benchmarks/bench_gigapixel.py [--side 65536] [--keep DIR] [--repeats 1] [--out rows.json]
The slide is made by `python -m data_prep synth` (about 35 % tissue); --keep keeps it for the next run.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CASES = (
    ("p=32 L=4096 auto", ["--patch", "32", "--length", "4096"]),
    ("p=8 L=16384 auto", ["--patch", "8", "--length", "16384"]),
    ("p=32 L=4096 100,200", ["--patch", "32", "--length", "4096", "--thresholds", "100,200"]),
)


def decode(path: Path) -> dict[str, float]:
    """Every tile of level 0, in file order: read, decode, drop."""
    import imagecodecs
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places, tables = list(zip(page.dataoffsets, page.databytecounts, strict=True)), page.jpegtables
    started_s, pixels = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        for offset, count in places:
            tile = imagecodecs.jpeg8_decode(os.pread(file.fileno(), count, offset), tables=tables)
            pixels += tile.shape[0] * tile.shape[1]
    return {"seconds": time.perf_counter() - started_s, "pixels": pixels, "bytes": sum(count for _, count in places)}


def usual(path: Path, side_px: int) -> dict[str, float]:
    """The whole image in memory: OpenSlide, OpenCV, and the scan of a list."""
    import cv2
    import numpy as np
    import openslide

    from data_prep.edges.canny import blur_for
    from tests.helpers.heap import list_scan

    cv2.setNumThreads(1)
    started_s = time.perf_counter()
    rgb = np.asarray(openslide.OpenSlide(path).read_region((0, 0), 0, (side_px, side_px)))[..., :3]
    gray = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
    blur = blur_for(side_px)
    edges = cv2.Canny(cv2.GaussianBlur(gray, (blur, blur), 0), 100, 200) != 0
    leaves = list_scan(edges, 8, 16384)
    for x, y, size in leaves:
        cv2.resize(rgb[y : y + size, x : x + size], (8, 8), interpolation=cv2.INTER_AREA)
    return {"seconds": time.perf_counter() - started_s}


def child(what: str, path: Path, side_px: int) -> None:
    found = decode(path) if what == "decode" else usual(path, side_px)
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(found))


def start(what: str, path: Path, side_px: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", what, str(path), "--side", str(side_px)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict[str, float]:
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a child of the benchmark ended with {process.returncode}")
    return json.loads(text)


def mpiexec() -> str:
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else "mpiexec"


def rank_with_memory() -> None:
    """Run the command line as a rank and leave its peak memory in the file named by the environment."""
    from data_prep.__main__ import main

    code = main(json.loads(os.environ["BENCH_ARGS"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Path(os.environ["BENCH_PEAKS"]).joinpath(str(os.getpid())).write_text(str(peak))
    sys.exit(code)


def build(path: Path, side_px: int, options: list[str], ranks: int, masks: Path | None) -> dict[str, object]:
    """One whole build in processes of their own."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out, peaks = Path(folder) / "tokens", Path(folder) / "peaks"
        peaks.mkdir()
        args = ["build", str(path), "--out", str(out), "--resolution", str(side_px), *options]
        args += ["--masks", str(masks)] if masks else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "BENCH_ARGS": json.dumps(args), "BENCH_PEAKS": str(peaks)}
        launch = [mpiexec(), "-n", str(ranks)] if ranks > 1 else []
        started_s = time.perf_counter()
        subprocess.run(
            [*launch, sys.executable, __file__, "--rank"],
            env=env,
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        whole_s = time.perf_counter() - started_s
        log = json.loads((out / "build_log.jsonl").read_text().splitlines()[-1])
        assert log["status"] == "done", log["reason"]
        return {
            "seconds": log["seconds"],
            "with_start_s": whole_s,
            "stages": log["stage_seconds"],
            **log["counted"],
            "peak_gib": max(float(file.read_text()) for file in peaks.iterdir()),
            "bytes": next(out.glob("*.tokens.h5")).read_bytes(),
        }


def best(runs: list[dict]) -> dict:
    return min(runs, key=lambda run: run["seconds"])


def gigapixel(path: Path, mask: Path, side_px: int, repeats: int) -> list[dict]:
    rows = []
    bare = best([result(start("decode", path, side_px)) for _ in range(repeats)])
    pair = [start("decode", path, side_px) for _ in range(2)]
    together_s = max(result(process)["seconds"] for process in pair)
    print(
        f"decode    {side_px} x {side_px}, {bare['bytes'] / 2**20:.0f} MiB of tiles: {bare['seconds']:.1f} s, "
        f"{bare['pixels'] / bare['seconds'] / 1e6:.0f} Mpx/s; two at once take {together_s:.1f} s each, so two ranks "
        f"can reach an efficiency of {bare['seconds'] / together_s:.2f}",
        flush=True,
    )
    rows.append({"what": "bare decode", "seconds": bare["seconds"], "two_at_once_s": together_s})
    for name, options in CASES:
        for masks in (None, mask.parent) if name == CASES[0][0] else (None,):
            one = best([build(path, side_px, options, 1, masks) for _ in range(repeats)])
            two = best([build(path, side_px, options, 2, masks) for _ in range(repeats)])
            assert one["bytes"] == two["bytes"], "one and two ranks gave different token files"
            ratio, efficiency = one["seconds"] / bare["seconds"], one["seconds"] / (2 * two["seconds"])
            label = name + (", with mask" if masks else "")
            print(
                f"build     {label}: 1 rank {one['seconds']:.1f} s, {ratio:.2f} x bare decoding (target <= 2.0); "
                f"2 ranks {two['seconds']:.1f} s, efficiency {efficiency:.2f} (target >= 0.9); "
                f"peak {max(one['peak_gib'], two['peak_gib']):.2f} GiB per rank (target <= 1); "
                f"decoded {one['decoded_px'] / bare['pixels']:.2f} x the slide (target <= 1.5), "
                f"{100 * one['blocks_skipped'] / one['blocks_total']:.0f} % of blocks skipped",
                flush=True,
            )
            print("          stages of 1 rank: " + ", ".join(f"{k} {v:.1f} s" for k, v in one["stages"].items()))
            rows.append(
                {
                    "what": label,
                    "ratio": ratio,
                    "efficiency": efficiency,
                    **{f"one_{k}": v for k, v in one.items() if k != "bytes"},
                    **{f"two_{k}": v for k, v in two.items() if k != "bytes"},
                }
            )
    return rows


def whole_image(folder: Path) -> list[dict]:
    side_px = 16384
    path = folder / f"synth_{side_px}.tif"
    make(path, None, side_px)
    theirs = result(start("usual", path, side_px))
    options = ["--patch", "8", "--length", "16384", "--thresholds", "100,200"]
    ours = build(path, side_px, options, 1, None)
    print(
        f"whole     {side_px} x {side_px}, p=8 L=16384: OpenSlide + OpenCV + list scan {theirs['seconds']:.1f} s and "
        f"{theirs['peak_gib']:.1f} GiB, build {ours['seconds']:.1f} s and {ours['peak_gib']:.2f} GiB: "
        f"{theirs['seconds'] / ours['seconds']:.0f} x faster (target >= 10)",
        flush=True,
    )
    return [
        {
            "what": "whole image at 16K",
            "theirs_s": theirs["seconds"],
            "theirs_peak_gib": theirs["peak_gib"],
            "ours_s": ours["seconds"],
            "ours_peak_gib": ours["peak_gib"],
        }
    ]


def make(path: Path, mask: Path | None, side_px: int) -> None:
    if path.exists() and (mask is None or mask.exists()):
        return
    args = [sys.executable, "-m", "data_prep", "synth", "--size", str(side_px), "--out", str(path), "--seed", "1"]
    subprocess.run([*args, "--force", *(["--mask-out", str(mask)] if mask else [])], cwd=ROOT, check=True)


def environment() -> dict[str, str]:
    import cv2
    import imagecodecs

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "commit": commit,
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "opencv": cv2.__version__,
        "imagecodecs": imagecodecs.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16384, help="side of the slide in pixels (default 16384)")
    parser.add_argument("--keep", type=Path, help="folder in which the slides stay for the next run")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many counts (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, with hardware, versions and commit")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "SLIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank_with_memory()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.side)
        return
    folder = args.keep or Path(tempfile.mkdtemp(prefix="bench_gigapixel_"))
    try:
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        slide, mask = folder / f"synth_{args.side}.tif", folder / "masks" / f"synth_{args.side}.tif"
        make(slide, mask, args.side)
        rows = gigapixel(slide, mask, args.side, args.repeats) + whole_image(folder)
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"side_px": args.side, "environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
