"""Full sizes on 2048 declared nodes: every script is accepted, larger ones are not, 2048 tasks find each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.engines.ranks import find_ranks
from launch.jobs.table import JOBS
from tests.helpers.cluster import Cluster
from tests.helpers.jobs import Jobs
from tests.helpers.repository import ROOT

STAND_IN = {"PYTHON": f"{ROOT}/tests/helpers/rank_env.sh", "PREFLIGHT": "0"}


@pytest.mark.parametrize("name", JOBS)
def test_slurm_accepts_the_script_at_its_full_size(name: str, large_cluster: Cluster):
    large_cluster.run("bash", "-c", f"cd {ROOT} && sbatch --test-only jobs/{name}.sh 2>&1 | grep -q 'to start at'")


@pytest.mark.parametrize(
    "too_much", [("--nodes=2049",), ("--gpus-per-node=9",), ("--cpus-per-task=9",), ("--mem=2000000",)], ids=" ".join
)
def test_slurm_refuses_more_than_the_cluster_has(too_much: tuple[str], large_cluster: Cluster):
    said = large_cluster.run(
        "bash", "-c", f"cd {ROOT} && sbatch --test-only {too_much[0]} jobs/paip_64k.sh 2>&1; echo exit $?"
    )
    assert "allocation failure" in said and said.split()[-2:] == ["exit", "1"], said


def check_ranks(printed: str, nodes: int) -> None:
    """Every task told its place, and together they are one world of 8 tasks a node."""
    lines = [line.split() for line in printed.splitlines() if " RANK=" in line]
    assert len(lines) == 8 * nodes and len({words[0] for words in lines}) == nodes
    ranks = [find_ranks(dict(word.split("=", 1) for word in words[1:])) for words in lines]
    assert sorted(place.rank for place in ranks) == list(range(8 * nodes))
    hosts: dict[int, str] = {}
    for words, place in zip(lines, ranks, strict=True):
        assert (place.world, place.local_world, place.nodes, place.launcher) == (8 * nodes, 8, nodes, "srun")
        assert place.local == place.rank % 8 and hosts.setdefault(place.rank // 8, words[0]) == words[0]
        assert "GPUS=0,1,2,3,4,5,6,7" in words
    assert len(set(hosts.values())) == nodes
    masters = {tuple(word for word in words if word.startswith("MASTER")) for words in lines}
    assert len(masters) == 1 and masters.pop()[0] == f"MASTER_ADDR={hosts[0]}"


def test_tasks_on_nodes_booted_on_demand_find_each_other(large_cluster: Cluster, tmp_path: Path):
    """In an allocation by hand: a batch job's start after a boot waits for slurmctld's look every 30 s."""
    printed = large_cluster.run(
        "salloc",
        "-N5",
        "--ntasks-per-node=8",
        "--cpus-per-task=8",
        "--gpus-per-node=8",
        f"--chdir={ROOT}",
        "bash",
        "jobs/paip_64k.sh",
        **STAND_IN,
        RANK_ENV_DIR=str(tmp_path / "run"),
    )
    check_ranks(printed, 5)


@pytest.mark.slow
def test_2048_tasks_on_256_nodes_find_each_other(large_cluster: Cluster, tmp_path: Path):
    """The whole script as committed, at its full size; what stands for Python says what each task was given."""
    jobs = Jobs(large_cluster, tmp_path, tmp_path)
    number = jobs.sbatch("jobs/paip_64k.sh", **STAND_IN, RANK_ENV_DIR=str(tmp_path / "run"))
    assert large_cluster.wait_job(number, 240) == "COMPLETED", jobs.log(number)[-2000:]
    check_ranks(jobs.log(number), 256)
