"""The committed 64K job script on a real SLURM: two nodes, a signal, a cancel, a dead node, jobs that cannot start."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.config.sites import load_site
from launch.jobs.render import render
from launch.jobs.submit import bad_nodes
from launch.jobs.table import JOBS
from tests.helpers.cluster import wait_for
from tests.helpers.jobs import Jobs
from tests.helpers.repository import ROOT
from tests.helpers.sites import changed_site
from tests.helpers.small_runs import losses

ONE, TWO = ("-N1", "--ntasks-per-node=1"), ("-N2", "--ntasks-per-node=1")


def tensors(run_dir: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by their path in it."""
    newest = max((run_dir / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    whole = tmp_path / f"{run_dir.name}.pt"
    dcp_to_torch_save(newest, whole)
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                walk(inner, f"{path}/{i}")

    walk(torch.load(whole, weights_only=False), "")
    return found


def same_result(jobs: Jobs, tmp_path: Path, one: str, other: str) -> None:
    """Two runs ended with the same weights and optimiser, bit for bit, and went through the same losses."""
    a, b = (tensors(jobs.run_dir(name), tmp_path) for name in (one, other))
    assert a.keys() == b.keys() and len(a) > 20
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert losses(jobs.run_dir(one)) == losses(jobs.run_dir(other))


def test_signalled_requeued_and_finished_with_the_same_weights(jobs: Jobs, tmp_path: Path):
    calm = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("calm"), "train.steps=30", options=TWO)
    shaken = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("shaken"), "train.steps=30", options=TWO)
    jobs.wait_steps("shaken", int(shaken), 5)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", shaken)
    assert jobs.cluster.wait_job(calm) == "COMPLETED", jobs.log(calm)
    assert jobs.cluster.wait_job(shaken) == "COMPLETED", jobs.log(shaken)
    assert jobs.cluster.job(shaken)["Restarts"] == "1"
    log = jobs.log(shaken)
    assert "USR1: all ranks save together" in log and "requeued as life 2" in log and "resumed at step" in log
    record = jobs.record("shaken")
    assert (record["status"], record["starts"], record["gpus"], record["nodes"]) == ("ok", 2, 2, 2)
    assert jobs.record("calm")["starts"] == 1 and jobs.record("calm")["steps"] == 30
    same_result(jobs, tmp_path, "calm", "shaken")
    run_dir = jobs.run_dir("shaken")
    assert (run_dir / "job.sh").read_text().startswith("#!/usr/bin/env bash\n# APF-UNETR on PAIP at 65,536 px")
    lives = sorted(path.name for path in (run_dir / "slurm").iterdir())
    assert lives == [f"{shaken}.0.txt", f"{shaken}.1.txt"]
    captured = (run_dir / "slurm" / f"{shaken}.1.txt").read_text()
    assert f"JobId={shaken}" in captured and "MASTER_ADDR=node" in captured and "WORLD_SIZE=2" in captured
    environment = json.loads((run_dir / "env.json").read_text())
    assert environment["launcher"] == "srun" and len(environment["hosts"]) == 2


def test_scancel_leaves_a_record_that_says_so(jobs: Jobs):
    number = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("gone", train__max_steps=100_000), options=ONE)
    jobs.wait_steps("gone", int(number), 3)
    jobs.cluster.run("scancel", number)
    assert jobs.cluster.wait_job(number) == "CANCELLED"
    end_s = time.monotonic() + 30
    while "scancel" not in jobs.log(number) and time.monotonic() < end_s:
        time.sleep(0.2)
    record = jobs.record("gone")
    assert record["status"] == "preempted"
    assert record["reason"].startswith(f"job {number} was cancelled (scancel); SIGTERM: checkpointed at step")
    assert jobs.cluster.job(number)["Restarts"] == "0"


