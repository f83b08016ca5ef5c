"""Answers at one resolution, scored on the pixels of another."""

import json
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
import yaml

from analysis.runs.groups import group_runs
from analysis.runs.records import load as load_records
from data_prep.build.log import SlideTask
from data_prep.build.options import BuildOptions
from data_prep.token_files.token_file import read_tokens, token_path
from launch.__main__ import main
from launch.data.token_files import TokenFiles
from launch.experiments.load import load
from launch.records.record import read_record
from launch.score.rescore import enlarged, load_model, other_files, read_run
from launch.train.segmentation import raster_logits
from tests.helpers.builds import build_one
from tests.helpers.small_runs import Group, finish_well, launch_rank, overrides

pytestmark = pytest.mark.gloo

NAMES = [f"s{i}" for i in range(8)]
SPLIT = {"train": NAMES[:4], "val": NAMES[4:5], "test": NAMES[5:]}
SIDES = (150, 110)  # of the slides: both frames hold them shrunk, by factors that are no powers of two


def build(folder: Path, slides: Path, **options: object) -> Path:
    folder.mkdir()
    for name in NAMES:
        outcome = build_one(SlideTask(slides / f"{name}.png", folder, BuildOptions(masks=slides / "masks", **options)))
        assert outcome.status == "done", outcome
    (folder / "split.json").write_text(json.dumps(SPLIT))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Slides with bright discs, cut in several ways."""
    root = tmp_path_factory.mktemp("rescore")
    (root / "slides" / "masks").mkdir(parents=True)
    y, x = np.mgrid[: SIDES[1], : SIDES[0]]
    for seed, name in enumerate(NAMES):
        rng = np.random.default_rng(seed)
        mask = np.zeros((SIDES[1], SIDES[0]), np.uint8)
        for _ in range(4):
            cx, cy, r = rng.integers(10, 140), rng.integers(10, 100), rng.integers(6, 22)
            mask[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = 1
        bright, dark = (rng.integers(*ends, (*mask.shape, 3)) for ends in ((120, 220), (40, 130)))
        image = np.where(mask[..., None] > 0, bright, dark)
        cv2.imwrite(str(root / "slides" / f"{name}.png"), image.astype(np.uint8))
        cv2.imwrite(str(root / "slides" / "masks" / f"{name}.png"), mask)
    slides = root / "slides"
    return {
        "slides": slides,
        "apf": build(root / "apf", slides, resolution=64, patch=8, length=40),
        "tiles": build(root / "tiles", slides, resolution=64, patch=32, patching="uniform"),
        "large": build(root / "large", slides, resolution=128, patch=32, patching="uniform"),
        "small": build(root / "small", slides, resolution=32, patch=16, patching="uniform"),
    }


@pytest.fixture(scope="module")
def runs(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on trees and one on crops, both trained at 64 px."""
    root = tmp_path_factory.mktemp("runs")
    more = {
        "apf": ["data.length=40", "data.part=0.6", "eval.part=0.7", "model.position=geom", "train.ema_decay=0.8"],
        "tiles": [
            "data.kind=tiles",
            "data.patching=uniform",
            "data.patch=32",
            "data.length=4",
            "data.crop_px=32",
            "data.window_px=48",
            "model.name=unet_tiled",
            "model.widths=[4, 8]",
        ],
    }
    for kind, settings in more.items():
        words = [
            word
            for word in overrides(files[kind], root, run_id="r", experiment=kind, train__max_steps=30)
            if kind == "apf" or not word.startswith("model.")
        ]
        program = ["-m", "launch", "train", "smoke", *words, *settings]
        finish_well(Group([launch_rank(0, 1, "", program)]))
    return {kind: root / kind / "r" for kind in more}


def change(run: Path, section: str, **values: object) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def rescored(run: Path, at: Path, out: Path, *more: str) -> dict:
    assert main(["rescore", str(run), "--at", str(at), "--out", str(out), *more]) == 0
    return next(json.loads(path.read_text()) for path in out.rglob("record.json"))


