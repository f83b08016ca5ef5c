"""Make run folders that follow the contract of records, with plausible numbers, for the tests of the analysis."""

import json
from pathlib import Path

import cv2
import numpy as np

from analysis.runs.groups import group_runs
from analysis.runs.records import Row, load, rows_of
from launch.records.record import new_record
from tests.helpers.repository import GLOMERULI

STEMS = ("10003", "10063", "10064", "10133", "10183", "10184")
FLOORS = {"all_foreground": 0.0912, "all_background": 0.0, "otsu": 0.1034}
# experiment: what sets it apart, and the quality and cost it is given
SHAPES = {
    "demo_apf": {
        "patching": "apf",
        "patch": 16,
        "length": 256,
        "tokens_per_image": 256.0,
        "dice": 0.61,
        "seconds_per_image": 0.061,
        "dice_ceiling": 0.987,
        "steps": 940,
    },
    "demo_uniform_tokens": {
        "patching": "uniform",
        "patch": 64,
        "length": 256,
        "tokens_per_image": 256.0,
        "dice": 0.38,
        "seconds_per_image": 0.31,
        "dice_ceiling": 0.998,
        "steps": 186,
    },
    "demo_uniform_patch": {
        "patching": "uniform",
        "patch": 16,
        "length": 4096,
        "tokens_per_image": 4096.0,
        "dice": 0.12,
        "seconds_per_image": 0.94,
        "dice_ceiling": 0.999,
        "steps": 61,
    },
    "demo_tiled_unet": {
        "patching": "uniform",
        "patch": 256,
        "length": 16,
        "tokens_per_image": 16.0,
        "dice": 0.22,
        "model": "unet_tiled",
        "decoder": "conv",
        "attention_backend": None,
        "seconds_per_image": 0.112,
        "samples_per_image": 16.0,
        "dice_ceiling": 1.0,
        "steps": 1100,
    },
}


def record(experiment: str = "demo_apf", /, seed: int = 0, **changes) -> dict:
    """A whole record of schema 1, shaped like one of SHAPES; `changes` win."""
    shape = {
        "model": "unetr",
        "decoder": "leaf",
        "attention_backend": "sdpa (cpu)",
        **SHAPES.get(experiment, SHAPES["demo_apf"]),
    }
    rng = np.random.default_rng([seed, sum(map(ord, experiment))])
    mean = shape.pop("dice")
    per_slide = {s: float(np.clip(mean + rng.normal(0, 0.12), 0, 1)) for s in STEMS}
    values = {
        "run_id": f"{shape['model']}-{shape['decoder']}_{shape['patching']}_R1024_p{shape['patch']}_g2_s{seed}",
        "experiment": experiment,
        "status": "ok",
        "task": "segmentation",
        "resolution": 1024,
        "parameters": 2_400_000,
        "gpus": 2,
        "nodes": 1,
        "device": "cpu",
        "samples_per_image": 1.0,
        "device_name": "AMD EPYC 7B13",
        "engine": "fsdp",
        "precision": "fp32",
        "seed": seed,
        "epochs": 12,
        "train_seconds": 120.4,
        "preprocessing_seconds": 0.21,
        "dice_per_slide": per_slide,
        "dice": sum(per_slide.values()) / len(per_slide),
        "dice_pooled": mean,
        "floors": FLOORS,
        "n_train": 15,
        "n_test": len(STEMS),
        "peak_memory_gib": 1.7,
        "loss_final": 0.31,
        "data": "demo/tokens/apf",
        "split_sha256": "5f2a" * 16,
        "config_sha256": "09ab" * 16,
        "optimiser": "AdamW",
        "global_batch": 2,
        "commit": "8cfaba8" + "0" * 33,
        "started_at": "2026-11-20T10:00:00+00:00",
        "finished_at": "2026-11-20T10:03:00+00:00",
    }
    values["images_per_s"] = 1 / shape["seconds_per_image"]
    return new_record(**{**values, **shape, **changes})


