"""Which rank am I: the variables that each launcher really sets, also one launcher inside another."""

import pytest
import torch

from launch.engines.ranks import RankError, device_name, find_ranks
from launch.records.record import cpu_name

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n",
    "MASTER_PORT": "9",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("env", "launcher", "rank", "world", "local", "local_world", "nodes"),
    [
        ({}, "alone", 0, 1, 0, 1, 1),
        (TORCHRUN, "torchrun", 3, 4, 1, 2, 2),
        (SRUN, "srun", 4, 5, 1, 2, 2),
        (HYDRA, "hydra", 1, 2, 1, 2, 1),
        (OPENMPI, "openmpi", 1, 2, 1, 2, 1),
        (SRUN | TORCHRUN, "torchrun", 3, 4, 1, 2, 2),
        # the job scripts give each task of a step the variables of its rank
        (SRUN | TORCHRUN | {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, "srun", 3, 4, 1, 2, 2),
        # srun --mpi=pmi2 sets both kinds for the same tasks; mpiexec in an allocation runs under one srun task a node
        (SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"}, "srun", 4, 5, 1, 2, 2),
        (SRUN | HYDRA, "hydra", 1, 2, 1, 2, 1),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, "hydra", 0, 1, 0, 1, 1),
    ],
)
def test_launchers(env, launcher, rank, world, local, local_world, nodes):
    r = find_ranks(env)
    assert (r.launcher, r.rank, r.world, r.local, r.local_world, r.nodes) == (
        launcher,
        rank,
        world,
        local,
        local_world,
        nodes,
    )


def test_a_batch_script_without_srun_is_one_process():
    assert find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}).world == 1


def test_meeting_points():
    assert find_ranks(TORCHRUN).init_method == "env://"
    assert find_ranks(SRUN).init_method == f"tcp://n1:{20000 + (77 * 16) % 20000}"
    assert find_ranks(SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "5"}).init_method == "tcp://x:5"
    assert find_ranks(HYDRA).init_method.startswith("file://")
    other = HYDRA | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}
    assert find_ranks(HYDRA).init_method == find_ranks(other).init_method
    wide = HYDRA | {"PMI_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "7"}
    assert find_ranks(wide).init_method == "tcp://n1:7" and find_ranks(wide).nodes == 2


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT"),
        (HYDRA | {"PMI_SIZE": "4"}, "4 ranks on 2 nodes"),
        (SRUN | {"SLURM_STEP_NODELIST": "no-such[1-2]"}, "no-such"),
    ],
)
def test_too_little_to_go_on(env, part, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RankError) as error:
        find_ranks(env)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_name_of_the_device_that_is_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_name(torch.device("cpu")) == cpu_name()


def test_hosts_in_brackets_are_expanded_by_scontrol(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_ranks(SRUN | {"SLURM_STEP_NODELIST": "n[3-4]"}).init_method.startswith("tcp://n3:")
