"""Records, metrics and the schedule: whole or absent, no step twice, nothing invented."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from launch.config.config import ConfigError
from launch.experiments.load import load
from launch.records.clock import Clock
from launch.records.record import (
    Metrics,
    Record,
    environment,
    new_record,
    read_metrics,
    read_record,
    to_json,
    write_record,
)
from launch.records.run_dir import forced_at, open_run
from launch.train.lifetime import StopFlag, signal_name
from launch.train.optim import learning_rate, progress_of
from tests.helpers.repository import ROOT

SCHEMA = ROOT / "launch" / "records" / "record.schema.json"


def whole_record(**known):
    return new_record(run_id="r", experiment="e", **known)


def test_missing_stays_missing_and_unknown_is_refused():
    record = whole_record(status="ok", dice=0.5)
    assert record["dice"] == 0.5 and record["mfu"] is None and record["schema_version"] == 1
    with pytest.raises(ValueError, match="dcie"):
        whole_record(status="ok", dcie=0.5)
    with pytest.raises(ValueError, match="fine"):
        whole_record(status="fine")
    with pytest.raises(ValueError, match="dice is nan"):
        whole_record(status="ok", dice=float("nan"))
    with pytest.raises(ValueError, match="run_id"):
        new_record(experiment="e", status="ok")
    with pytest.raises(ValueError, match="JSON"):
        to_json({**whole_record(status="ok"), "dice": float("nan")})


def test_the_schema_beside_the_code_is_the_models():
    """The file is `to_json(Record.model_json_schema())`, for whoever reads records without this code."""
    assert SCHEMA.read_bytes() == to_json(Record.model_json_schema())


def test_first_failure_keeps_its_reason(tmp_path):
    assert write_record(tmp_path, whole_record(status="oom", reason="rank 3"), first_wins=True)
    assert not write_record(tmp_path, whole_record(status="failed", reason="connection closed"), first_wins=True)
    assert read_record(tmp_path)["reason"] == "rank 3"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("text", [None, "", '{"status"', "[]", '{"x": 1}'])
def test_unreadable_record_is_none(text, tmp_path):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path) is None


def test_metrics_of_a_resumed_run_have_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in range(1, 7):
        metrics.write(step=step, loss=0.1 + step)
        if step % 2 == 0:
            metrics.write(step=step, val_dice=0.5)
    metrics.close()
    path.write_text(path.read_text() + '{"step": 7, "lo')
    Metrics(path, 4, scored=True).close()
    assert [line["step"] for line in read_metrics(path) if "val_dice" in line] == [2, 4], "it is in the checkpoint"
    Metrics(path, 4).close()
    lines = read_metrics(path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_dice" in line] == [2], "that of step 4 comes after its checkpoint"
    assert json.loads(path.read_text().splitlines()[0])["loss"] == 1.1


def test_clock_leaves_warmup_steps_out(monkeypatch):
    now = iter(float(i) for i in range(100))
    monkeypatch.setattr("launch.records.clock.time.perf_counter", lambda: next(now))
    clock = Clock(train_seconds=10.0, timed_seconds=2.0, timed_images=4.0, timed_steps=1)
    for _ in range(5):
        clock.begin()
        clock.waited()
        assert clock.end(8) == (2.0, 50.0)
    assert clock.notes() == {"train_seconds": 20.0, "timed_seconds": 6.0, "timed_images": 20.0, "timed_steps": 3}
    assert clock.images_per_s == 20 / 6 and Clock().images_per_s is None
    assert Clock(**clock.notes()).notes() == clock.notes()


def train_config(*words):
    return load("demo_apf", ["train.max_seconds=100", "train.max_steps=50", "train.lr=1", *words]).train


def test_progress_is_the_larger_share():
    config = train_config()
    assert [progress_of(config, s, t) for s, t in ((0, 0), (10, 0), (10, 90), (50, 0), (9, 300))] == [
        0,
        0.2,
        0.9,
        1,
        1,
    ]
    assert progress_of(train_config("train.max_steps=null"), 9999, 25) == 0.25


def test_schedules():
    cosine = train_config("train.warmup=0.1")
    rates = [learning_rate(cosine, i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1 and rates[100] == pytest.approx(0.01)
    assert rates[55] == pytest.approx((1 + 0.01) / 2)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    step = train_config("train.warmup=0", "train.schedule=step", "train.decay_at=[0.5,0.8]", "train.decay_factor=0.1")
    assert [learning_rate(step, p) for p in (0, 0.49, 0.5, 0.9)] == pytest.approx([1, 1, 0.1, 0.01])
    assert learning_rate(train_config("train.warmup=0", "train.schedule=constant"), 0.7) == 1


def test_failure_is_told_on_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("launch.records.record.os.link", refuse)
    assert write_record(tmp_path, whole_record(status="oom"), first_wins=True)
    assert read_record(tmp_path)["status"] == "oom" and len(list(tmp_path.iterdir())) == 1


def test_peak_memory_is_not_that_of_the_parent():
    parent = (
        "import subprocess, sys; big = bytearray(b'x') * (400 << 20); "
        "code = 'from launch.records.record import peak_resident_gib; print(peak_resident_gib())'; "
        "subprocess.run([sys.executable, '-c', code], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.005 < float(done.stdout) < 0.2


def test_environment_holds_no_secret(monkeypatch):
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    env = environment(["n1", "n2"], ["cpu", "cpu"], "srun")
    assert "hunter2" not in json.dumps(env) and env["variables"]["SLURM_JOB_ID"] == "12"
    assert env["hosts"] == ["n1", "n2"] and env["ranks"] == 2 and env["versions"]["numpy"]


def test_stop_flag_keeps_the_first_signal_and_lets_a_late_ctrl_c_through(monkeypatch):
    now = iter([0.0, 1.0, 9.0])
    monkeypatch.setattr("launch.train.lifetime.time.monotonic", lambda: next(now))
    flag = StopFlag()
    flag._note(signal.SIGUSR1, None)
    flag._note(signal.SIGINT, None)
    assert signal_name(flag.number) == "SIGUSR1" and signal_name(0) == ""
    with pytest.raises(KeyboardInterrupt):
        flag._note(signal.SIGINT, None)


def test_run_directory(tmp_path, monkeypatch):
    config = load("smoke", [f"run_root={tmp_path}"])
    run_dir = config.run_dir(1)
    first = open_run(run_dir, config)
    assert (first.finished, first.starts) == (False, 1)
    write_record(run_dir, whole_record(status="preempted"))
    second = open_run(run_dir, load("smoke", [f"run_root={tmp_path}", "checkpoint.keep=7"]))
    assert (second.finished, second.starts) == (False, 2) and not (run_dir / "record.json").exists()
    write_record(run_dir, whole_record(status="ok"))
    assert open_run(run_dir, config).finished
    force = load("smoke", [f"run_root={tmp_path}", "force=true", "train.lr=0.1"])
    step = run_dir / "checkpoints" / "step-1"
    for job, life, anew in (
        ("7", 0, True),
        ("7", 1, False),
        ("8", 1, True),
        ("8", 2, False),
        ("8", 0, True),
        ("", 0, True),
        ("", 0, True),
    ):  # 8: its first life did not come so far
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(life))
        step.mkdir(parents=True, exist_ok=True)
        assert not open_run(run_dir, force).finished and step.exists() is not anew, (job, life)
    assert 0 < forced_at(run_dir) <= time.time() + 1 and forced_at(tmp_path) == 0
    assert not open_run(run_dir, load("smoke", [f"run_root={tmp_path}", "force=false", "train.lr=0.1"])).finished
    (run_dir / "config.yaml").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_run(run_dir, config)
    (tmp_path / "file").write_text("")
    (run_dir / "config.yaml").unlink()
    (run_dir / f".record.json.tmp-{socket.gethostname()}-99999999").write_text('{"status"')
    open_run(run_dir, config)
    assert not list(run_dir.glob(".*")), "half a record of a killed run"
    blocked = load("smoke", [f"run_root={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match="run_root"):
        open_run(blocked.run_dir(1), blocked)
