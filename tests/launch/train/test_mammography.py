"""HCT, GMIC and Def-GMIC trained on gray crops of real slides; the experiments are the paper's recipe."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from analysis.comparison.auc import auc
from launch.experiments.load import all_experiments, load
from launch.records.record import read_record
from tests.helpers.mammography import MODELS
from tests.helpers.repository import GLOMERULI, ROOT
from tests.helpers.small_runs import clean_env, losses

CROP_PX, SIDE_PX = 256, 64


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    """Crops around glomeruli and away from them, split by slide, as a user would cut patches from mammograms."""
    root = tmp_path_factory.mktemp("crops")
    (root / "pictures").mkdir()
    slides = json.loads((GLOMERULI / "split.json").read_text())
    split: dict[str, list[str]] = {part: [] for part in ("train", "val", "test")}
    rows = ["name,label"]
    rng = np.random.default_rng(0)
    for part, names in slides.items():
        for name in names:
            image = cv2.imread(str(next((GLOMERULI / "images").glob(f"{name}.*"))), cv2.IMREAD_GRAYSCALE)
            mask = cv2.imread(str(next((GLOMERULI / "masks").glob(f"{name}.*"))), cv2.IMREAD_GRAYSCALE) > 0
            for label in (0, 1):
                made = 0
                for _ in range(400):
                    y, x = (int(v) for v in rng.integers(0, 1024 - CROP_PX, 2))
                    share = mask[y : y + CROP_PX, x : x + CROP_PX].mean()
                    if made < 4 and (share > 0.25 if label else share == 0):
                        crop = image[y : y + CROP_PX, x : x + CROP_PX]
                        own = f"{name}_{label}{made}"
                        small = cv2.resize(crop, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
                        cv2.imwrite(str(root / "pictures" / f"{own}.png"), small)
                        split[part].append(own)
                        rows.append(f"{own},{label}")
                        made += 1
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "split.json").write_text(json.dumps(split))
    return root


def train(crops: Path, root: Path, experiment: str, *more: str, expect: int = 0) -> Path:
    words = [
        experiment,
        f"data.dir={crops / 'pictures'}",
        f"data.labels={crops / 'labels.csv'}",
        f"data.split={crops / 'split.json'}",
        f"data.resolution={SIDE_PX}",
        f"run_root={root}",
        "run_id=run",
        "model.strides=[1,1,2,2,2]",
        "train.batch=8",
        "train.max_steps=50",
        "train.log_every=1",
        "eval.every_steps=50",
        "train.lr=1e-3",
        "eval.pictures_px=1",
        "engine.threads=1",
        *more,
    ]
    command = [sys.executable, "-m", "launch", "train", *words]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stderr
    return root / experiment / "run"


@pytest.fixture(scope="module")
def patch_run(crops, tmp_path_factory) -> Path:
    """Fifty steps of HCT."""
    return train(crops, tmp_path_factory.mktemp("runs"), "hct_patch")


def check_run(run: Path, backend: str | None) -> None:
    """The loss fell, and the record says what ran and how well it did."""
    curve = losses(run)
    assert len(curve) == 50 and np.mean(curve[-10:]) < 0.8 * np.mean(curve[:10])
    record = read_record(run)
    assert record["status"] == "ok" and record["task"] == "classification"
    assert record["attention_backend"] == backend
    with (run / "predictions" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert record["auc"] == pytest.approx(auc([float(r["p1"]) for r in rows], [int(r["label"]) for r in rows]))
    assert record["auc"] > 0.7


def test_hct_learns_real_crops_in_fifty_steps(patch_run):
    check_run(patch_run, "performer relu (cpu)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("gmic", None),
        ("def_gmic", None),
        ("hct_softmax", "performer softmax (cpu)"),
        ("hct_nystrom", "nystrom (cpu)"),
    ],
)
def test_the_others_learn_them_too(crops, tmp_path, name, backend):
    check_run(train(crops, tmp_path, f"{name}_patch"), backend)


def test_whole_pictures_start_from_the_weights_of_patches(crops, patch_run, tmp_path):
    """Two stages as in the paper: patches first, then pictures of another shape with the same weights."""
    later = ["data.image_hw=[96,64]", "data.fit=squash", "train.max_steps=4", "train.lr=2e-5"]
    warm = train(crops, tmp_path, "hct_image", *later, f"train.init_from={patch_run}")
    assert np.mean(losses(warm)) < 0.85 * np.mean(losses(patch_run)[:4])


def test_experiments_are_the_papers_recipe():
    patch, image, half = (load(f"hct_{stage}_asam", []) for stage in ("patch", "image", "half"))
    assert (patch.train.lr, patch.train.batch, patch.data.resolution) == (6e-4, 160, 512)
    assert (image.train.lr, image.train.batch, image.data.image_hw) == (2e-5, 32, (3328, 2560))
    assert (half.train.lr, half.train.batch, half.data.image_hw) == (2e-5, 32, (1664, 1280))
    for config in (patch, image, half):
        assert config.train.optimiser == "asam" and config.train.rho == 0.05 and config.train.schedule == "cosine"
        assert config.train.max_steps == 80 * 58_376 // config.train.batch
        assert config.data.channels == 1 and config.data.classes == 2
    assert Path(str(image.train.init_from)) == patch.run_dir(1)
    assert load("hct_image", []).train.optimiser == "adam"


def test_every_network_has_its_experiments():
    assert Path(str(load("gmic_image", []).train.init_from)) == load("gmic_patch", []).run_dir(1)
    attentions = {load(f"{name}_patch", []).model.attention for name in MODELS if name.startswith("hct")}
    assert attentions == {"performer_relu", "performer_softmax", "nystrom"}
    names = {f"{m}_{s}{o}" for m in MODELS for s in ("patch", "image", "half") for o in ("", "_asam")}
    assert names <= set(all_experiments())
