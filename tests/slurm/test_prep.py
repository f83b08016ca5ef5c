"""Data preparation over MPI ranks of a real SLURM step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster import wait_for
from tests.helpers.jobs import Jobs
from tests.helpers.repository import GLOMERULI, ROOT
from tests.helpers.small_runs import clean_env


def test_prep_on_two_nodes_equals_the_serial_result(jobs: Jobs, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for path in sorted((GLOMERULI / "images").glob("*.jpg"))[:3]:
        (slides / path.name).symlink_to(path)
    settings = ["data.resolution=512", "data.patch=16", "data.length=64"]
    words = ["--slides", str(slides), "--masks", str(GLOMERULI / "masks"), *settings]
    number = jobs.sbatch(
        "jobs/prep_paip.sh",
        *words,
        f"data.dir={tmp_path}/two",
        options=("-N2", "--ntasks-per-node=2"),
        MPIR_CVAR_DEBUG_SUMMARY="1",
    )
    alone = subprocess.run(
        [sys.executable, "-m", "launch", "prep", "paip_64k", *words, f"data.dir={tmp_path}/one"],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
    assert "provider: " in jobs.log(number)  # libfabric: UCX's address can be too long for pmi2 (generic-cuda.yaml)
    one, two = ({p.name: p.read_bytes() for p in sorted((tmp_path / d).glob("*.tokens.h5"))} for d in ("one", "two"))
    assert len(one) == 3 and one == two


@pytest.mark.slow
def test_a_preparation_out_of_time_goes_on_in_another_life(jobs: Jobs, tmp_path: Path):
    number = jobs.sbatch(
        "jobs/prep_paip.sh",
        options=("-N2", "--ntasks-per-node=1"),
        PYTHON=f"{ROOT}/tests/helpers/rank_env.sh",
        RANK_DOES='[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || exec sleep 300',
    )
    wait_for(lambda: jobs.log(number).count("prep on") == 2, 60, "both ranks")
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", number)
    assert jobs.cluster.wait_job(number) == "COMPLETED", jobs.log(number)
    assert jobs.cluster.job(number)["Restarts"] == "1"
    assert "out of time; requeued as life 2" in jobs.log(number) and jobs.log(number).count("prep on") == 4


def test_the_wrong_mpi_launcher_is_refused_not_run_twice(jobs: Jobs, tmp_path: Path):
    script = tmp_path / "prep.sh"
    script.write_text((ROOT / "jobs" / "prep_paip.sh").read_text().replace("SITE_MPI=pmi2", "SITE_MPI=none"))
    number = jobs.sbatch(
        script,
        "--slides",
        str(GLOMERULI / "images"),
        f"data.dir={tmp_path}/never",
        "data.resolution=1024",
        "data.patch=16",
        "data.length=256",
        options=("-N2", "--ntasks-per-node=1"),
    )
    assert jobs.cluster.wait_job(number) == "FAILED", jobs.log(number)
    assert "SLURM started 2 tasks but MPI sees 1" in jobs.log(number)
    assert not list(tmp_path.glob("never/*.tokens.h5"))
