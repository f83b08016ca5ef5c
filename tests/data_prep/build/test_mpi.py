"""`build` under MPI ranks: the same files as alone, slides shared, faults told once, wrong launchers refused."""

import os
import signal
import time
from pathlib import Path

import pytest

from data_prep.build.log import read_log
from data_prep.parallel.mpi import LaunchError, check_world, lonely, wants_mpi
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import TREE, leftovers, run, some_slides, token_bytes
from tests.helpers.mpi import needs_mpi, pids_of_ranks, run_on_ranks, start_on_ranks


@needs_mpi
@pytest.mark.mpi
def test_same_files_for_any_number_of_ranks(tmp_path: Path):
    images, masks = some_slides(tmp_path, 5)
    args = ["build", images, "--masks", masks, *TREE]
    assert run(*args, "--out", tmp_path / "alone").returncode == 0
    alone = token_bytes(tmp_path / "alone")
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        done = run_on_ranks(ranks, *args, "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("5 done, 0 skipped, 0 failed") == 1
        assert token_bytes(out) == alone and leftovers(out) == []
        assert sorted(entry["slide"] for entry in read_log(out)) == sorted(path.stem for path in images.iterdir())
        assert all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))
    again = run_on_ranks(3, *args, "--out", tmp_path / "2")
    assert again.returncode == 0 and "0 done, 5 skipped" in again.stdout


@needs_mpi
@pytest.mark.mpi
def test_bad_slides_and_more_ranks_than_slides(tmp_path: Path):
    images, _ = some_slides(tmp_path, 1)
    (images / "bad.svs").write_bytes(b"nothing")
    out = tmp_path / "out"
    done = run_on_ranks(3, "build", images, "--out", out, *TREE)
    assert done.returncode == 1
    assert "1 done, 0 skipped, 1 failed" in done.stdout and done.stderr.count("failed: bad:") == 1
    assert len(token_bytes(out)) == 1 and leftovers(out) == []


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--length", "3"], "--length 3: must be at least 4"),
        (["--jobs", "2"], "--jobs: only in a plain run"),
        (["--frob"], "unrecognized arguments: --frob"),
        (["--out", "/proc/tokens"], "--out /proc/tokens: cannot be written"),
    ],
)
def test_bad_arguments_are_told_once(tmp_path: Path, more: list[str], words: str):
    images, _ = some_slides(tmp_path, 1)
    done = run_on_ranks(2, "build", images, "--out", tmp_path / "out", *TREE, *more)
    assert done.returncode == 64
    assert done.stderr.count("error:") == 1 and words in done.stderr, done.stderr


@needs_mpi
@pytest.mark.mpi
def test_worlds_of_one_are_refused(tmp_path: Path):
    images, _ = some_slides(tmp_path, 1)
    args = ["build", images, "--out", tmp_path / "out", *TREE]
    # What `srun --mpi=none -n 2` gives each of its two tasks.
    done = run(*args, SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_PROCID="0")
    assert done.returncode == 64
    assert "SLURM started 2 tasks but MPI sees 1" in done.stderr and "--mpi=pmi2" in done.stderr
    assert not (tmp_path / "out").exists()
    # The batch script itself is no step: a plain run, whatever the allocation.
    assert run(*args, SLURM_NTASKS="2", SLURM_JOB_ID="1").returncode == 0


def test_a_launcher_without_mpi4py_names_the_extra(tmp_path: Path):
    images, _ = some_slides(tmp_path, 1)
    (tmp_path / "hide" / "mpi4py").mkdir(parents=True)
    (tmp_path / "hide" / "mpi4py" / "__init__.py").write_text("raise ImportError('none here')")
    done = run(
        "build", images, "--out", tmp_path / "out", *TREE, PMI_SIZE="2", PMI_RANK="0", PYTHONPATH=str(tmp_path / "hide")
    )
    assert done.returncode == 64
    assert "install the extra `mpi`, or use --jobs (none here)" in done.stderr


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"SLURM_NTASKS": "8"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "3"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "3"}, False),  # srun -n 1 in a job of 8
    ],
)
def test_who_is_started_by_a_launcher(env: dict[str, str], wanted: bool):
    assert wants_mpi(env) is wanted


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "SLURM gave this job 8 tasks, but this is one process"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "PMI_SIZE": "8"}, None),
        ({"SLURM_NTASKS": "8"}, None),
    ],
)
def test_one_process_in_a_job_of_many_is_told(env: dict[str, str], words: str | None):
    said = lonely(env)
    assert said is None if words is None else said is not None and said.startswith(words)


