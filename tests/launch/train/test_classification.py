"""Classification through `python -m launch train`: crops, token sets and pictures, their labels, scores and losses."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hpc_models.training.metrics import accuracy, auc
from launch import engines
from launch.__main__ import main
from launch.config.config import ConfigError
from launch.config.data import DataConfig
from launch.data.augment import change_picture
from launch.data.batches import Sampler
from launch.data.pictures import ImageFiles, fit, open_files, read_labels, read_picture
from launch.engines.base import EngineSetup
from launch.experiments.load import load
from launch.records.record import read_record
from launch.train.classification import Classification, resized
from launch.train.ema import Average
from launch.train.optim import make_optimizer
from launch.train.trainer import build_model
from launch.train.weights import load_weights
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import SIZE, Group, clean_env, free_port, launch_rank, losses

TINY = [f"model.{key}" for key in ("depth=2", "grid_px=16", "width=32", "heads=2", "head_width=16", "mlp_dim=32")]
SMALL = [
    "data.resolution=32",
    "data.classes=2",
    "data.sizes=[]",
    "train.batch=4",
    "train.max_steps=12",
    "train.log_every=1",
    "eval.every_steps=6",
    "eval.sizes=[]",
    "data.rotate_deg=0",
    "engine.threads=1",
    *TINY,
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folders `dark` and `light` of 12 pictures each, of several sizes, depths and channels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 160)):
        (root / label).mkdir()
        for i in range(12):
            h, w = (40, 32) if i % 2 else (32, 48)
            values = np.clip(rng.normal(level, 30, (h, w, 3)), 0, 255)
            if i % 4 == 3:
                cv2.imwrite(str(root / label / f"{label}{i}.png"), (values[..., 0] * 257).astype(np.uint16))
            else:
                cv2.imwrite(str(root / label / f"{label}{i}.png"), values.astype(np.uint8))
    names = [f"{label}/{label}{i}" for i in range(12) for label in ("dark", "light")]
    (root / "split.json").write_text(json.dumps({"train": names[:14], "val": names[14:18], "test": names[18:]}))
    return root


def train(words: list[str], expect: int = 0) -> str:
    command = [sys.executable, "-m", "launch", "train", *words]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stderr
    return done.stderr


def words(pictures: Path, root: Path, *more: str) -> list[str]:
    files = [f"data.dir={pictures}", f"data.split={pictures / 'split.json'}"]
    return ["rivit", *files, f"run_root={root}", "run_id=run", *SMALL, *more]


def rows(run: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    with (run / "predictions" / name).open() as file:
        return list(csv.DictReader(file))


def test_pictures_are_learned_and_scored_once(pictures, tmp_path):
    told = train(words(pictures, tmp_path, "train.max_steps=40", "train.lr=3e-3", "eval.sizes=[48,20]"))
    run = tmp_path / "rivit" / "run"
    record, table = read_record(run), rows(run)
    curve = losses(run)
    assert np.mean(curve[-8:]) < 0.7 * np.mean(curve[:8])
    assert record["task"] == "classification" and record["dice"] is None and record["status"] == "ok"
    probabilities = torch.tensor([[float(r["p0"]), float(r["p1"])] for r in table], dtype=torch.float64)
    labels = torch.tensor([int(r["label"]) for r in table])
    assert sorted(r["name"] for r in table) == sorted({r["name"] for r in table})
    assert all(r["label"] == str(int(r["name"].startswith("light/"))) for r in table)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(table), dtype=torch.float64))
    assert record["accuracy"] == accuracy(probabilities, labels) and record["n_test"] == len(table)
    assert record["auc"] == pytest.approx(auc(probabilities, labels))
    assert record["auc"] > 0.9
    assert record["floors"]["most_frequent_class"] == max(np.bincount(labels)) / len(labels)
    sides = record["accuracy_by_size"]
    shown = f"accuracy {record['accuracy']:.4f}, {sides['48']:.4f} at 48 px, {sides['20']:.4f} at 20 px"
    assert f"auc {record['auc']:.4f}, {shown} on {len(table)} test items" in told
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"val_accuracy", "val_auc", "val_cross_entropy", "test_accuracy_48"} <= set().union(*lines)
    for side in (48, 20):  # read from the files at that size, not made from the pictures of 32 px
        config = load("rivit", words(pictures, tmp_path)[1:])
        files = ImageFiles(config.data.model_copy(update={"resolution": side}))
        model = build_model(config).eval()
        load_weights(model, str(run))
        images = torch.stack([torch.from_numpy(files.load(r["name"]).transpose(2, 0, 1).copy()) for r in table])
        with torch.no_grad():
            expected = model(images).softmax(1)
        there = torch.tensor([[float(r["p0"]), float(r["p1"])] for r in rows(run, f"scores_{side}.csv")])
        torch.testing.assert_close(there, expected, atol=1e-5, rtol=0)
        assert sides[str(side)] == accuracy(expected, labels)


def run_all(world: int, jobs: list[list[object]], root: Path) -> None:
    """Several runs on the same ranks."""
    path = root / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(path)]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait() == [0] * world, group.errors


@pytest.mark.gloo
def test_two_ranks_learn_what_one_learns(pictures, tmp_path):
    """Three sizes, the larger teaching the smaller, the average teaching all: same losses on one and two ranks."""
    more = [
        "data.sizes=[32,16]",
        "train.scale_distill=1",
        "train.ema_decay=0.9",
        "train.distill=0.5",
        "train.max_steps=6",
        "data.jitter=0.2",
        "data.noise=0.01",
    ]
    run_all(1, [words(pictures, tmp_path / "one", *more)], tmp_path)
    kinds = {"ddp": [], "fsdp": ["engine.name=fsdp"], "kept": ["engine.name=fsdp", "engine.reshard=false"]}
    run_all(2, [words(pictures, tmp_path / name, *more, *engine) for name, engine in kinds.items()], tmp_path)
    one = tmp_path / "one" / "rivit" / "run"
    for name in kinds:
        two = tmp_path / name / "rivit" / "run"
        assert losses(two) == pytest.approx(losses(one), abs=1e-5)
        assert read_record(two)["accuracy"] == read_record(one)["accuracy"] and read_record(two)["gpus"] == 2
        first, second = (np.array([[float(r["p0"]) for r in rows(run)]]) for run in (one, two))
        np.testing.assert_allclose(first, second, atol=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(pictures, tmp_path):
    more = [
        "train.ema_decay=0.9",
        "train.distill=1",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
        "eval.every_steps=null",
        "train.max_steps=9",
    ]
    whole, parts = (tmp_path / kind / "rivit" / "run" for kind in ("whole", "parts"))
    again = words(pictures, tmp_path / "parts", *more)
    run_all(1, [words(pictures, tmp_path / "whole", *more), again, ["as if killed", str(parts), 3], again], tmp_path)
    assert read_record(parts)["starts"] == 2 and len(losses(parts)) == 9
    assert losses(whole) == losses(parts)
    assert rows(whole) == rows(parts), "the average came back"


def test_training_can_start_from_the_weights_of_another_run(pictures, tmp_path, capsys):
    source = tmp_path / "a" / "rivit" / "run"
    more = ["train.max_steps=1", "train.lr=1e-12", f"train.init_from={source}"]
    first = words(pictures, tmp_path / "a", "train.max_steps=5")
    run_all(1, [first, words(pictures, tmp_path / "b", *more)], tmp_path)
    assert rows(source) == rows(tmp_path / "b" / "rivit" / "run")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    for wrong, reason in (
        (tmp_path / "nothing", "No such file"),
        (tmp_path / "other.pt", "lacks blocks.0."),
        (tmp_path, "no complete checkpoint"),
    ):
        told = words(pictures, tmp_path / "c", "train.max_steps=1", f"train.init_from={wrong}")
        assert main(["train", *told]) == 64
        said = capsys.readouterr().err
        assert f"train.init_from={wrong}" in said and reason in said and said.count("\n") == 1
        assert not (tmp_path / "c").exists()


def test_crops_are_labelled_by_their_masks(tile_files, tmp_path):
    """Every square of the grid of every test slide is scored; its label is whether it holds foreground."""
    settings = [
        "rivit",
        f"data.dir={tile_files}",
        f"data.split={tile_files / 'split.json'}",
        f"run_root={tmp_path}",
        "run_id=run",
        "data.kind=tiles",
        "data.patching=uniform",
        "data.labels=mask",
        "data.classes=2",
        f"data.resolution={SIZE}",
        "data.patch=32",
        "data.length=4",
        "data.crop_px=32",
        "data.fit=pad",
        "data.sizes=[]",
        "data.rotate_deg=0",
        "data.mirror=false",
        "train.batch=4",
        "train.max_steps=6",
        "eval.sizes=[]",
        *TINY,
    ]
    train(settings)
    table = rows(tmp_path / "rivit" / "run")
    config = load(settings[0], settings[1:])
    files = open_files(config.data)
    assert len(table) == 4 * len(files.split["test"])
    for row in table:
        name, _, place = row["name"].partition("@")
        x, y = (int(part) for part in place.split(","))
        share = files.load_raster(name).masks[y : y + 32, x : x + 32].any(-1).mean()
        assert int(row["label"]) == int(share >= 0.01)
    assert {row["label"] for row in table} == {"0", "1"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["data.labels=null"], "needs labels"),
        (["data.labels=mask"], "needs token files"),
        (["data.classes=3"], "has 2 classes (dark, light), but data.classes=3"),
        (["data.sizes=[16,32]"], "descending sides"),
        (["train.distill=1"], "needs ema_decay"),
        (["eval.sizes=[64,0]"], "eval.sizes=[64, 0] needs data.kind=images and positive sides"),
        (
            ["eval.sizes=[40]", "model.conv=false", "model.tokens=64"],
            "eval.sizes: model.name=rivit at 40 px: 100 patches, but the learned table has tokens=64",
        ),
        (["train.scale_distill=1"], "two or more data.sizes"),
        (["data.kind=tokens", "data.labels=null"], "does not go with data.kind=tokens; use images or tiles"),
        (["data.labels=nowhere.csv"], "nowhere.csv: No such file"),
        (["data.dir=nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_settings_are_one_line_and_64(pictures, tmp_path, more, reason, capsys):
    assert main(["train", *words(pictures, tmp_path, *more)]) == 64
    told = capsys.readouterr().err
    assert reason in told and len(told.strip().splitlines()) == 1


def test_labels_from_csv(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("name,label,site\nx.png,benign,1\nsub/y,malignant,2\n")
    assert read_labels(path, 2) == {"x": 0, "sub/y": 1}
    path.write_text("name,label\na,1\nb,0\nc,1\n")
    assert read_labels(path, 3) == {"a": 1, "b": 0, "c": 1}
    for text, reason in (
        ("name\nx\n", "columns name and label"),
        ("name,label\nx,0\nx.png,1\n", "'x' stands there twice"),
        ("name,label\nx,\n", "line 2 lacks"),
        ("name,label\nx,q\ny,r\nz,s\n", "has 3 classes"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read_labels(path, 2)


def test_pictures_of_any_depth_and_size(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", 3), rgb.astype(np.float32) / np.float32(255))
    gray = (np.arange(24).reshape(6, 4) * 2500).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "b.png"), gray)
    np.testing.assert_allclose(read_picture(tmp_path / "b.png", 1)[..., 0], gray / 65535, atol=1e-7)
    assert read_picture(tmp_path / "b.png", 3).shape == (6, 4, 3)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"c\.png: cannot be decoded"):
        read_picture(tmp_path / "c.png", 1)
    x = np.ones((6, 4, 1), np.float32)
    padded = fit(x, (12, 12), "pad")
    assert padded.shape == (12, 12, 1) and padded[:, :8].all() and not padded[:, 8:].any()
    assert fit(x, (12, 12), "crop").all() and fit(x, (5, 9), "squash").shape == (5, 9, 1)
    ramp = np.arange(100, dtype=np.float32).reshape(10, 10, 1) / 100
    np.testing.assert_array_equal(fit(ramp, (10, 6), "crop"), ramp[:, 2:8])


def test_augmentation_keeps_size_and_range_and_changes_nothing_when_off():
    def changed(seed: int, **settings) -> np.ndarray:
        return change_picture(
            x, np.random.default_rng(seed), DataConfig(**{"dir": "-", "resolution": 8, "flips": False, **settings})
        )

    x = np.random.default_rng(0).random((8, 6, 1)).astype(np.float32)
    np.testing.assert_array_equal(changed(0), x)
    seen = {changed(seed, flips=True).tobytes() for seed in range(60)}
    assert seen == {x.tobytes(), x[::-1].tobytes(), x[:, ::-1].tobytes(), x[::-1, ::-1].tobytes()}
    mirrored = {changed(seed, mirror=True).tobytes() for seed in range(20)}
    assert mirrored == {x.tobytes(), x[:, ::-1].tobytes()}
    for seed in range(10):
        y = changed(seed, flips=True, mirror=True, jitter=0.4, rotate_deg=15, noise=0.1)
        assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and y.dtype == np.float32


def test_area_under_the_curve_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        scores = torch.from_numpy(rng.integers(0, 5, (40, classes)) / 5.0)
        labels = torch.from_numpy(rng.integers(0, classes, 40))
        areas = []
        for c in [1] if classes == 2 else range(3):
            a, b = scores[labels == c, c], scores[labels != c, c]
            pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
            areas.append(float(pairs.mean()))
        assert auc(scores, labels) == pytest.approx(np.mean(areas), abs=1e-12)
    assert auc(torch.rand(3, 2), torch.tensor([1, 1, 1])) is None
    assert accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])) == 0.5


@pytest.mark.usefixtures("one_rank")
def test_the_average_follows_and_is_borrowed_exactly():
    module = torch.nn.Linear(3, 2)
    start = {k: v.detach().clone() for k, v in module.named_parameters()}
    average = Average(module, 0.99)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    own = {k: v.detach().clone() for k, v in module.named_parameters()}
    average.update(1)  # decay (1 + 1) / (10 + 1)
    for key, value in average.weights.items():
        torch.testing.assert_close(value, start[key] * 2 / 11 + own[key] * 9 / 11)
    with average.applied():
        assert not torch.equal(module.weight, own["weight"])
    assert all(torch.equal(p, own[k]) for k, p in module.named_parameters())


def test_the_average_has_statistics_of_its_own_and_teaching_leaves_no_trace():
    """Batch norm: the averaged weights go with averaged statistics, and the teacher's passes are not counted."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    average, norm = Average(module, 0.9), module[1]
    x = 2 * torch.randn(16, 4) + 1
    start = norm.running_mean.clone()
    module(x)
    moved = {k: v.clone() for k, v in module.state_dict().items()}
    average.update(5)  # decay (1 + 5) / (10 + 5)
    torch.testing.assert_close(average.weights["1.running_mean"], 0.4 * start + 0.6 * moved["1.running_mean"])
    assert len(average.statistics()) == 2 and any(v is average.weights["1.running_var"] for v in average.statistics())
    with torch.no_grad():
        answer = average.teacher(module)(x)
    own = torch.nn.functional.linear(x, average.weights["0.weight"], average.weights["0.bias"])
    normed = (own - own.mean(0)) / (own.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(answer, normed, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, moved[k]) for k, v in module.state_dict().items())
    kept = average.weights["1.running_mean"].clone()
    average.teacher(module)(x)
    assert torch.equal(average.weights["1.running_mean"], kept)
    with average.applied():
        assert torch.equal(norm.running_mean, kept) and not torch.equal(kept, moved["1.running_mean"])
    assert torch.equal(norm.running_mean, moved["1.running_mean"])


