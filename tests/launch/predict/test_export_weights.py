"""Weights leave a run as a plain state dict, whichever engine saved them, and start another."""

import json
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.experiments.load import load
from launch.records.record import read_record
from launch.train.trainer import build_model
from launch.train.weights import other_settings
from tests.helpers.small_runs import (
    Group,
    finish_well,
    flip_a_byte,
    free_port,
    launch_rank,
    losses,
    overrides,
)

pytestmark = pytest.mark.gloo

STEPS = 4
ZERO = {f"zero{stage}": {"engine__name": "deepspeed", "engine__zero": stage} for stage in range(4)}
CASES: dict[str, dict[str, object]] = {
    "ddp": {"train__ema_decay": 0.5},
    "fsdp": {"engine__name": "fsdp", "eval__every_steps": 2, "checkpoint__every_steps": 2},
    **ZERO,
    "zero2_bf16": {**ZERO["zero2"], "train__precision": "bf16"},
}


@pytest.fixture(scope="module")
def runs(apf_files: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("export")
    more = {"train__max_steps": STEPS, "eval__pictures_px": 0}
    jobs = [overrides(apf_files, root, run_id=name, **more, **case) for name, case in CASES.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(root / "jobs.json")]
    finish_well(Group([launch_rank(rank, 2, port, program) for rank in range(2)]))
    return root / "smoke"


@pytest.fixture
def export(capsys):
    """`export(run, out, *more)` runs the command; returns its exit code, output and errors."""

    def run(run_dir: Path, out: Path, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["export-weights", str(run_dir), "--out", str(out), *more])
        return (code, *capsys.readouterr())

    return run


def weights(export, run_dir: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    code, _, errors = export(run_dir, out, *more)
    assert code == 0 and not errors, errors
    return torch.load(out, weights_only=True)


def test_all_engines_give_the_same_weights_by_the_same_names(runs, apf_files, tmp_path, export):
    bare = build_model(load("smoke", overrides(apf_files, tmp_path))).state_dict()
    found = {name: weights(export, runs / name, tmp_path / f"{name}.pt") for name in CASES}
    for name, tensors in found.items():
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in bare.items()}
        assert all(v.dtype == bare[k].dtype for k, v in tensors.items())
        apart = torch.cat([(v - found["fsdp"][k]).abs().flatten() for k, v in tensors.items()])
        moved = torch.cat([(v - bare[k]).abs().flatten() for k, v in tensors.items()])
        assert moved.mean() > 1e-4, "trained"
        # Where a gradient is all but zero Adam's step is as large as elsewhere, and its sign is that of rounding.
        assert apart.quantile(0.99) < (1e-5 if name != "zero2_bf16" else 1e-2), name


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "file"), ("zero0", "file"), ("zero3", "run")])
def test_weights_start_another_run_where_this_one_ended(name, kind, runs, apf_files, tmp_path, export):
    source = runs / name
    if kind == "file":
        source = tmp_path / "w.pt"
        weights(export, runs / name, source)
    words = overrides(
        apf_files,
        tmp_path,
        run_id="r",
        train__max_steps=1,
        train__lr=1e-12,
        train__init_from=source,
        eval__pictures_px=0,
    )
    finish_well(Group([launch_rank(0, 1, "", ["-m", "launch", "train", "smoke", *words])]))
    mine, theirs = (read_record(run) for run in (tmp_path / "smoke" / "r", runs / name))
    assert mine["dice_per_slide"] == pytest.approx(theirs["dice_per_slide"], abs=1e-4)
    assert losses(tmp_path / "smoke" / "r")[0] < losses(runs / name)[0]


def test_settings_that_weights_do_not_show_are_told(tmp_path):
    there = load("open_nuclei_apf_std", ["model.checkpointing=true"])
    (tmp_path / "config.yaml").write_text(there.to_yaml())
    here = load("open_nuclei_apf_std", [f"train.init_from={tmp_path}"])
    assert other_settings(here) == []
    plain = load("open_nuclei_apf", [f"train.init_from={tmp_path}"])
    assert other_settings(plain) == ["model.standardise: True -> False"]
    for text in ("", "[", "model: 3", "- 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert other_settings(here) == [], text
    assert other_settings(load("open_nuclei_apf", [f"train.init_from={tmp_path / 'w.pt'}"])) == []


def test_average_best_and_one_step(runs, tmp_path, export):
    last, average = (weights(export, runs / "ddp", tmp_path / "w.pt", *more) for more in ((), ("--average",)))
    assert last.keys() == average.keys() and any(not torch.equal(last[k], average[k]) for k in last)
    by_step = {
        step: weights(export, runs / "fsdp", tmp_path / "w.pt", "--step", step) for step in ("2", "4", "last", "best")
    }
    name = "decoder.head.weight" if "decoder.head.weight" in last else sorted(last)[0]
    assert torch.equal(by_step["4"][name], by_step["last"][name])
    assert any(not torch.equal(by_step["2"][k], by_step["4"][k]) for k in last)
    assert any(all(torch.equal(by_step["best"][k], by_step[s][k]) for k in last) for s in ("2", "4"))


def test_what_cannot_be_exported_is_one_line(runs, tmp_path, export):
    for run, out, more, code, reason in (
        (tmp_path, "w.pt", (), 64, "no run directory"),
        (runs / "fsdp", "w.pt", ("--average",), 64, "no running average"),
        (runs / "zero1", "w.pt", ("--average",), 64, "no running average"),
        (runs / "fsdp", "w.pt", ("--step", "3"), 1, "no sound checkpoint for --step 3"),
        (runs / "fsdp", "w.pt", ("--step", "x"), 64, "--step x"),
        (runs / "fsdp", "none/w.pt", (), 1, "No such file"),
    ):
        got, _, errors = export(run, tmp_path / out, *more)
        assert got == code and reason in errors and errors.count("\n") == 1, errors
        assert not (tmp_path / out).exists()


def test_a_damaged_newest_checkpoint_is_stepped_over(runs, tmp_path, export):
    flip_a_byte(runs / "fsdp" / "checkpoints" / "step-4")
    code, out, errors = export(runs / "fsdp", tmp_path / "w.pt")
    assert code == 0 and "of step-2" in out
    assert errors.count("\n") == 1 and "step-4 is damaged" in errors