def test_jobs_that_cannot_start_say_why_in_one_line(jobs: Jobs, tmp_path: Path):
    account = tmp_path / "account.sh"
    account.write_text(render(JOBS["paip_64k"], changed_site(load_site("generic-cuda"), account_required=True)))
    small = jobs.settings("never")
    cases = {
        jobs.sbatch(account, *small, options=TWO): "generic-cuda needs an account: sbatch -A PROJECT",
        jobs.sbatch("jobs/paip_64k.sh", *small, "data.dir=/nowhere", options=TWO): "data.dir=/nowhere: no such folder",
        jobs.sbatch("jobs/paip_64k.sh", *small, "train.batch=5", options=TWO): "train.batch=5 cannot be shared: 5 / (2",
        jobs.sbatch("jobs/paip_64k.sh", *small, "train.stepz=5", options=TWO): "unknown key 'train.stepz'",
        jobs.sbatch("jobs/paip_64k.sh", *small, options=TWO, PATCHING="equal"): "PATCHING=equal: must be apf",
        jobs.sbatch("jobs/hct_patch.sh", *small, options=TWO, PATCHING="uniform"): "hct_patch has no uniform variant",
        jobs.sbatch("jobs/paip_64k.sh", *small, options=TWO, PYTHON="/no/python"): "PYTHON=/no/python: no such program",
        jobs.sbatch("jobs/paip_64k.sh", options=("-N2", "-n3", "--ntasks-per-node=2")): "3 tasks on 2 nodes",
    }
    for number, words in cases.items():
        assert jobs.cluster.wait_job(number, 60) == "FAILED", jobs.log(number)
        assert jobs.cluster.job(number)["ExitCode"] == "64:0", words
        lines = [line for line in jobs.log(number).splitlines() if line.strip()]
        assert len(lines) == 1 and words in lines[0] and lines[0].startswith("error: "), lines
    assert not jobs.runs.exists(), "a job that cannot start leaves nothing behind"


@pytest.mark.slow
def test_a_node_dies_and_the_job_finishes_on_others(jobs: Jobs, tmp_path: Path):
    settings = {"checkpoint__every_steps": 10}
    calm = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("calm", **settings), options=TWO)
    assert jobs.cluster.wait_job(calm) == "COMPLETED", jobs.log(calm)
    number = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("hit", **settings), options=TWO)
    jobs.wait_steps("hit", int(number), 15)
    lost = jobs.cluster.run("scontrol", "show", "hostnames", jobs.cluster.job(number)["NodeList"]).split()[-1]
    jobs.cluster.kill(lost)
    try:
        assert jobs.cluster.wait_job(number, 180) == "COMPLETED", jobs.log(number)
        assert jobs.cluster.job(number)["Restarts"] == "1"
        assert lost not in jobs.cluster.run("scontrol", "show", "hostnames", jobs.cluster.job(number)["NodeList"])
    finally:
        jobs.cluster.boot(int(lost.removeprefix("node")))
    assert "resumed at step 10" in jobs.log(number)
    same_result(jobs, tmp_path, "calm", "hit")


def test_preflight_stops_a_job_on_bad_nodes_and_names_them(jobs: Jobs):
    number = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("bad"), options=TWO, PREFLIGHT="1")
    assert jobs.cluster.wait_job(number) == "FAILED", jobs.log(number)  # the gpus are null devices
    assert jobs.cluster.job(number)["ExitCode"] == "65:0", jobs.log(number)
    last = jobs.log(number).splitlines()[-1]
    assert re.fullmatch(r"error: preflight: bad nodes; submit again with --exclude=node\d,node\d", last)
    assert not (jobs.run_dir("bad") / "config.yaml").exists(), "no training was started"
    record = jobs.record("bad")
    assert record["status"] == "failed" and record["reason"].endswith(last.removeprefix("error: "))
    assert bad_nodes(jobs.run_dir("bad")) == last.rpartition("=")[2].split(",")