@pytest.mark.gloo
def test_asam_steps_on_the_gradient_of_the_perturbed_weights(pictures, tmp_path):
    """One step by hand, then the same losses from plain weights and from shards on two ranks."""
    more = ["train.optimiser=asam", "train.rho=0.5", "train.max_steps=3", "train.schedule=constant", "train.warmup=0"]
    one = words(pictures, tmp_path / "one", *more, "checkpoint.every_steps=1", "checkpoint.keep=9")
    run_all(1, [one, words(pictures, tmp_path / "adam", *more[2:], "train.optimiser=adam")], tmp_path)
    run = tmp_path / "one" / "rivit" / "run"
    assert losses(run)[0] == losses(tmp_path / "adam/rivit/run")[0]
    assert losses(run)[1:] != losses(tmp_path / "adam/rivit/run")[1:]
    assert read_record(run)["optimiser"] == "ASAM (Adam)"
    run_all(2, [words(pictures, tmp_path / "two", *more, "engine.name=fsdp")], tmp_path)
    assert losses(tmp_path / "two/rivit/run") == pytest.approx(losses(run), abs=1e-5)

    config = load("rivit", words(pictures, tmp_path, *more)[1:])
    task = Classification(config, ImageFiles(config.data))
    torch.manual_seed(0)
    model = build_model(config)
    optimizer = make_optimizer(model, config.train)
    batch = task.batch(Sampler(len(task.files.split["train"]), 4, 0).at(0))
    named = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(next(task.losses(model, batch, None)).mean(), named)
    norm = torch.cat([(p.abs() * g).flatten() for p, g in zip(named, grads, strict=True)]).norm()
    before = [p.detach().clone() for p in named]
    with torch.no_grad():
        for p, g in zip(named, grads, strict=True):
            p.add_(0.5 * p * p * g / norm)
    grads = torch.autograd.grad(next(task.losses(model, batch, None)).mean(), named)
    with torch.no_grad():
        for p, value, g in zip(named, before, grads, strict=True):
            p.copy_(value)
            p.grad = torch.empty_like(p).copy_(g)  # with the strides of p, as autograd does; the fused step needs it
    torch.nn.utils.clip_grad_norm_(named, config.train.clip)
    optimizer.step()
    stored = build_model(config)
    for step in (3, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    load_weights(stored, str(run))
    for p, q in zip(model.parameters(), stored.parameters(), strict=True):
        # Adam's first step is nearly the sign of the gradient: where that is next to nothing, rounding shows.
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_losses_per_size_are_those_of_the_resized_picture(pictures):
    config = load("rivit", [*words(pictures, Path("unused"), "data.sizes=[32,16]", "train.scale_distill=2")[1:]])
    task = Classification(config, ImageFiles(config.data))
    assert task.parts == 2
    torch.manual_seed(0)
    model = build_model(config)
    engine = engines.build(model, config.engine, EngineSetup(torch.device("cpu"), "fp32"))
    batch = task.batch([(0, 0), (5, 1), (9, 2)])
    large, small = task.losses(engine.forward, batch, None)
    ce = torch.nn.functional.cross_entropy
    image = batch["image"]
    torch.testing.assert_close(large, ce(model(image), batch["label"], reduction="none"))
    lesser = resized(image, 16)
    assert lesser.shape[-2:] == (16, 16)
    big, little = (model({"image": x, "features": True})[:, 2:] for x in (image, lesser))
    normed = torch.nn.functional.layer_norm(big, (32,))
    extra = torch.nn.functional.smooth_l1_loss(little, normed, reduction="none").mean(1)
    torch.testing.assert_close(small, ce(model(lesser), batch["label"], reduction="none") + 2 * extra)
