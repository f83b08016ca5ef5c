"""The losses of two checkouts, step by step and bit by bit: a refactoring changes no number of a training.

Run: python tests/benchmarks/same_losses.py OLD_CHECKOUT [NEW_CHECKOUT] [--models leaf,tiled] [--engines ddp]

Three small models train for 20 steps on two ranks (gloo, CPU, one thread each) under each engine, in both checkouts,
on token files that OLD_CHECKOUT built. Everything goes through the command lines. Prints one line per pair; exit code
1 when a loss differs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, RANKS, SIZE = 20, 2, 256
SAMPLES = Path("data_prep") / "sample_data" / "glomeruli24"
ADAPTIVE = ["data.patch=8", "data.length=64"]
SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "model.mlp_dim=64"]
# name: folder of token files, settings
MODELS = {
    "unetr": ("apf", [*ADAPTIVE, *SMALL, "model.decoder=raster", "model.position=slot", "model.feature_size=4"]),
    "leaf": ("apf", [*ADAPTIVE, *SMALL, "model.decoder=leaf_unet", "model.position=geom", "model.leaf_base=4"]),
    "tiled": (
        "tiles",
        ["data.kind=tiles", "data.patching=uniform", "data.patch=64", "data.length=16", "data.crop_px=64",
         "model.name=unet_tiled", "model.widths=[4,8,16]"],
    ),
}  # fmt: skip
ENGINES = ("ddp", "fsdp", "deepspeed")
BUILDS = {
    "apf": ["--patch", "8", "--length", "64"],
    "tiles": ["--patch", "64", "--patching", "uniform"],
}


def environment(**more: str) -> dict[str, str]:
    """The environment without what a launcher may have set; one thread per process."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "MPI_", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def build(checkout: Path, folder: Path) -> None:
    """The token files."""
    samples = checkout / SAMPLES
    for name, words in BUILDS.items():
        command = ["-m", "data_prep", "build", str(samples / "images"), "--masks", str(samples / "masks"), *words]
        command += ["--resolution", str(SIZE), "--out", str(folder / name)]
        subprocess.run([sys.executable, *command], cwd=checkout, env=environment(), check=True, capture_output=True)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(checkout: Path, files: Path, out: Path, model: str, engine: str) -> list[str]:
    """Losses and gradient norms of every step, as the text of metrics.jsonl has them."""
    folder, settings = MODELS[model]
    words = [
        f"data.dir={files / folder}", f"data.split={checkout / SAMPLES / 'split.json'}", f"data.resolution={SIZE}",
        "data.jitter=0.2", *settings, f"engine.name={engine}", "engine.threads=1", "engine.device=cpu",
        "train.batch=4", f"train.max_steps={STEPS}", "train.max_seconds=null", "train.seed=3", "train.log_every=1",
        "eval.every_steps=null", "eval.pictures_px=0", "checkpoint.every_seconds=null", f"run_root={out}", "run_id=run",
    ]  # fmt: skip
    port, processes = str(free_port()), []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "launch", "train", "smoke", *words], cwd=checkout, env=environment(**place),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{checkout}: {model} under {engine} failed:\n{said[0][-3000:]}{said[-1][-3000:]}")
    (metrics,) = out.rglob("metrics.jsonl")
    # kept as text, since floats that print alike are alike
    lines = [json.loads(line, parse_float=str) for line in metrics.read_text().splitlines()]
    return [f"loss {line['loss']} grad_norm {line.get('grad_norm')}" for line in lines if "loss" in line]


def main() -> int:
    """Compare all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=Path())
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)}")
    asked = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        build(asked.old.resolve(), scratch / "tokens")
        for model in asked.models.split(","):
            for engine in asked.engines.split(","):
                started_s = time.monotonic()
                old, new = (
                    train(checkout.resolve(), scratch / "tokens", scratch / f"{model}_{engine}_{name}", model, engine)
                    for name, checkout in (("old", asked.old), ("new", asked.new))
                )
                differ = [step for step, pair in enumerate(zip(old, new, strict=False), 1) if pair[0] != pair[1]]
                same = not differ and len(old) == len(new) == STEPS
                wrong += not same
                told = f"{len(old)} steps, last {old[-1]}" if same else f"{len(old)} and {len(new)} steps"
                if differ:
                    told += f", first at step {differ[0]}: {old[differ[0] - 1]} and {new[differ[0] - 1]}"
                took = f"{time.monotonic() - started_s:.0f} s"
                print(f"{model:<6} {engine:<10} {'same' if same else 'DIFFERENT'}: {told}  ({took})", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
