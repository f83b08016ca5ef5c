"""Checkpoints on one rank: complete or absent, checked before use, bit-exact; also when the disk is full."""

import errno
import json
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch

from launch.data.token_files import TokenFiles
from launch.engines.ranks import find_ranks
from launch.experiments.load import load
from launch.train import checkpoint
from launch.train.checkpoint import BackgroundSaver, Place
from launch.train.lifetime import StopFlag
from launch.train.trainer import Trainer
from tests.helpers.small_runs import flip_a_byte, losses, overrides

pytestmark = pytest.mark.usefixtures("one_rank")


def state(value: float) -> dict:
    return {"model": {"w": torch.full((64, 64), value), "b": torch.arange(5.0) + value}}


@pytest.fixture
def three(tmp_path) -> Path:
    for step in (10, 20, 30):
        checkpoint.save(Place(tmp_path, step, 3), state(step), {"step": step, "text": "x"})
    return tmp_path


def newest(folder: Path) -> tuple[int | None, float, list[str]]:
    said: list[str] = []
    found = state(0.0)
    notes = checkpoint.load_newest(folder, found, said.append)
    return notes and notes["step"], float(found["model"]["w"][0, 0]), said


def test_newest_is_loaded_and_old_ones_go(three):
    assert newest(three) == (30, 30.0, [])
    checkpoint.save(Place(three, 40, 2), state(40), {"step": 40})
    assert contents(three) == ["step-30", "step-40"]
    assert newest(three)[0] == 40


def test_order_is_by_number_not_by_name(tmp_path):
    for step in (9, 100):
        checkpoint.save(Place(tmp_path, step, 3), state(step), {"step": step})
    assert newest(tmp_path)[0] == 100