def write_run(root: Path, raw: dict, metrics: bool = False, folder: str | None = None) -> Path:
    """Write one run folder and return it."""
    run = root / (folder or f"{raw['experiment']}/{raw['run_id']}")
    run.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps(raw))
    (run / "config.yaml").write_text(
        f"experiment: {raw['experiment']}\nmodel: {{name: {raw['model']}}}\ntrain: {{lr: 0.001, seed: {raw['seed']}}}\n"
    )
    environment = {
        "commit": raw["commit"],
        "python": "3.11.2",
        "versions": {"torch": "2.13.0", "deepspeed": None},
        "cpu": "AMD EPYC 7B13",
        "command": ["launch", "train", raw["experiment"]],
        "cores": 2,
    }
    (run / "env.json").write_text(json.dumps(environment))
    if metrics:
        write_metrics(run, raw)
    return run


def runs_in(root: Path) -> list[Row]:
    """The finished runs under a folder."""
    return rows_of(load(root).ok)


def rows_in(root: Path) -> list[Row]:
    """The rows of a table of the runs under a folder."""
    return rows_of(group_runs(load(root).ok))


def write_metrics(run: Path, raw: dict) -> None:
    """Write a metrics.jsonl with falling, noisy loss and rising Dice."""
    rng = np.random.default_rng(raw["seed"] + raw["patch"])
    lines = []
    for step in range(1, raw["steps"] + 1):
        share = step / raw["steps"]
        seconds = raw["train_seconds"] * share
        loss = 0.75 - 0.9 * (raw["dice"] or 0) * (1 - np.exp(-3 * share)) + rng.normal(0, 0.04)
        lines.append({"step": step, "epoch": step // 8, "train_seconds": seconds, "loss": float(loss), "lr": 1e-3})
        if step % max(1, raw["steps"] // 8) == 0:
            dice = (raw["dice"] or 0) * (1 - np.exp(-3 * share))
            lines.append({"step": step, "train_seconds": seconds, "val_dice": float(dice)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_predictions(run: Path, raw: dict, px: int = 512) -> None:
    """Write image, truth and a made-up prediction of the real test slides, as the trainer does."""
    folder = run / "predictions"
    folder.mkdir()
    rng = np.random.default_rng(raw["seed"] + raw["patch"])
    for stem in STEMS:
        image = cv2.resize(
            cv2.imread(str(GLOMERULI / "images" / f"{stem}.jpg")), (px, px), interpolation=cv2.INTER_AREA
        )
        truth = cv2.resize(
            cv2.imread(str(GLOMERULI / "masks" / f"{stem}.png"), 0), (px, px), interpolation=cv2.INTER_NEAREST
        )
        field = cv2.GaussianBlur(rng.normal(size=(px, px)).astype(np.float32), (0, 0), px / 24) * px / 12
        score = (
            cv2.GaussianBlur(truth.astype(np.float32), (0, 0), px / 60) - 0.5 + (1 - (raw["dice"] or 0)) * 0.4 * field
        )
        prediction = (score > 0).astype(np.uint8)
        cv2.imwrite(str(folder / f"image_{stem}.png"), image)
        cv2.imwrite(str(folder / f"truth_{stem}.png"), truth * 255)
        cv2.imwrite(str(folder / f"pred_{stem}.png"), prediction * 255)
        np.savez(folder / f"{stem}.npz", counts=np.array([[1, 2, 3]]))


def write_build_log(folder: Path, tokens: list[int | None], stems: list[str] | None = None) -> None:
    """Write the build_log.jsonl of a folder of token files."""
    folder.mkdir(parents=True)
    stems = stems or [f"s{i}" for i in range(len(tokens))]
    lines = [
        {"slide": s, "status": "done" if t is not None else "failed", "tokens": t, "seconds": 0.2}
        for s, t in zip(stems, tokens, strict=True)
    ]
    (folder / "build_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def demo_runs(root: Path) -> Path:
    """Write the four rows of the demo and their token folders, with curves and pictures; return the folder of runs."""
    rng = np.random.default_rng(3)
    for name in SHAPES:
        data = root / "tokens" / name
        lengths = (
            [int(n) for n in 256 - rng.integers(0, 90, 24)] if name == "demo_apf" else [SHAPES[name]["length"]] * 24
        )
        write_build_log(data, lengths)
        raw = record(name, data=str(data))
        run = write_run(root / "runs", raw, metrics=True)
        write_predictions(run, raw)
    return root / "runs"
