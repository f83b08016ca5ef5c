"""The committed job scripts: as rendered, clean shell, right numbers; these tests need neither root nor SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config.config import ConfigError
from launch.config.sites import load_site, names
from launch.experiments.load import all_experiments
from launch.jobs.render import DEFAULT_SITE, FOLDER, differences, directives, render, shape, write_all
from launch.jobs.table import JOBS
from tests.helpers.repository import ROOT
from tests.helpers.sites import changed_site
from tests.helpers.small_runs import clean_env

# The paper's Table II.
TABLE_II = {"512": 1, "1k": 8, "4k": 128, "8k": 256, "16k": 512, "32k": 1024, "64k": 2048}
SITES = [name for name in names() if load_site(name).slurm is not None]


def launch(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_env() | env,
        check=False,
    )


def test_committed_scripts_are_what_render_writes():
    done = launch("render", "--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_or_missing_script_is_named(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "btcv.sh").unlink()
    script = tmp_path / "paip_64k.sh"
    script.write_text(script.read_text().replace("--nodes=256", "--nodes=255"))
    done = launch("render", "--check", "--out", str(tmp_path))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "btcv.sh: missing" in done.stderr and "--nodes=255" in done.stderr
    write_all(load_site(DEFAULT_SITE), tmp_path)
    assert differences(load_site(DEFAULT_SITE), tmp_path) == []
    assert all(os.access(tmp_path / f"{name}.sh", os.X_OK) for name in JOBS)


@pytest.mark.parametrize("label", TABLE_II)
def test_gpu_counts_are_those_of_the_paper(label: str):
    text = (FOLDER / f"paip_{label}.sh").read_text()
    nodes, tasks, gpus = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, flags=re.M)[1])  # type: ignore[index]
        for name in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert nodes * tasks == TABLE_II[label] and gpus == tasks
    assert ("#SBATCH --exclusive" in text) == (tasks == 8)


def test_scripts_of_every_site_are_clean_shell(tmp_path: Path):
    scripts = sorted(FOLDER.glob("*.sh"))
    assert {*JOBS, "body", "demo", "demo_slurm"} <= {path.stem for path in scripts}
    scripts += [ROOT / ".ci" / "run", ROOT / ".ci" / "venv", ROOT / "tests" / "helpers" / "rank_env.sh"]
    for site in map(load_site, SITES):
        # a part of a node, many nodes, MPI: the others differ in names only
        for name in ("paip_512", "paip_64k", "prep_paip") if site.name != DEFAULT_SITE else ():
            scripts.append(tmp_path / f"{site.name}-{name}.sh")
            scripts[-1].write_text(render(JOBS[name], site))
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck") is None:
        pytest.skip("needs: apt-get install shellcheck")
    body = FOLDER / "body.sh"
    scripts.remove(body)  # among them, it would be followed from each of them and checked as often
    for files in ([body], scripts):
        done = subprocess.run(["shellcheck", "--exclude=SC1091", *files], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_part_of_a_node_has_all_its_gpus_where_nodes_are_not_shared():
    """Perlmutter's tasks name the four gpus of a node: with one of them, CUDA would see none."""
    for name, gpus, alone in (("perlmutter", 4, True), ("frontier", 8, True), ("generic-cuda", 1, False)):
        site = load_site(name)
        lines = directives(JOBS["paip_512"], site, site.slurm)  # type: ignore[arg-type]
        assert "--ntasks-per-node=1" in lines and f"--gpus-per-node={gpus}" in lines
        assert ("--exclusive" in lines) == alone


def test_the_experiments_of_every_job_exist():
    wanted = {name for job in JOBS.values() for name in (job.experiment, job.uniform) if name}
    assert wanted <= set(all_experiments()), sorted(wanted - set(all_experiments()))


def test_a_site_without_requeue_gets_a_chain(tmp_path: Path):
    site = changed_site(load_site("generic-cuda"), requeue=False)
    lines = directives(JOBS["paip_16k"], site, site.slurm)  # type: ignore[arg-type]
    assert "--array=1-20%1" in lines and "--no-requeue" in lines and "--requeue" not in lines
    assert "SITE_REQUEUE=0" in render(JOBS["paip_16k"], site)
    assert not any("--array" in line for line in directives(JOBS["prep_paip"], site, site.slurm))  # type: ignore[arg-type]


def test_what_does_not_fit_a_site_is_refused():
    perlmutter = load_site("perlmutter")
    with pytest.raises(ConfigError, match=r"10 gpus are not whole nodes of perlmutter .* use 8 or 12"):
        shape(10, perlmutter)
    limits = [{"nodes": 4, "hours": 2}, {"nodes": 16, "hours": 1}]
    small = changed_site(load_site("generic-cuda"), time_limits=limits)
    with pytest.raises(ConfigError, match="2048 gpus are 256 nodes; generic-cuda runs at most 16"):
        render(JOBS["paip_64k"], small)
    assert "#SBATCH --time=01:00:00" in render(JOBS["paip_4k"], small)
    with pytest.raises(ConfigError, match="site local has no scheduler"):
        render(JOBS["paip_4k"], load_site("local"))


def test_unknown_site_is_one_line():
    done = launch("render", "--site", "fronteir", "--out", "unused")
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1
    assert "did you mean frontier" in done.stderr
