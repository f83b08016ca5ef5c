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
from typing import Literal

import pytest

from launch.records.record import read_record
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import (
    STEPS,
    Group,
    clean_env,
    ended_alike,
    finish_well,
    flip_a_byte,
    free_port,
    launch_rank,
    losses,
    stoppable,
    wait_for_steps,
)

pytestmark = pytest.mark.gloo


def once_or_each(fixture_name: str, config: pytest.Config) -> Literal["module", "function"]:
    """With `--repeat` every repetition has a disturbed run of its own."""
    return "function" if config.getoption("repeat", 1) > 1 else "module"


@pytest.fixture(scope=once_or_each)
def stopped(apf_files, tmp_path_factory) -> Path:
    """A run on two ranks that one rank's USR1 stopped between two steps."""
    root = tmp_path_factory.mktemp("stopped")
    port, program = str(free_port()), ["-m", "launch", "train", "smoke", *stoppable(apf_files, root)]
    group = Group([launch_rank(rank, 2, port, program) for rank in range(2)])
    wait_for_steps(root / "smoke" / "r", random.SystemRandom().randrange(5, STEPS - 8), group)
    group.send(signal.SIGUSR1, [1])
    assert group.wait() == [75, 75], group.errors
    return root


@pytest.mark.parametrize("killed", [[0, 1], [0], pytest.param([1], marks=pytest.mark.slow)])
def test_kill_9_at_a_random_step_changes_nothing(killed, whole, apf_files, tmp_path, start):
    run_dir = tmp_path / "smoke" / "r"
    kill_at = random.SystemRandom().randrange(5, STEPS - 2)
    # One of the three writes its checkpoints while it trains on: it may be killed while it does.
    more = ["checkpoint.background=true"] if len(killed) == 2 else []
    group = start(2, stoppable(apf_files, tmp_path, *more))
    wait_for_steps(run_dir, kill_at, group)
    group.send(signal.SIGKILL, killed)
    # Who is left must notice by itself, say so, and not wait for ever.
    assert group.wait(120) == [-9 if rank in killed else 1 for rank in range(2)], group.errors
    record = read_record(run_dir)
    assert record is None if len(killed) == 2 else record["status"] == "failed"
    print(f"killed at line {kill_at}")  # shown when what follows fails
    finish_well(start(2, stoppable(apf_files, tmp_path, *more)))
    ended_alike(run_dir, whole)
    assert read_record(run_dir)["starts"] == 2


def test_kill_9_in_the_last_evaluation_loses_nothing(whole, apf_files, tmp_path, start):
    """A pipe in place of a test slide holds the evaluation where it is while the process is killed."""
    folder = shutil.copytree(apf_files, tmp_path / "files")
    slide, aside = folder / "j.tokens.h5", tmp_path / "aside"
    more = {"eval__pictures_px": 32}
    group = start(1, stoppable(folder, tmp_path, engine__name="ddp", **more))
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
    group = start(1, stoppable(folder, tmp_path, engine__name="ddp", **more))
    finish_well(group)
    assert f"resumed at step {STEPS}" in group.errors[0]
    assert losses(run_dir) == pytest.approx(losses(whole), abs=1e-5)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "test_dice" in line] == [STEPS]
    assert [line["step"] for line in lines if "val_dice" in line] == [8, 16]
    assert read_record(run_dir)["starts"] == 2 and len(list((run_dir / "predictions").glob("*.npz"))) == 3


def test_evaluations_by_time_are_neither_lost_nor_repeated(apf_files, tmp_path, start):
    """The newest checkpoint is that of the best evaluation, which comes after it was measured."""
    saved = {"checkpoint__every_steps": "null", "checkpoint__every_seconds": "null"}
    words = stoppable(
        apf_files, tmp_path, engine__name="ddp", eval__every_steps="null", eval__every_seconds=1e-9, **saved
    )
    run_dir = tmp_path / "smoke" / "r"
    group = start(1, words)
    wait_for_steps(run_dir, random.SystemRandom().randrange(8, 2 * STEPS - 8), group)
    group.send(signal.SIGKILL)
    assert group.wait(60) == [-9]
    group = start(1, words)
    finish_well(group)
    assert "resumed at step" in group.errors[0] and len(losses(run_dir)) == STEPS
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "val_dice" in line]
    assert [line["step"] for line in scores] == list(range(1, STEPS))
    assert all(line["train_seconds"] > 0 and line["train_tflop"] > 0 for line in scores)


