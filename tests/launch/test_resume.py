"""Stopping in every way and going on: kill -9, signals, damaged checkpoints, other numbers of ranks, finished runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.record import read_record
from tests.launch.small import (
    ROOT,
    Group,
    clean_env,
    finish_well,
    flip_a_byte,
    free_port,
    launch_rank,
    losses,
    overrides,
)

pytestmark = pytest.mark.gloo

STEPS = 24


def words(files: Path, root: Path, *extra: str, **more: object) -> list[str]:
    settings = {"run_id": "r", "train__max_steps": STEPS, "checkpoint__every_steps": 4, "checkpoint__keep": 3,
                "eval__every_steps": 8, "eval__pictures_px": 0}  # fmt: skip
    return [*overrides(files, root, **(settings | more)), *extra]


def final_weights(run_dir: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Model and optimiser of the last checkpoint, as one flat dict."""
    target = tmp_path / f"{run_dir.parent.parent.name}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step-{STEPS}", target)
    tree = torch.load(target, weights_only=False)
    flat = {f"model.{k}": v for k, v in tree["model"].items()}
    for name, moments in tree["optimizer"]["state"].items():
        flat |= {f"optimizer.{name}.{k}": v for k, v in moments.items()}
    return flat


def wait_for_steps(run_dir: Path, count: int, group) -> None:
    """Until metrics.jsonl has this many lines; the processes must still be running."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        assert all(p.poll() is None for p in group.processes), group.wait()
        time.sleep(0.002)
    raise AssertionError("training did not get there")


@pytest.fixture(scope="module")
def whole(apf_files, tmp_path_factory) -> Path:
    """A run on two ranks that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    port, program = str(free_port()), ["-m", "launch", "train", "smoke", *words(apf_files, root, "engine.name=fsdp")]
    finish_well(Group([launch_rank(rank, 2, port, program) for rank in range(2)]))
    return root / "smoke" / "r"


@pytest.fixture(scope="module")
def stopped(apf_files, tmp_path_factory) -> Path:
    """A run on two ranks that one rank's USR1 stopped between two steps."""
    root = tmp_path_factory.mktemp("stopped")
    port, program = str(free_port()), ["-m", "launch", "train", "smoke", *words(apf_files, root, "engine.name=fsdp")]
    group = Group([launch_rank(rank, 2, port, program) for rank in range(2)])
    wait_for_steps(root / "smoke" / "r", 6, group)
    group.send(signal.SIGUSR1, [1])
    assert group.wait() == [75, 75], group.errors
    return root


@pytest.mark.parametrize("killed", [[0, 1], [1], [0]])
def test_kill_9_at_a_random_step_changes_nothing(killed, whole, apf_files, tmp_path, start):
    run_dir = tmp_path / "smoke" / "r"
    kill_at = random.SystemRandom().randrange(5, STEPS - 2)
    # One of the three writes its checkpoints while it trains on: it may be killed while it does.
    more = ["engine.name=fsdp", *(["checkpoint.background=true"] if len(killed) == 2 else [])]
    group = start(2, words(apf_files, tmp_path, *more))
    wait_for_steps(run_dir, kill_at, group)
    group.send(signal.SIGKILL, killed)
    # Who is left must notice by itself, say so, and not wait for ever.
    assert group.wait(120) == [-9 if rank in killed else 1 for rank in range(2)], group.errors
    record = read_record(run_dir)
    assert record is None if len(killed) == 2 else record["status"] == "failed"
    finish_well(start(2, words(apf_files, tmp_path, *more)))
    assert losses(run_dir) == losses(whole), f"killed at line {kill_at}"
    a, b = final_weights(run_dir, tmp_path), final_weights(whole, tmp_path)
    assert a.keys() == b.keys() and len(a) > 40
    assert all(torch.equal(a[k], b[k]) for k in a), f"killed at line {kill_at}"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    reference = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [[x for x in part if "val_dice" in x or "test_dice" in x] for part in (lines, reference)]
    assert measured[0] == measured[1], "evaluations once each, with the same numbers"
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    assert read_record(run_dir)["starts"] == 2


def test_kill_9_in_the_last_evaluation_loses_nothing(whole, apf_files, tmp_path, start):
    """A pipe in place of a test slide holds the evaluation where it is while the process is killed."""
    folder = shutil.copytree(apf_files, tmp_path / "files")
    slide, aside = folder / "j.tokens.h5", tmp_path / "aside"
    more = {"eval__pictures_px": 32}
    group = start(1, words(folder, tmp_path, **more))
    run_dir = tmp_path / "smoke" / "r"
    wait_for_steps(run_dir, 2, group)
    slide.rename(aside)
    os.mkfifo(slide)
    deadline = time.monotonic() + 240
    while not (run_dir / "predictions" / "i.npz").exists():
        assert group.processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    group.send(signal.SIGKILL)
    assert group.wait(60) == [-9] and read_record(run_dir) is None
    slide.unlink()
    aside.rename(slide)
    group = start(1, words(folder, tmp_path, **more))
    finish_well(group)
    assert f"resumed at step {STEPS}" in group.errors[0]
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-5)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "test_dice" in line] == [STEPS]
    assert [line["step"] for line in lines if "val_dice" in line] == [8, 16]
    assert read_record(run_dir)["starts"] == 2 and len(list((run_dir / "predictions").glob("*.npz"))) == 3


