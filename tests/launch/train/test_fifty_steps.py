"""Each model learns something in fifty steps on real pictures, from `data_prep build` to `launch train`."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from launch.config.model import MODELS
from launch.experiments.load import load
from launch.records.record import read_record
from tests.helpers.mammography import MODELS as MAMMOGRAPHY
from tests.helpers.repository import GLOMERULI, ROOT
from tests.helpers.small_runs import Group, clean_env, finish_well, free_port, launch_rank, losses

FRAME_PX, CROP_PX, SIDE_PX = 256, 256, 64

NARROW = ["model.width=48", "model.depth=3", "model.heads=4", "model.mlp_dim=96"]
TRANSUNET = [
    *NARROW,
    "model.stem_width=8",
    "model.units=[1,1,1]",
    "model.decoder_widths=[24,16,16,8]",
    "model.norm=instance",
]
SWIN = ["model.feature_size=12", "model.depths=[1,1,1,1]", "model.heads=[1,2,3,4]", "model.window=4"]
TILES = ["data.kind=tiles", "data.crop_px=64", "data.foreground_crops=0.5", "model.layout=tiles", "train.batch=8"]
# name: (model, files, settings, slow)
SEGMENTATION = {
    "transunet": ("transunet", "apf", TRANSUNET, False),
    "transunet-uniform": ("transunet", "uniform", TRANSUNET, True),
    "transunet-tiles": ("transunet", "uniform", [*TRANSUNET, *TILES], True),
    "swin_unetr": ("swin_unetr", "apf", SWIN, True),
    "vit_seg": ("vit_seg", "apf", [*NARROW, "model.position=both"], True),
    "unetr-raster": ("unetr", "apf", [*NARROW, "model.decoder=raster"], True),
    "unet": ("unet_tiled", "uniform", [*TILES[:3], "model.widths=[8,16,32]", "train.batch=8"], True),
}
SMALL = ["model.width=48", "model.depth=3", "model.heads=4"]
HIPT = [
    "model.scales=[4,16,64]",
    "model.widths=[32,32]",
    "model.depths=[2,2,1]",
    "model.heads=[4,4,4]",
    "model.table_side=4",
    "model.dropout=0",
]
PICTURES = ["data.kind=images", "data.patch=1", "data.length=1"]
LARGE = ["train.batch=8", "train.lr=3e-4"]  # networks that have one size only
CLASSIFICATION = {
    "apf_vit": ("apf_vit", "apf", SMALL, False),
    "apf_vit-uniform-cls": ("apf_vit", "uniform", [*SMALL, "model.pool=cls", "model.position=slot"], True),
    "vit": ("vit", "pictures", [*SMALL, *PICTURES, "model.patch_px=8"], True),
    "hipt": ("hipt", "uniform", HIPT, True),
    "hipt-pictures": ("hipt", "pictures", [*HIPT, *PICTURES], True),
    "rivit": (
        "rivit",
        "pictures",
        [
            *PICTURES,
            "model.grid_px=32",
            "model.depth=3",
            "data.sizes=[64,48,32]",
            "train.scale_distill=1",
            "data.mirror=true",
            "data.flips=false",
            "eval.sizes=[96]",
        ],
        True,
    ),
    "hiri_vit": ("hiri_vit", "pictures", [*PICTURES, *LARGE, "train.ema_decay=0.9", "train.distill=1"], True),
    "hiri_body": ("hiri_body", "pictures", [*PICTURES, *LARGE], True),
}


def test_every_model_is_trained_here_or_with_the_mammograms():
    trained = {case[0] for case in (*SEGMENTATION.values(), *CLASSIFICATION.values())}
    assert trained | {load(f"{name}_patch").model.name for name in MAMMOGRAPHY} == set(MODELS)
    short = {case[0] for case in (*SEGMENTATION.values(), *CLASSIFICATION.values()) if not case[-1]}
    assert short == {"transunet", "apf_vit"}  # and HCT, with the mammograms


def cases(table):
    return [pytest.param(name, marks=pytest.mark.slow if table[name][-1] else ()) for name in table]


def run_module(*words: str) -> None:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def build(pictures: Path, out: Path, size: int, *more: str) -> None:
    run_module("data_prep", "build", str(pictures), "--out", str(out), "--resolution", str(size), *more)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """The 24 slides in frames of 256 px: 64 adaptive tokens of 8 px, or 16-px squares; each made when asked for."""
    root = tmp_path_factory.mktemp("slides")
    how = {"apf": ["--patch", "8", "--length", "64"], "uniform": ["--patch", "16", "--patching", "uniform"]}

    def folder(files: str) -> Path:
        if not (root / files).exists():
            masks = ["--masks", str(GLOMERULI / "masks")]
            build(GLOMERULI / "images", root / files, FRAME_PX, *how[files], *masks)
        return root / files

    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    """Crops on glomeruli (1) and away from them (0), each a slide of 64 px of its own; split by slide."""
    root = tmp_path_factory.mktemp("crops")
    (root / "pictures").mkdir()
    split: dict[str, list[str]] = {}
    rows, rng = ["name,label"], np.random.default_rng(0)
    for part, names in json.loads((GLOMERULI / "split.json").read_text()).items():
        split[part] = []
        for name in names:
            image = cv2.imread(str(GLOMERULI / "images" / f"{name}.jpg"))
            mask = cv2.imread(str(GLOMERULI / "masks" / f"{name}.png"), cv2.IMREAD_GRAYSCALE) > 0
            made = [0, 0]
            for _ in range(300):
                y, x = (int(v) for v in rng.integers(0, 1024 - CROP_PX, 2))
                share = mask[y : y + CROP_PX, x : x + CROP_PX].mean()
                label = 1 if share > 0.25 else 0
                if made[label] < 2 and (label or share == 0):
                    own = f"{name}_{label}{made[label]}"
                    crop = cv2.resize(
                        image[y : y + CROP_PX, x : x + CROP_PX], (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA
                    )
                    cv2.imwrite(str(root / "pictures" / f"{own}.png"), crop)
                    made[label] += 1
                    split[part].append(own)
                    rows.append(f"{own},{label}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "split.json").write_text(json.dumps(split))
    return root


def token_files(crops: Path, files: str) -> Path:
    """The crops as token files, made when asked for; the pictures as they are."""
    how = {"apf": ["--patch", "4", "--length", "64"], "uniform": ["--patch", "16", "--patching", "uniform"]}
    if files != "pictures" and not (crops / files).exists():
        build(crops / "pictures", crops / files, SIDE_PX, *how[files])
    return crops / files


def train(root: Path, experiment: str, *more: str) -> dict:
    words = [
        f"run_root={root}",
        "run_id=run",
        "train.max_steps=50",
        "train.log_every=1",
        "train.warmup=0.1",
        "eval.every_steps=null",
        "eval.pictures_px=0",
        "train.precision=fp32",
        "engine.threads=1",
        *more,
    ]
    run_module("launch", "train", experiment, *words)
    run = root / experiment / "run"
    curve = losses(run)
    assert len(curve) == 50
    assert np.mean(curve[-10:]) < 0.9 * np.mean(curve[:10]), curve
    record = read_record(run)
    assert record is not None and record["status"] == "ok"
    return record


@pytest.mark.parametrize("name", cases(SEGMENTATION))
def test_segmentation(slides, tmp_path, name):
    model, files, settings, _ = SEGMENTATION[name]
    patch, length = (8, 64) if files == "apf" else (16, 256)
    record = train(
        tmp_path,
        "smoke",
        f"data.dir={slides(files)}",
        f"data.split={GLOMERULI / 'split.json'}",
        f"data.patching={files}",
        f"data.resolution={FRAME_PX}",
        f"data.patch={patch}",
        f"data.length={length}",
        f"model.name={model}",
        "train.batch=4",
        "train.lr=3e-3",
        *settings,
    )
    assert record["model"] == model and record["dice"] is not None


@pytest.mark.parametrize("name", cases(CLASSIFICATION))
def test_classification(crops, tmp_path, name):
    model, files, settings, _ = CLASSIFICATION[name]
    patch, length = (4, 64) if files == "apf" else (16, 16)
    record = train(
        tmp_path,
        "classify_paip",
        f"data.dir={token_files(crops, files)}",
        f"data.split={crops / 'split.json'}",
        f"data.labels={crops / 'labels.csv'}",
        "data.classes=2",
        f"data.resolution={SIDE_PX}",
        f"data.patch={patch}",
        f"data.patching={'uniform' if files == 'uniform' else 'apf'}",
        f"data.length={length}",
        f"model.name={model}",
        "train.batch=16",
        "train.lr=2e-3",
        "model.checkpointing=false",
        *settings,
    )
    assert record["model"] == model and record["auc"] > 0.6


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["transunet", "swin_unetr"])
def test_sharded_over_two_ranks_they_learn_what_one_learns(slides, tmp_path, name):
    model, files, settings, _ = SEGMENTATION[name]
    words = [
        "smoke",
        f"data.dir={slides(files)}",
        f"data.split={GLOMERULI / 'split.json'}",
        f"data.patching={files}",
        f"data.resolution={FRAME_PX}",
        "data.patch=8",
        "data.length=64",
        f"model.name={model}",
        "train.batch=4",
        "run_id=run",
        "train.max_steps=4",
        "eval.every_steps=null",
        "eval.pictures_px=0",
        "engine.threads=1",
        *settings,
    ]
    curves = []
    for world, engine in ((1, "ddp"), (2, "fsdp")):
        root, port = tmp_path / str(world), str(free_port())
        program = ["-m", "launch", "train", *words, f"run_root={root}", f"engine.name={engine}"]
        finish_well(Group([launch_rank(rank, world, port, program) for rank in range(world)]))
        curves.append(losses(root / "smoke" / "run"))
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)
