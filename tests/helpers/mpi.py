"""Runs `python -m data_prep` on the ranks of one `mpiexec`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.builds import command, plain_env
from tests.helpers.repository import ROOT

_BESIDE = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(_BESIDE) if _BESIDE.exists() else "mpiexec"
needs_mpi = pytest.mark.skipif(shutil.which(MPIEXEC) is None, reason="no mpiexec")


def start_on_ranks(ranks: int, *args: object, **env: str) -> subprocess.Popen[str]:
    """The command line on so many ranks, still running, in a session of its own."""
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **env}
    return subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), *command(*args)],
        cwd=ROOT,
        env=plain_env(**more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_on_ranks(ranks: int, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line on so many ranks, and how it ended."""
    process = start_on_ranks(ranks, *args, **env)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def pids_of_ranks(out: Path) -> dict[int, int]:
    """Rank -> process id of those that work into `out`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        rank = variables.get(b"PMI_RANK") or variables.get(b"OMPI_COMM_WORLD_RANK")
        if str(out).encode() in words and b"-m" == words[1][:2] and rank is not None:
            found[int(rank)] = int(folder.name)
    return found