def test_a_signal_stops_all_ranks_at_the_same_step(stopped):
    run_dir = stopped / "smoke" / "r"
    record = read_record(run_dir)
    assert record["status"] == "preempted" and "SIGUSR1" in record["reason"]
    assert 5 <= record["steps"] == len(losses(run_dir)) < STEPS
    assert record["dice"] is None and record["train_seconds"] > 0
    assert (run_dir / "checkpoints" / f"step-{record['steps']}" / "COMPLETE").exists()


@pytest.mark.parametrize(("world", "engine"), [(1, "ddp"), (4, "fsdp")])
def test_two_ranks_go_on_as_one_or_four(world, engine, stopped, whole, apf_files, tmp_path, start):
    shutil.copytree(stopped / "smoke", tmp_path / "smoke")
    run_dir = tmp_path / "smoke" / "r"
    steps = read_record(run_dir)["steps"]
    if engine == "ddp":  # another engine is another setting, but the checkpoint does not mind
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(text.replace("name: fsdp", "name: ddp"))
    group = start(world, words(apf_files, tmp_path, f"engine.name={engine}"))
    finish_well(group)
    assert f"resumed at step {steps}" in group.errors[0] and "2 ranks" in group.errors[0]
    assert losses(run_dir)[:steps] == losses(whole)[:steps]
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-5)
    assert read_record(run_dir)["gpus"] == world


def test_damaged_newest_checkpoint_falls_back(whole, apf_files, tmp_path, start):
    shutil.copytree(whole.parent, tmp_path / "smoke")
    run_dir = tmp_path / "smoke" / "r"
    (run_dir / "record.json").unlink()
    flip_a_byte(run_dir / "checkpoints" / f"step-{STEPS}")
    group = start(1, words(apf_files, tmp_path, "engine.name=fsdp"))
    finish_well(group)
    assert f"resumed at step {STEPS - 4}" in group.errors[0]
    assert f"step-{STEPS} is damaged" in group.errors[0]
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-5)
    names = {p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith("damaged")}
    assert names == {f"step-{s}" for s in (STEPS - 8, STEPS - 4, STEPS)}, "the newest three, all sound"


def test_finished_other_settings_and_force(whole, apf_files, tmp_path, start):
    shutil.copytree(whole.parent, tmp_path / "smoke")
    run_dir = tmp_path / "smoke" / "r"
    before = (run_dir / "record.json").read_bytes()
    for world in (1, 2):
        group = start(world, words(apf_files, tmp_path, "engine.name=fsdp"))
        finish_well(group)
        assert "already finished" in group.errors[0]
    assert (run_dir / "record.json").read_bytes() == before
    group = start(1, words(apf_files, tmp_path, "engine.name=fsdp", "train.lr=0.5", "train.seed=3"))
    assert group.wait() == [64]
    line = group.errors[0]
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "train.lr: 0.003 -> 0.5" in line and "train.seed: 0 -> 3" in line and "force=true" in line
    assert (run_dir / "record.json").read_bytes() == before
    finish_well(start(1, words(apf_files, tmp_path, "engine.name=fsdp", "train.max_steps=2", "force=true")))
    assert len(losses(run_dir)) == 2 and read_record(run_dir)["steps"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_launchers_and_ctrl_c(launcher, apf_files, tmp_path):
    """The real launchers, stopped as Ctrl-C in a terminal stops them, and started again."""
    tool = Path(sys.executable).with_name(launcher)
    if not tool.exists():
        pytest.skip(f"no {launcher} beside {sys.executable}")
    start = {"torchrun": ["--standalone", "--nproc-per-node", "2"], "mpiexec": ["-n", "2", sys.executable]}[launcher]
    command = [str(tool), *start, "-m", "launch", "train", "smoke", *words(apf_files, tmp_path)]
    run_dir = tmp_path / "smoke" / "r"
    first = subprocess.Popen(
        command, cwd=ROOT, env=clean_env(), text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        path = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (path.exists() and path.read_text().count("\n") >= 5):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(120) != 0
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
        errors = first.communicate()[1]
    assert read_record(run_dir)["status"] == "preempted", errors
    second = subprocess.run(command, cwd=ROOT, env=clean_env(), text=True, capture_output=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "resumed at step" in second.stderr
    assert len(losses(run_dir)) == STEPS and read_record(run_dir)["status"] == "ok"
