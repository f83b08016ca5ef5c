"""The rest of what jobs/body.sh does: no SLURM at all, a study in one allocation, environments put on the nodes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config.sites import Site, load_site
from launch.jobs.render import render
from launch.jobs.table import JOBS
from tests.helpers.cluster import wait_for
from tests.helpers.jobs import Jobs
from tests.helpers.repository import ROOT
from tests.helpers.sites import changed_site
from tests.helpers.small_runs import clean_env, overrides


def bash(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script, *words],
        cwd=ROOT,
        env=clean_env() | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def small(files: Path, run_root: Path, **more: object) -> list[str]:
    settings = {
        "model__decoder": "leaf",
        "train__precision": "fp32",
        "train__schedule": "constant",
        "train__max_steps": 3,
        "eval__pictures_px": 0,
    }
    return overrides(files, run_root, **(settings | more))


def records(root: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(root.rglob("record.json"))]


def test_the_same_script_without_slurm(files: Path, tmp_path: Path):
    done = bash("jobs/paip_512.sh", *small(files, tmp_path))
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path)
    assert (record["experiment"], record["status"], record["gpus"]) == ("paip_512", "ok", 1)


def test_errors_without_slurm_are_one_line(tmp_path: Path):
    done = bash("jobs/paip_512.sh", "data.dir=/nowhere", f"run_root={tmp_path}")
    assert done.returncode == 64 and done.stderr.startswith("error: data.dir=/nowhere: no such folder")
    done = bash("jobs/rivit.sh", PATCHING="uniform")
    assert done.returncode == 64 and done.stderr == "error: rivit has no uniform variant: leave PATCHING out\n"
    for name, value in (
        ("RANKS", "two"),
        ("RANKS", "0"),
        ("MODE", "wild"),
        ("MAX_RESTARTS", "-1"),
        ("ENV_ARCHIVE", "/no.tar"),
    ):
        done = bash("jobs/scaling.sh", **{name: value})
        assert done.returncode == 64 and done.stderr.startswith(f"error: {name}={value}: "), done.stderr
        assert len(done.stderr.splitlines()) == 1
    script = tmp_path / "alone.sh"
    script.write_text((ROOT / "jobs" / "rivit.sh").read_text())
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True, env=clean_env(), check=False)
    assert done.returncode == 64 and "submit from the repository's folder" in done.stderr


def test_a_study_has_sizes_that_divide_its_largest(jobs: Jobs, tmp_path: Path):
    """Nodes of three gpus, and three of them: no size is without its whole nodes, and one node stays idle."""
    number = jobs.sbatch(
        "jobs/scaling.sh",
        options=("-N3", "--ntasks-per-node=3"),
        PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
        RANK_ENV_DIR=str(tmp_path / "run"),
        MIOPEN_USER_DB_PATH=str(tmp_path / "node" / "miopen"),
    )
    assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
    assert (tmp_path / "node" / "miopen").is_dir(), "on each node, which has a disk of its own"
    found = [
        dict(word.split("=", 1) for word in line.split()[1:])
        for line in jobs.log(number).splitlines()
        if " RANK=" in line
    ]
    assert sorted(int(words["SLURM_STEP_NUM_TASKS"]) for words in found) == [1] + [3] * 3 + [6] * 6
    assert all(words["WORLD_SIZE"] == words["SLURM_STEP_NUM_TASKS"] for words in found)
    assert "sizes up to 6 of the 9 ranks" in jobs.log(number)


def test_jobs_that_share_a_node_have_gpus_of_their_own(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "part.sh"
    script.write_text(render(replace(JOBS["paip_512"], gpus=2), load_site("generic-cuda")))
    numbers = [
        jobs.sbatch(
            script,
            options=("--nodelist=node1",),
            PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
            RANK_DOES="sleep 2",
            RANK_ENV_DIR=str(tmp_path / "run"),
        )
        for _ in range(2)
    ]
    assert [jobs.cluster.wait_job(number) for number in numbers] == ["COMPLETED"] * 2
    seen = [re.findall(r" RANK=.* GPUS=(\S*)", jobs.log(number)) for number in numbers]
    assert sorted(seen) == [["0,1", "0,1"], ["2,3", "2,3"]]


def test_scripts_of_real_sites_give_ranks_what_the_site_file_says(jobs: Jobs, tmp_path: Path):
    """Their options of srun, modules and variables on nodes of ours; what only their SLURM knows is left out."""
    wanted = {
        "frontier": {"NCCL_NET": "OFI", "FI_CXI_RDZV_PROTO": "alt_read", "MIOPEN_USER_DB_PATH": "/tmp/root-miopen-JOB"},
        "lumi": {"NCCL_SOCKET_IFNAME": "hsn", "SLURM_CPU_BIND_TYPE": "mask_cpu:"},
        "perlmutter": {"CUDA_VISIBLE_DEVICES": "3,2,1,0", "FI_MR_CACHE_MONITOR": "userfaultfd"},
    }
    environment = {
        "PYTHON": f"{ROOT}/tests/helpers/rank_env.sh",
        "RANK_ENV_DIR": str(tmp_path / "run"),
        "RANK_DOES": '[ "$RANK" != 7 ] || env',
        "BASH_FUNC_module%%": "() { echo module $2; }",
    }
    numbers = {}
    for name in wanted:
        script = tmp_path / f"{name}.sh"
        script.write_text(
            re.sub(r"#SBATCH --(partition|constraint|network|qos)=.*\n", "", render(JOBS["paip_64k"], load_site(name)))
        )
        numbers[name] = jobs.sbatch(script, options=("-N2", "-c7", "-A", "proj"), **environment)
    for name, number in numbers.items():
        assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
        printed = jobs.log(number).splitlines()
        assert [line.split()[1] for line in printed if line.startswith("module ")] == list(load_site(name).modules)
        seen = dict(line.split("=", 1) for line in printed if re.match(r"[A-Z_]+=", line))
        for key, value in wanted[name].items():
            assert seen[key] == value.replace("JOB", number), key
        assert seen["TORCH_FR_BUFFER_SIZE"] == "2000" and seen["OMP_NUM_THREADS"] == "1"
        shutil.rmtree(f"/tmp/root-miopen-{number}", ignore_errors=True)
        assert (seen["WORLD_SIZE"], seen["RANK"]) == (str(2 * load_site(name).hardware.gpus_per_node), "7")


def test_a_lost_node_sends_the_job_to_others(jobs: Jobs, tmp_path: Path):
    """The first life waits to be hit; test_train.py has the same with a training, whose weights do not change."""
    number = jobs.sbatch(
        "jobs/paip_64k.sh",
        options=("-N2", "--ntasks-per-node=1"),
        PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
        RANK_ENV_DIR=str(tmp_path / "run"),
        RANK_DOES='[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || exec sleep 300',
    )
    wait_for(lambda: jobs.log(number).count(" RANK=") == 2, 60, "both ranks")
    lost = jobs.cluster.run("scontrol", "show", "hostnames", jobs.cluster.job(number)["NodeList"]).split()[-1]
    jobs.cluster.kill(lost)
    try:
        assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
    finally:
        jobs.cluster.boot(int(lost.removeprefix("node")))
    assert jobs.cluster.job(number)["Restarts"] == "1"
    second = [line.split()[0] for line in jobs.log(number).splitlines() if " RANK=" in line][2:]
    assert len(second) == 2 and lost not in second


def test_where_requeue_is_forbidden_a_chain_of_jobs_goes_on(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "chain.sh"
    script.write_text(render(JOBS["paip_64k"], changed_site(load_site("generic-cuda"), requeue=False)))
    number = jobs.sbatch(
        script,
        options=("-N1", "--ntasks-per-node=1"),
        PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
        RANK_ENV_DIR=str(tmp_path / "run"),
        RANK_DOES='[ "$SLURM_RESTART_COUNT" = 1 ] || exit 75',
    )
    wait_for(lambda: not jobs.cluster.run("squeue", "-h", "-j", number, check=False).strip(), 60, "the chain's end")
    shown = jobs.cluster.run("scontrol", "--oneliner", "show", "job", number)
    tasks = dict(re.findall(r"ArrayTaskId=(\S+) .*?JobState=(\S+)", shown))
    assert {key: tasks.pop(key) for key in "12"} == {"1": "FAILED", "2": "COMPLETED"}
    assert tasks and set(tasks.values()) == {"CANCELLED"}, "the rest of the chain is gone"
    number = jobs.sbatch(script, "train.stepz=5", options=("-N1", "--ntasks-per-node=1"))
    wait_for(lambda: not jobs.cluster.run("squeue", "-h", "-j", number, check=False).strip(), 60, "the chain's end")
    shown = jobs.cluster.run("scontrol", "--oneliner", "show", "job", number)
    assert re.findall(r"JobState=(\S+)", shown).count("FAILED") == 1, "bad settings are not tried twenty times"


@pytest.mark.slow
def test_several_ranks_and_a_study_without_slurm(files: Path, tmp_path: Path):
    done = bash("jobs/scaling.sh", *small(files, tmp_path), RANKS="2", MODE="weak")
    assert done.returncode == 0, done.stderr
    found = {record["gpus"]: record["global_batch"] for record in records(tmp_path / "scaling-weak")}
    assert found == {1: 1, 2: 2}


def test_smaller_steps_of_a_study_have_all_gpus_of_their_node(jobs: Jobs, tmp_path: Path):
    """Perlmutter's ranks name gpu 3 first, which --gpus-per-task=1 would not give a step of one rank by itself."""
    script = tmp_path / "scaling.sh"
    text = render(replace(JOBS["scaling"], gpus=8), load_site("perlmutter"))
    script.write_text(re.sub(r"#SBATCH --(partition|constraint|network|qos)=.*\n", "", text))
    number = jobs.sbatch(
        script,
        options=("-N2", "-c2", "-A", "proj"),
        PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
        RANK_ENV_DIR=str(tmp_path / "run"),
        RANK_DOES='echo "HAS $SLURM_STEP_NUM_TASKS $SLURM_GPUS_ON_NODE"',
        **{"BASH_FUNC_module%%": "() { :; }"},
    )
    assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
    named = re.findall(r" SLURM_STEP_NUM_TASKS=(\d+) GPUS=(\S+)", jobs.log(number))
    assert set(named) == {(ranks, "3,2,1,0") for ranks in "1248"}
    assert set(re.findall(r"^HAS (\d+) (\d+)$", jobs.log(number), re.MULTILINE)) == {(ranks, "4") for ranks in "1248"}


