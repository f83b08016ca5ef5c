"""The benchmark of the paper's rows: its trees, its rows, resuming, and what does not fit."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from data_prep.tree.quadtree import Leaves, check_tiling
from launch.__main__ import main
from launch.experiments.load import load
from launch.plan import bench
from launch.plan.bench import BenchRow, make_batch, measure, rows
from launch.plan.step import made_up_leaves
from tests.helpers.repository import ROOT

SMALL = ["model.width=32", "model.depth=2", "model.heads=2", "model.mlp_dim=64", "model.feature_size=2"]


@pytest.mark.parametrize(("resolution", "patch", "leaves"), [(512, 4, 676), (65536, 8, 1024), (64, 8, 5), (64, 8, 99)])
def test_made_up_trees_tile_the_frame(resolution, patch, leaves):
    data = load("paip_512").data.model_copy(update={"resolution": resolution, "patch": patch})
    xy, size = made_up_leaves(data, leaves)
    check_tiling(Leaves(xy.astype(np.int32), size.astype(np.int32)), resolution)
    assert len(size) % 3 == 1 and len(size) <= leaves
    assert len(size) == min(leaves - (leaves - 1) % 3, (resolution // patch) ** 2)


def test_rows_cover_every_adaptive_row_of_the_paper_and_the_rivals():
    found = {row.name: row for row in rows([])}
    adaptive = [r for r in found.values() if r.config.data.patching == "apf" and not r.compiled and not r.lengths]
    assert len(adaptive) == 27, "Table III has 27 rows of APF"
    assert {"paip_512_uniform", "unetr16-ours", "unetr16-monai", "lengths-full", "lengths-packed"} <= set(found)
    assert all(f"{r.name}+compile" in found for r in adaptive)


def test_batch_has_the_lengths_asked_for_and_counts_all_pixels():
    row = BenchRow("x", load("paip_512", ["data.length=64"]), batch=2, lengths=(19, 64))
    batch = make_batch(row, torch.device("cpu"))
    assert batch["valid"].sum(1).tolist() == [19, 64]
    assert batch["content_counts"].sum((1, 2, 3)).tolist() == [512 * 512] * 2
    assert (batch["mask_counts"][..., 0] <= batch["content_counts"]).all()


def test_rows_are_measured_once_and_shown(tmp_path, capsys):
    words = ["bench", "--rows", "paip_512_p8", "--seconds", "0.05", "--device", "cpu", "--out", str(tmp_path), *SMALL]
    assert main(words) == 0
    lines = [json.loads(x) for x in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [x["name"] for x in lines] == ["paip_512_p8"]
    line = lines[0]
    assert line["tokens_per_image"] == 574 and line["seconds_per_image"] > line["forward_seconds_per_image"] > 0
    assert line["images_per_s"] == pytest.approx(1 / line["seconds_per_image"]) and line["steps"] >= 3
    assert line["attention_backend"].startswith("sdpa") and line["overrides"] == SMALL
    assert json.loads((tmp_path / "env.json").read_text())
    before = (tmp_path / "bench.jsonl").read_bytes()
    assert main(words) == 0 and (tmp_path / "bench.jsonl").read_bytes() == before
    assert "paip_512_p8" in capsys.readouterr().out


def test_ours_and_monai_run_the_same_picture():
    ours, theirs = (r for r in rows(["train.precision=fp32"]) if r.name.startswith("unetr16"))
    assert ours.config == theirs.config and theirs.monai and not ours.monai
    pytest.importorskip("monai")
    small = BenchRow("m", load("paip_512_uniform_p16", ["data.resolution=64", "data.length=16"]), monai=True)
    found = measure(small, torch.device("cpu"), 0.01)
    assert found["model"] == "unetr (MONAI)" and found["seconds_per_image"] > 0


def test_what_does_not_fit_the_memory_is_a_row(monkeypatch):
    def full(*_args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(bench, "make_model", full)
    row = BenchRow("x", load("paip_512", SMALL))
    found = measure(row, torch.device("cpu"), 0.1)
    assert found["error"] == "CUDA out of memory. Tried to allocate 9 GiB"
    assert "CUDA out of memory" in bench.table([found])

    def broken(*_args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(bench, "make_model", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        measure(row, torch.device("cpu"), 0.1)


def test_listing_and_wrong_names(capsys):
    assert main(["bench", "--rows", "nothing*"]) == 64
    assert "no such row" in capsys.readouterr().err
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch", "bench", "--list", "--rows", "paip_64k*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "paip_64k_p32+compile" in shown.stdout.splitlines()
    assert " torch\n" not in shown.stderr, "a list needs no torch"