def test_a_signal_stops_all_ranks_at_the_same_step(stopped):
    run_dir = stopped / "smoke" / "r"
    record = read_record(run_dir)
    assert record["status"] == "preempted" and "SIGUSR1" in record["reason"]
    assert 5 <= record["steps"] == len(losses(run_dir)) < STEPS
    assert record["dice"] is None and record["train_seconds"] > 0
    assert (run_dir / "checkpoints" / f"step-{record['steps']}" / "COMPLETE").exists()


def test_after_a_signal_the_same_ranks_end_with_the_same_weights(stopped, whole, apf_files, tmp_path, start):
    shutil.copytree(stopped / "smoke", tmp_path / "smoke")
    finish_well(start(2, stoppable(apf_files, tmp_path)))
    ended_alike(tmp_path / "smoke" / "r", whole)


@pytest.mark.parametrize(("world", "engine"), [(1, "ddp"), pytest.param(4, "fsdp", marks=pytest.mark.slow)])
def test_two_ranks_go_on_as_one_or_four(world, engine, stopped, whole, apf_files, tmp_path, start):
    shutil.copytree(stopped / "smoke", tmp_path / "smoke")
    run_dir = tmp_path / "smoke" / "r"
    steps = read_record(run_dir)["steps"]
    if engine == "ddp":  # another engine is another setting, but the checkpoint does not mind
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(text.replace("name: fsdp", "name: ddp"))
    group = start(world, stoppable(apf_files, tmp_path, engine__name=engine))
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
    group = start(2, stoppable(apf_files, tmp_path))
    finish_well(group)
    assert f"resumed at step {STEPS - 4}" in group.errors[0]
    assert f"step-{STEPS} is damaged" in group.errors[0]
    ended_alike(run_dir, whole)
    names = {p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith("damaged")}
    assert names == {f"step-{s}" for s in (STEPS - 8, STEPS - 4, STEPS)}, "the newest three, all sound"


def test_finished_other_settings_and_force(whole, apf_files, tmp_path, start):
    shutil.copytree(whole.parent, tmp_path / "smoke")
    run_dir = tmp_path / "smoke" / "r"
    before = (run_dir / "record.json").read_bytes()
    for world in (1, 2):
        group = start(world, stoppable(apf_files, tmp_path))
        finish_well(group)
        assert "already finished" in group.errors[0]
    assert (run_dir / "record.json").read_bytes() == before
    group = start(1, stoppable(apf_files, tmp_path, "train.lr=0.5", "train.seed=3"))
    assert group.wait() == [64]
    line = group.errors[0]
    assert line.startswith("error: ") and line.count("\n") == 1
    assert "train.lr: 0.003 -> 0.5" in line and "train.seed: 0 -> 3" in line and "force=true" in line
    assert (run_dir / "record.json").read_bytes() == before
    finish_well(start(1, stoppable(apf_files, tmp_path, "train.max_steps=2", "force=true")))
    assert len(losses(run_dir)) == 2 and read_record(run_dir)["steps"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_launchers_and_ctrl_c(launcher, apf_files, tmp_path):
    """The real launchers, stopped as Ctrl-C in a terminal stops them, and started again."""
    tool = Path(sys.executable).with_name(launcher)
    if not tool.exists():
        pytest.skip(f"no {launcher} beside {sys.executable}")
    start = {"torchrun": ["--standalone", "--nproc-per-node", "2"], "mpiexec": ["-n", "2", sys.executable]}[launcher]
    command = [str(tool), *start, "-m", "launch", "train", "smoke", *stoppable(apf_files, tmp_path, engine__name="ddp")]
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