def test_preflight_stops_a_study_on_bad_nodes(jobs: Jobs):
    words = small(jobs.files, jobs.runs / "bad")
    number = jobs.sbatch("jobs/scaling.sh", *words, options=("-N2", "--ntasks-per-node=2"), PREFLIGHT="1")
    assert jobs.cluster.wait_job(number) == "FAILED", jobs.log(number)  # the gpus are null devices
    assert jobs.cluster.job(number)["ExitCode"] == "65:0", jobs.log(number)
    assert re.fullmatch(r"error: preflight: bad nodes; .*--exclude=node\d,node\d", jobs.log(number).splitlines()[-1])
    (record,) = records(jobs.runs / "bad" / "scaling-strong")
    assert record["status"] == "failed" and "preflight: bad nodes" in str(record["reason"])


@pytest.mark.slow
def test_a_scaling_study_in_one_allocation(jobs: Jobs):
    number = jobs.sbatch("jobs/scaling.sh", *small(jobs.files, jobs.runs), options=("-N2", "--ntasks-per-node=2"))
    assert jobs.cluster.wait_job(number, 240) == "COMPLETED", jobs.log(number)
    found = {(r["gpus"], r["nodes"], r["global_batch"], r["status"]) for r in records(jobs.runs / "scaling-strong")}
    assert found == {(1, 1, 4, "ok"), (2, 1, 4, "ok"), (4, 2, 4, "ok")}


