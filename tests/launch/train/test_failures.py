"""Bad input and failing runs, each through the real command line: one line, the right exit code, the right record."""

import fcntl
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

from launch.config.config import ConfigError
from launch.experiments.load import load
from launch.records.record import read_record
from launch.records.run_dir import open_run
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import ended_alike, finish_well, overrides, stoppable, wait_for_steps


def fails(group, code: int) -> str:
    """All ranks end with this code; returns the last line that any of them printed."""
    assert set(group.wait()) == {code}, group.errors
    lines = [line for text in group.errors for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, group.errors
    return lines[0]


def test_settings_that_need_no_ranks_fail_before_torch(apf_files, tmp_path, start):
    assert "no such folder" in fails(start(1, overrides(tmp_path / "none", tmp_path, data__split="null")), 64)
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["zz"]}))
    words = overrides(apf_files, tmp_path, data__split=tmp_path / "split.json")
    assert "no token file for zz" in fails(start(1, words), 64)
    group = start(2, overrides(apf_files, tmp_path, train__batch=3))
    assert "3 / (2 ranks x 1 accumulate) = 1.5" in fails(group, 64)
    assert not (tmp_path / "smoke").exists()


@pytest.mark.gloo
def test_model_that_refuses_its_sizes_is_a_setting(apf_files, tmp_path, start):
    words = overrides(apf_files, tmp_path, data__length=18, model__decoder="raster")
    assert "perfect square of tokens, got 18; use 16" in fails(start(2, words), 64)
    assert not (tmp_path / "smoke").exists()


@pytest.mark.gloo
def test_full_disk_is_a_record_and_the_run_goes_on_when_there_is_room(whole, apf_files, tmp_path, start):
    words = stoppable(apf_files, tmp_path)
    run_dir = tmp_path / "smoke" / "r"
    group = start(2, words)
    wait_for_steps(run_dir, 5, group)  # step-4 is there; from now on files cannot grow to the size of a checkpoint
    for process in group.processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40 << 10, 40 << 10))
    line = fails(group, 1)
    record = read_record(run_dir)
    assert record["status"] == "failed" and "File too large" in record["reason"] and "File too large" in line
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left and left <= {f"step-{step}" for step in range(4, record["steps"], 4)}, "earlier ones stay, whole"
    finish_well(start(2, words))
    ended_alike(run_dir, whole)


@pytest.mark.gloo
def test_files_that_do_not_fit_are_told_by_one_rank(apf_files, tmp_path, start):
    assert "more than data.length=8" in fails(start(2, overrides(apf_files, tmp_path, data__length=8)), 64)


@pytest.mark.gloo
def test_file_that_turns_out_damaged_in_training_is_a_record(apf_files, tmp_path, start):
    folder = shutil.copytree(apf_files, tmp_path / "files")
    path = folder / "h.tokens.h5"  # a test slide: its counts are read only after training
    with h5py.File(path) as file:
        chunk = file["mask_counts"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(data)
    line = fails(start(2, overrides(folder, tmp_path, run_id="r", train__max_steps=2)), 1)
    record = read_record(tmp_path / "smoke" / "r")
    assert record["status"] == "failed" and "h.tokens.h5" in record["reason"] and "h.tokens.h5" in line
    assert record["steps"] == 2 and record["dice"] is None


@pytest.mark.gloo
def test_exploding_loss_is_a_failed_record(apf_files, tmp_path, start):
    words = overrides(
        apf_files,
        tmp_path,
        run_id="r",
        train__lr=1e30,
        train__clip=0,
        train__warmup=0,
        train__log_every=50,
        checkpoint__every_steps=1,
    )
    line = fails(start(2, words), 1)
    record = read_record(tmp_path / "smoke" / "r")
    assert record["status"] == "failed" and "loss is" in record["reason"] and "loss is" in line
    assert record["dice"] is None and 1 <= record["steps"] < 5, "found at once, although nothing was due to be logged"
    assert len(list((tmp_path / "smoke" / "r" / "checkpoints").glob("step-*"))) <= record["steps"]
    tails = list((tmp_path / "smoke" / "r" / "logs").glob("*/error-rank-*.txt"))
    assert tails and "Traceback" in tails[0].read_text()


@pytest.mark.gloo
def test_out_of_memory_is_an_oom_record(apf_files, tmp_path, start):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    words = overrides(apf_files, tmp_path, run_id="r", model__mlp_dim=60_000_000)
    line = fails(start(1, words, preexec_fn=limit), 1)
    record = read_record(tmp_path / "smoke" / "r")
    assert record["status"] == "oom", line
    assert record["gpus"] == 1 and record["parameters"] is None
    assert "you tried to allocate" in record["reason"], "which allocation"
    (summary,) = (tmp_path / "smoke" / "r" / "logs").glob("*/memory-rank-0.txt")
    assert "VmPeak:" in summary.read_text() and "MemAvailable:" in summary.read_text()


def test_ranks_end_with_a_killed_launcher_and_a_second_start_waits_for_them(apf_files, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "launch",
        "train",
        "smoke",
    ]
    words = overrides(apf_files, tmp_path, train__max_steps=100_000, run_id="x")
    log = tmp_path / "smoke" / "x" / "metrics.jsonl"
    agent = subprocess.Popen([*command, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up_s = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    children = Path("/proc", str(agent.pid), "task", str(agent.pid), "children").read_text().split()
    agent.kill()
    agent.wait()
    assert len(children) == 2
    # The old ranks may still be saving: the second start waits for them, then sees whose folder it is.
    again = subprocess.run([*command, *words, "train.lr=0.5"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert not any(Path("/proc", pid).exists() for pid in children)
    assert "other settings (train.lr" in again.stderr
    record = read_record(log.parent)
    assert record["status"] == "preempted" and record["starts"] == 1


def test_a_run_folder_in_use_is_refused(apf_files, tmp_path, monkeypatch):
    config = load("smoke", overrides(apf_files, tmp_path, run_id="x"))
    folder = config.run_dir(1)
    folder.mkdir(parents=True)
    monkeypatch.setattr("launch.records.run_dir._LOCK_WAIT_S", 0.5)
    with (folder / "lock").open("w") as other:
        other.write("pid 12 on node7")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by pid 12 on node7"):
            open_run(folder, config)
    assert not open_run(folder, config).finished


def test_bad_data_leaves_no_run_folder(apf_files, tmp_path, start):
    assert "data.length=4" in fails(start(1, overrides(apf_files, tmp_path, data__length=4)), 64)
    assert not (tmp_path / "smoke").exists()
