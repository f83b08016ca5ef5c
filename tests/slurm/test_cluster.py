"""The cluster of the tests itself: what it starts ends with it, and `make demo-slurm` runs on one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster import missing, wait_for
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import clean_env

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no SLURM cluster here: {missing()}")


def processes(text: str) -> list[str]:
    """Command lines of this machine that contain `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_a_killed_cluster_leaves_no_process(tmp_path: Path):
    out = tmp_path / "conf"
    words = [sys.executable, "-m", "tests.helpers.cluster", "2", "bash", "-c", f"echo $SLURM_CONF >{out}; sleep 20"]
    cluster = subprocess.Popen(words, cwd=ROOT, env=clean_env())
    wait_for(lambda: out.exists() and out.read_text().strip() != "", 60, "the cluster")
    folder = Path(out.read_text().strip()).parent
    assert len([line for line in processes(str(folder)) if line.startswith("unshare")]) == 2
    os.kill(cluster.pid, signal.SIGKILL)
    cluster.wait(timeout=20)
    wait_for(lambda: processes(str(folder)) == [], 20, "the end of its nodes")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_demo(tmp_path: Path):
    env = clean_env() | {"DEMO_DIR": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "jobs/demo_slurm.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "tables" / "comparison.md").read_text()
    assert "paip_64k" in table and "24 done, 0 skipped, 0 failed" in done.stdout, done.stdout
    assert "dice 0." in done.stdout and "120 steps" in done.stdout