@pytest.mark.slow
def test_preflight_lets_good_nodes_train(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "local.sh"
    script.write_text((ROOT / "jobs" / "paip_64k.sh").read_text().replace("SITE=generic-cuda", "SITE=local"))
    number = jobs.sbatch(script, *jobs.settings("fit", train__max_steps=3), options=TWO, PREFLIGHT="1")
    state, log = jobs.cluster.wait_job(number, 180), jobs.log(number)
    # On a busy machine a node may be too slow even for `local`; what must hold is that the verdict is obeyed.
    bad = "preflight: bad nodes" in log
    assert state == ("FAILED" if bad else "COMPLETED"), log
    assert bad or jobs.record("fit")["status"] == "ok"


@pytest.mark.slow
def test_where_requeue_is_forbidden_a_chain_goes_on(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "chain.sh"
    script.write_text(render(JOBS["paip_64k"], changed_site(load_site("generic-cuda"), requeue=False)))
    number = jobs.sbatch(script, *jobs.settings("chain"), options=TWO)
    jobs.wait_steps("chain", int(number), 5)
    # scancel complains that the tasks behind the first do not run yet
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", f"{number}_1", check=False)
    jobs.wait_steps("chain", int(number), 40)
    end_s = time.monotonic() + 60
    while jobs.cluster.run("squeue", "-h", "-j", number, check=False).strip() and time.monotonic() < end_s:
        time.sleep(0.5)
    assert not jobs.cluster.run("squeue", "-h", "-j", number, check=False).strip(), "the rest of the chain is gone"
    record = jobs.record("chain")
    assert (record["status"], record["starts"], record["steps"]) == ("ok", 2, 40)


@pytest.mark.slow
def test_a_chain_goes_on_after_a_lost_node(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "chain.sh"
    script.write_text(render(JOBS["paip_64k"], changed_site(load_site("generic-cuda"), requeue=False)))
    number = jobs.sbatch(script, *jobs.settings("chain", checkpoint__every_steps=10), options=TWO)
    jobs.wait_steps("chain", int(number), 15)
    lost = jobs.cluster.run("squeue", "-h", "-j", f"{number}_1", "-o", "%N").strip()
    lost = jobs.cluster.run("scontrol", "show", "hostnames", lost).split()[-1]
    jobs.cluster.kill(lost)
    try:
        jobs.wait_steps("chain", int(number), 40)
        wait_for(lambda: not jobs.cluster.run("squeue", "-h", "-j", number, check=False).strip(), 60, "the chain's end")
    finally:
        jobs.cluster.boot(int(lost.removeprefix("node")))
    record = jobs.record("chain")
    assert (record["status"], record["starts"], record["steps"]) == ("ok", 2, 40)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert "failed: job" in logs and "lost a node" in logs


@pytest.mark.slow
def test_the_file_stop_ends_a_job_for_good(jobs: Jobs):
    number = jobs.sbatch("jobs/paip_64k.sh", *jobs.settings("still", train__max_steps=100_000), options=ONE)
    jobs.wait_steps("still", int(number), 3)
    (jobs.run_dir("still") / "STOP").touch()
    assert jobs.cluster.wait_job(number) == "FAILED"
    assert jobs.cluster.job(number)["ExitCode"] == "75:0" and jobs.cluster.job(number)["Restarts"] == "0"
    assert "the file STOP asked for the end" in jobs.log(number)
    assert jobs.record("still")["reason"].startswith("file STOP: checkpointed at step")


@pytest.mark.slow
def test_a_time_limit_that_came_too_soon_is_told(jobs: Jobs):
    """The signal before the limit replaced by one that does nothing: SLURM's own TERM is what the ranks hear."""
    number = jobs.sbatch(
        "jobs/paip_64k.sh",
        *jobs.settings("late", train__max_steps=100_000),
        options=(*TWO, "--time=1", "--signal=B:CONT@1"),
    )
    assert jobs.cluster.wait_job(number, 240) == "TIMEOUT", jobs.log(number)
    end_s = time.monotonic() + 30
    while "time limit;" not in jobs.log(number) and time.monotonic() < end_s:
        time.sleep(0.2)
    reason = jobs.record("late")["reason"]
    assert reason.startswith(f"job {number} reached its time limit; SIGTERM: checkpointed at step"), jobs.log(number)


@pytest.mark.slow
def test_the_signal_before_the_limit_carries_a_run_over_several_lives(jobs: Jobs):
    settings = jobs.settings("lives", train__max_seconds=25, train__max_steps=100_000, train__log_every=10)
    number = jobs.sbatch("jobs/paip_64k.sh", *settings, options=(*TWO, "--time=1", "--signal=B:USR1@40"))
    assert jobs.cluster.wait_job(number, 400) == "COMPLETED", jobs.log(number)
    record = jobs.record("lives")
    assert record["status"] == "ok" and record["starts"] == int(jobs.cluster.job(number)["Restarts"]) + 1 >= 2
    assert record["train_seconds"] >= 25


@pytest.mark.slow
def test_a_job_is_not_requeued_for_ever(jobs: Jobs):
    number = jobs.sbatch(
        "jobs/paip_64k.sh", *jobs.settings("short", train__max_steps=100_000), options=TWO, MAX_RESTARTS="0"
    )
    jobs.wait_steps("short", int(number), 3)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", number)
    assert jobs.cluster.wait_job(number) == "FAILED"
    assert jobs.cluster.job(number)["ExitCode"] == "75:0" and "life 1 of at most 1" in jobs.log(number)
    assert jobs.record("short")["status"] == "preempted"