def cut_in_half(step: Path) -> None:
    path = max(step.glob("*.distcp"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_file(step: Path) -> None:
    next(step.glob("*.distcp")).unlink()


def lose_the_index(step: Path) -> None:
    (step / ".metadata").write_bytes(b"")


def half_complete(step: Path) -> None:
    (step / "COMPLETE").write_text('{"step": 30, "fi')


@pytest.mark.parametrize("damage", [flip_a_byte, cut_in_half, lose_a_file, lose_the_index, half_complete])
def test_damage_is_found_said_and_stepped_over(damage, three):
    damage(three / "step-30")
    step, value, said = newest(three)
    assert (step, value) == (20, 20.0)
    assert len(said) == 1 and "step-30 is damaged" in said[0]
    assert (three / "damaged-step-30").exists()
    assert newest(three) == (20, 20.0, [])
    checkpoint.save(Place(three, 30, 1), state(31), {"step": 30})
    assert newest(three)[:2] == (30, 31.0)


def test_unfinished_ones_do_not_count_and_are_cleaned(three):
    (three / "step-30" / "COMPLETE").unlink()
    shutil.copytree(three / "step-10", three / "step-50.tmp")
    assert newest(three) == (20, 20.0, [])
    checkpoint.clean(three)
    assert contents(three) == ["step-10", "step-20"]


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_one_that_is_saved_again_counts_until_the_new_one_does(three, monkeypatch):
    """The same step once more, with a score: wherever it stops, one of the two is there."""

    write = checkpoint.write_atomic

    def killed(path: object, data: object, *_more: object) -> None:
        if getattr(path, "name", "COMPLETE") == "COMPLETE":  # the notes are written before
            raise KeyboardInterrupt
        write(path, data)

    for owner, place in ((checkpoint.Writer, "write_data"), (checkpoint, "write_atomic")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, place, killed)
            patched.setattr(checkpoint, "clean", lambda folder: None)  # kill -9 leaves no time for it
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(Place(three, 30, 1), state(31), {"step": 30})
        checkpoint.clean(three)
        assert newest(three) == (30, 30.0, []) and contents(three) == ["step-10", "step-20", "step-30"]
    checkpoint.save(Place(three, 30, 1), state(31), {"step": 30})
    assert newest(three) == (30, 31.0, []) and contents(three) == ["step-30"]
    shutil.copytree(three / "step-30", three / "step-30.old")
    checkpoint.clean(three)
    assert contents(three) == ["step-30"]


def test_the_best_is_looked_for_in_the_newest_sound_one(tmp_path):
    for step, best in ((10, [0.5, 10]), (20, [0.5, 10]), (30, [0.7, 30])):
        checkpoint.save(Place(tmp_path, step, 3), state(step), {"step": step, "best": best})
    said: list[str] = []
    assert checkpoint.find_sound(tmp_path, "best", said.append) == tmp_path / "step-30" and not said
    (tmp_path / "step-30" / "notes.json").write_text('{"step": 30, "be')
    assert checkpoint.find_sound(tmp_path, "best", said.append) == tmp_path / "step-10"
    assert len(said) == 1 and "notes.json has changed" in said[0]


def test_none_at_all_and_all_damaged(tmp_path, three):
    assert newest(tmp_path / "none") == (None, 0.0, [])
    for step in (10, 20, 30):
        cut_in_half(three / f"step-{step}")
    step, value, said = newest(three)
    assert step is None and value == 0.0 and len(said) == 3


def test_full_disk_leaves_the_earlier_checkpoints(three, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_shards", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(Place(three, 40, 1), state(40), {"step": 40})
    assert newest(three) == (30, 30.0, [])


def train(files: Path, root: Path, stop_after: int | None, **more: object) -> Trainer:
    """A trainer of this process that runs to the end, or is asked to stop when it has done some steps."""
    settings = {"model__dropout": 0.3, "train__max_steps": 8, "eval__pictures_px": 0} | more
    config = load("smoke", overrides(files, root, **settings))
    run_dir = root / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    stop = StopFlag()
    trainer = Trainer(config, TokenFiles(config.data), find_ranks({}), torch.device("cpu"), run_dir, stop, print)
    if stop_after is not None:
        step = trainer.engine.step

        def stopping(rate: float, limit: float) -> float:
            stop.number = 15 if trainer.step + 1 >= stop_after else 0
            return step(rate, limit)

        trainer.engine.step = stopping
    outcome = trainer.run()
    assert outcome.stopped_by == ("SIGTERM" if stop_after is not None else "")
    return trainer


def test_files_that_cannot_be_written_raise_their_cause_and_leave_room(three):
    """Really written, into a limit on the size of files; torch wraps the error in pages of traceback."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(Place(three, 40, 1), state(40), {"step": 40})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(three) == ["step-10", "step-20", "step-30"]
    assert newest(three) == (30, 30.0, [])


def test_in_the_background_it_is_the_state_of_the_moment_and_the_one_before_counts_until_then(three, monkeypatch):
    held = threading.Event()
    write = checkpoint.Writer.write_data

    def slowly(self, plan, planner):
        assert held.wait(60)
        return write(self, plan, planner)

    monkeypatch.setattr(checkpoint.Writer, "write_data", slowly)
    saver, values = BackgroundSaver(), state(40.0)
    saver.begin(Place(three, 40, keep=2, best=10), values, {"step": 40})
    assert saver._place and saver.writing and newest(three) == (30, 30.0, [])
    values["model"]["w"].fill_(-1.0)  # training goes on in place
    held.set()
    saver.publish()
    assert not saver._place and newest(three) == (40, 40.0, [])
    assert contents(three) == ["step-10", "step-30", "step-40"], "two newest and the best"
    saver.begin(Place(three, 50, keep=2), values, {"step": 50})
    saver.begin(Place(three, 60, keep=2), values, {"step": 60})
    assert newest(three)[0] == 50, "the next one waits for the one before"
    saver.close()
    assert newest(three) == (60, -1.0, [])


def test_a_full_disk_in_the_background_is_found_when_all_meet(three):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = BackgroundSaver()
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))
    try:
        saver.begin(Place(three, 40, keep=1), state(40), {"step": 40})
        with pytest.raises(OSError, match="File too large"):
            saver.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(three) == ["step-10", "step-20", "step-30"]
    saver.begin(Place(three, 40, keep=1), state(41), {"step": 40})
    saver.close()
    assert newest(three) == (40, 41.0, [])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_first_step_is_adams_first(engine, apf_files, tmp_path):
    trainer = train(apf_files, tmp_path, None, engine__name=engine)
    assert {int(moments["step"]) for moments in trainer.engine.optimizer.state.values()} == {8}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_checkpoint_does_not_say_how_steps_are_computed(engine, apf_files, tmp_path):
    """One of before the optimiser was fused goes on fused."""
    engine = train(apf_files, tmp_path, None, engine__name=engine).engine
    old = engine.state()
    for group in old["optimizer"]["param_groups"]:
        assert group["fused"] is True
        group["fused"] = None
    engine.restore(old)
    assert [group["fused"] for group in engine.optimizer.param_groups] == [True, True]


def test_speed_is_of_one_machine_and_time_of_all(apf_files, tmp_path, monkeypatch):
    first = train(apf_files, tmp_path, 6)
    assert first.clock.timed_steps == 3
    monkeypatch.setattr("launch.train.trainer.device_name", lambda device: "another")
    second = train(apf_files, tmp_path, 7)
    assert second.clock.timed_steps == 0 and second.clock.train_seconds > first.clock.train_seconds
    third = train(apf_files, tmp_path, None)
    assert third.clock.timed_steps == 0 and third.step == 8


def test_time_limit_holds_over_all_starts(apf_files, tmp_path):
    limits = {"train__max_steps": "null", "train__max_seconds": 4}
    first = train(apf_files, tmp_path, 3, **limits)
    before = first.clock.train_seconds
    assert 0 < before < 4
    second = train(apf_files, tmp_path, None, **limits)
    assert 4 <= second.clock.train_seconds < 7
    assert len(losses(tmp_path / "run")) == second.step > 3
    rates = [json.loads(x)["lr"] for x in (tmp_path / "run/metrics.jsonl").open() if "lr" in x]
    assert rates[3] <= max(rates) and rates[-1] < 0.5 * max(rates), "the schedule goes on where it was"


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_resume_is_exact_with_dropout(engine, apf_files, tmp_path):
    whole = train(apf_files, tmp_path / "whole", None, engine__name=engine)
    parts = train(apf_files, tmp_path / "parts", 3, engine__name=engine)
    assert parts.step == 3
    parts = train(apf_files, tmp_path / "parts", None, engine__name=engine)
    assert losses(tmp_path / "parts" / "run") == losses(tmp_path / "whole" / "run")
    for (name, a), b in zip(whole.engine.module.named_parameters(), parts.engine.module.parameters(), strict=True):
        a, b = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (a, b))
        assert torch.equal(a, b), name
    times = [json.loads(x).get("train_seconds", 0) for x in (tmp_path / "parts/run/metrics.jsonl").open()]
    assert times[:-1] == sorted(times[:-1]), "the training clock goes on where it stopped"