@pytest.mark.parametrize("kind", ["apf", "tiles"])
def test_at_their_own_resolution_runs_keep_their_dice(kind, runs, files, tmp_path, capsys):
    was = read_record(runs[kind])
    new = rescored(runs[kind], files["tiles"], tmp_path)
    assert new["dice_per_slide"] == pytest.approx(was["dice_per_slide"], abs=1e-6)
    assert (new["dice"], new["dice_pooled"]) == pytest.approx((was["dice"], was["dice_pooled"]), abs=1e-6)
    assert new["dice"] > 0.5, "the run learned something, so that the comparison says something"
    assert new["floors"]["all_foreground"] == pytest.approx(was["floors"]["all_foreground"], abs=1e-9)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("at", "px"), [("large", 128), ("small", 32)])
def test_logits_are_resized_and_counted_at_the_other_pixels(at, px, runs, files, tmp_path):
    new = rescored(runs["tiles"], files[at], tmp_path)
    assert (new["experiment"], new["resolution"], new["status"]) == (f"tiles_at_{px}px", px, "ok")
    config, _ = read_run(runs["tiles"], None)
    model, own = load_model(config, runs["tiles"], torch.device("cpu")), TokenFiles(config.data)
    for name in SPLIT["test"]:
        raster = own.load_raster(name)
        with torch.no_grad():
            logits = raster_logits(model, config, raster, torch.device("cpu"))[0].numpy()
        tokens, _ = read_tokens(token_path(files[at], name))
        (w, h), (width, height) = raster.content_wh, tokens.content_wh
        how = cv2.INTER_LINEAR if px > 64 else cv2.INTER_AREA
        shown = cv2.resize(logits[:h, :w], (width, height), interpolation=how) > 0
        truth = cv2.imread(str(files["slides"] / "masks" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        whole = np.zeros((px, px), bool)
        for (left, top), side, counts in zip(tokens.leaf_xy, tokens.leaf_size, tokens.mask_counts, strict=True):
            whole[top : top + side, left : left + side] = counts[..., 0] > 0
        whole = whole[:height, :width]
        assert abs(whole.mean() - (truth > 0).mean()) < 0.03
        expected = 2 * (shown & whole).sum() / (shown.sum() + whole.sum())
        # OpenCV's areas have fractional ends; torch's do not
        assert new["dice_per_slide"][name] == pytest.approx(expected, abs=0.01 if px > 64 else 0.04)
    assert new["dice"] == pytest.approx(np.mean(list(new["dice_per_slide"].values())))


@pytest.mark.parametrize(("w", "h", "width", "height"), [(5, 7, 13, 9), (8, 8, 16, 16), (6, 4, 6, 4)])
def test_enlarging_is_that_of_opencv(w, h, width, height):
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(w))
    found = enlarged(logits, (w, h), (width, height)).numpy()
    for mine, values in zip(found, logits.numpy(), strict=True):
        np.testing.assert_allclose(mine, cv2.resize(values[:h, :w], (width, height)), atol=1e-5)
    halves = enlarged(logits, (8, 8), (4, 4)).numpy()
    np.testing.assert_allclose(halves, logits.numpy().reshape(2, 4, 2, 4, 2).mean((2, 4)), atol=1e-6)


def test_records_are_those_of_a_table_and_are_not_made_twice(runs, files, tmp_path, capsys):
    words = ["rescore", str(runs["apf"]), str(runs["tiles"]), "--at", str(files["large"]), "--out", str(tmp_path)]
    assert main(words) == 0
    assert "at 128 px" in capsys.readouterr().out
    found = load_records(tmp_path)
    assert list(found.ok["experiment"]) == ["apf_at_128px", "tiles_at_128px"] and not found.problems
    assert all((tmp_path / name / "r" / "env.json").is_file() for name in ("apf_at_128px", "tiles_at_128px"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("record.json")}
    assert main(words) == 0
    assert capsys.readouterr().err.count("already scored") == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("record.json")}
    assert main([*words, "--name", "both"]) == 64, "they have one run id, and one would overwrite the other"
    assert "is of another run" in capsys.readouterr().err
    assert read_record(tmp_path / "both" / "r")["decoder"] == "leaf"
    was = read_record(runs["apf"])
    new = read_record(tmp_path / "apf_at_128px" / "r")
    same = ("run_id", "seed", "train_seconds", "steps", "length", "patch", "split_sha256", "commit", "config_sha256")
    assert {key: new[key] for key in same} == {key: was[key] for key in same}
    assert all(new[key] is None for key in ("dice_ceiling", "seconds_per_image", "images_per_s", "epochs", "dice_val"))
    assert (tmp_path / "apf_at_128px" / "r" / "config.yaml").read_bytes() == (runs["apf"] / "config.yaml").read_bytes()
    assert set(new["floors"]) == {"all_foreground", "all_background"}


def test_a_run_is_never_overwritten_and_unfinished_ones_are_left_out(runs, files, tmp_path, capsys):
    run = tmp_path / "apf" / "r"
    shutil.copytree(runs["apf"], run)
    before = (run / "record.json").read_bytes()
    for more in ([], ["--force"]):
        words = ["rescore", str(run), "--at", str(files["large"]), "--out", str(tmp_path), "--name", "apf", *more]
        assert main(words) == 64 and "is a run itself" in capsys.readouterr().err
    assert (run / "record.json").read_bytes() == before
    words = ["rescore", str(run), "--at", str(files["large"]), "--out", str(tmp_path / "out")]
    for name in ("..", "a/b", ""):
        assert main([*words, "--name", name]) == 64 and "not a path" in capsys.readouterr().err
    other = tmp_path / "apf" / "stopped"
    shutil.copytree(run, other)
    (other / "record.json").unlink()
    assert main([*words[:1], str(other), *words[1:]]) == 1
    assert "left out" in capsys.readouterr().err and read_record(tmp_path / "out" / "apf_at_128px" / "r")
    again = json.loads(before) | {"started_at": "2000-01-01T00:00:00+00:00"}
    (run / "record.json").write_text(json.dumps(again))
    assert main(words) == 64 and "is of another run" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    again["run_id"], lr = "other", yaml.safe_load((run / "config.yaml").read_text())["train"]["lr"] / 2
    (run / "record.json").write_text(json.dumps(again))
    change(run, "train", lr=lr)
    assert main(words) == 0
    assert len(group_runs(load_records(tmp_path / "out").ok)) == 2, "other settings make another row, no second seed"


def test_what_cannot_be_scored_is_one_line(runs, files, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(files["slides"], other)
    for path in other.glob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)) // 2)
    wrong = build(tmp_path / "wrong", other, resolution=128, patch=32, patching="uniform")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs["tiles"], unfinished)
    (unfinished / "record.json").unlink()
    empty = tmp_path / "empty"
    shutil.copytree(runs["tiles"], empty)
    shutil.rmtree(empty / "checkpoints")
    strange = tmp_path / "strange"
    shutil.copytree(runs["tiles"], strange)
    change(strange, "data", paking=1)
    misfit, split, damaged, bare = (tmp_path / name for name in ("misfit", "split", "damaged", "bare"))
    for folder in (misfit, split, damaged, bare):
        shutil.copytree(runs["tiles"], folder)
    change(misfit, "model", widths=[4, 12])
    (tmp_path / "split.json").write_text(json.dumps(SPLIT | {"train": SPLIT["test"], "test": SPLIT["train"]}))
    change(split, "data", split=str(tmp_path / "split.json"))
    shutil.copytree(files["tiles"], tmp_path / "tiles")
    with h5py.File(token_path(tmp_path / "tiles", "s5"), "r+") as file:
        file["tokens"][0, 0, 0, 0] ^= 1
    change(damaged, "data", dir=str(tmp_path / "tiles"))
    (bare / "record.json").write_text(json.dumps({"status": "ok", "run_id": "r"}))
    for run, at, reason in (
        (tmp_path / "none", files["large"], "no run directory"),
        (unfinished, files["large"], "has not finished"),
        (split, files["large"], "data.split is another one"),
        (damaged, files["large"], "checksum"),
        (misfit, files["large"], "size mismatch for downs.1"),
        (bare, files["large"], "has no experiment"),
        (empty, files["large"], "no sound checkpoint"),
        (strange, files["large"], "data.paking"),
        (runs["tiles"], tmp_path / "none", "no such token file"),
        (runs["tiles"], files["apf"], "build it with --patching uniform"),
        (runs["tiles"], wrong, "was built from another slide"),
    ):
        assert main(["rescore", str(run), "--at", str(at), "--out", str(tmp_path / "out")]) == 64, reason
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: ") and reason in said and said.count("\n") <= 2, said
    assert not (tmp_path / "out").exists()
    config = load("smoke", [f"data.dir={files['apf']}", f"data.split={files['apf'] / 'split.json'}"])
    assert other_files(config, SPLIT["test"], files["large"]).config.resolution == 128
