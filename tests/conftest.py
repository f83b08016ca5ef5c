"""Shared fixtures: where the repository is, and one small run of the demo that several tests look at."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers.repository import ROOT, shell

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("suite", deadline=None)  # a busy machine is not a failing test
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: files stay whole, as their tests share what is slow to make or build on each other; so does SLURM's.

    Two clusters on one machine would share its network, and with it the ports that jobs of one number choose.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "tests/slurm" if path.startswith("tests/slurm/") else path

    return Files(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`jobs/demo.sh` with a few seconds of training: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = shell("bash jobs/demo.sh", DEMO_DIR=str(folder), DEMO_SECONDS="3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder, done.stdout