def test_a_number_of_tasks_that_is_none():
    with pytest.raises(LaunchError, match=r"^SLURM_NTASKS='8\(x2\)' is not a number of tasks$"):
        wants_mpi({"SLURM_NTASKS": "8(x2)", "SLURM_STEP_ID": "0"})


def test_a_job_of_many_tasks_without_srun(tmp_path: Path):
    images, _ = some_slides(tmp_path, 1)
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    done = run("build", images, "--out", tmp_path / "out", *TREE, **env)
    assert done.returncode == 0 and done.stderr.count("start it with srun, or use --jobs") == 1
    assert "SLURM" not in run("build", images, "--out", tmp_path / "out", *TREE, "--jobs", "2", **env).stderr


@pytest.mark.parametrize(
    ("size", "env", "fine"),
    [
        (4, {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
        (4, {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "PMI_SIZE": "4"}, True),
        (1, {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, False),
        (2, {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, False),
        (8, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "PMI_SIZE": "8"}, True),  # mpiexec starts its proxies by srun
        (1, {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "PMI_SIZE": "1"}, False),
        (2, {"PMI_SIZE": "2"}, True),
        (1, {"OMPI_COMM_WORLD_SIZE": "2"}, False),  # mpiexec of one library, mpi4py on another
    ],
)
def test_the_world_must_have_the_size_that_was_started(size: int, env: dict[str, str], fine: bool):
    if fine:
        check_world(size, env)
    else:
        with pytest.raises(LaunchError, match=f"but MPI sees {size}"):
            check_world(size, env)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGINT), (0, signal.SIGINT)]
)
def test_a_rank_that_dies_ends_the_run(tmp_path: Path, rank: int, number: signal.Signals):
    images, _ = some_slides(tmp_path, 24)
    out = tmp_path / "out"
    process = start_on_ranks(2, "build", images, "--out", out, *TREE)
    give_up_s = time.monotonic() + 60
    while not (out.is_dir() and token_bytes(out)) and time.monotonic() < give_up_s:
        time.sleep(0.005)
    os.kill(pids_of_ranks(out)[rank], number)
    _, text = process.communicate(timeout=60)  # must not hang
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert text.count("interrupted: the same command goes on where this one stopped") == 1, text
    assert len(token_bytes(out)) < 24 and all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))
    assert "Traceback" not in text
    assert run("build", images, "--out", out, *TREE).returncode == 0
    assert len(token_bytes(out)) == 24 and leftovers(out) == []


@needs_mpi
@pytest.mark.mpi
def test_ctrl_c_of_all_ranks_is_one_line(tmp_path: Path):
    images, _ = some_slides(tmp_path, 24)
    out = tmp_path / "out"
    process = start_on_ranks(3, "build", images, "--out", out, *TREE)
    give_up_s = time.monotonic() + 60
    while not (out.is_dir() and token_bytes(out)) and time.monotonic() < give_up_s:
        time.sleep(0.005)
    for pid in pids_of_ranks(out).values():
        os.kill(pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in text, (process.returncode, text)
    assert text.count("interrupted: the same command goes on where this one stopped") == 1, text


@needs_mpi
@pytest.mark.mpi
def test_verify_and_inspect_are_done_once(tmp_path: Path):
    images, _ = some_slides(tmp_path, 2)
    out = tmp_path / "out"
    assert run("build", images, "--out", out, *TREE).returncode == 0
    done = run_on_ranks(2, "verify", out)
    assert (done.returncode, done.stdout) == (0, "2 of 2 token files are good\n")
    next(out.glob("*.tokens.h5")).write_bytes(b"half")
    done = run_on_ranks(2, "verify", out)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2
    done = run_on_ranks(
        2, "inspect", next(images.iterdir()), "--length", "64", "--dpi", "40", "--out", tmp_path / "x.png"
    )
    assert done.returncode == 0 and done.stdout.count("leaves used") == 1 and (tmp_path / "x.png").exists()