@pytest.mark.slow
def test_the_environment_is_put_on_the_nodes_own_disks(jobs: Jobs, tmp_path: Path):
    """The archive holds a Python that says where it lies; on a node without room the shared one is used."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/bash\n[ "${{RANK:-0}}" != 0 ] || echo "python of $0" >&2\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with tarfile.open(tmp_path / "env.tar", "w") as archive:
        archive.add(tmp_path / "bin", "bin")
    for run_id, disk, where in (("own", "/dev/shm", "python of /dev/shm/env-"), ("shared", "/proc/none", "using ")):
        tree = load_site("generic-cuda").model_dump(mode="json")
        tree["node_local"] = {"path": disk, "sbcast": "-pf", "from_nodes": 2}
        script = tmp_path / f"{run_id}.sh"
        script.write_text(render(JOBS["paip_64k"], Site.model_validate(tree)))
        number = jobs.sbatch(
            script,
            *small(jobs.files, jobs.runs, run_id=run_id),
            options=("-N2", "--ntasks-per-node=1"),
            ENV_ARCHIVE=str(tmp_path / "env.tar"),
        )
        assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
        assert where in jobs.log(number), jobs.log(number)


@pytest.mark.slow
def test_submitted_from_the_folder_of_the_scripts_and_without_an_environment(jobs: Jobs):
    words = small(jobs.files, jobs.runs, run_id="bare")
    number = jobs.cluster.run(
        "sbatch",
        "--parsable",
        f"--chdir={ROOT}/jobs",
        f"--output={jobs.folder}/%j.out",
        "--export=NONE",
        "-N2",
        "--ntasks-per-node=1",
        str(ROOT / "jobs" / "paip_64k.sh"),
        *words,
        SLURM_SUBMIT_DIR=str(ROOT / "jobs"),
    ).strip()
    jobs.track(number)
    # --export=NONE leaves out PREFLIGHT=0 as well, so the nodes are measured, and these have no gpus
    assert jobs.cluster.wait_job(number) == "FAILED"
    assert "preflight: bad nodes" in jobs.log(number) and "no cuda gpu" in jobs.log(number), jobs.log(number)
