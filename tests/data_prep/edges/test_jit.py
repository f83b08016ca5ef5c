"""Compiled loops where their code cannot be kept: a full disk, a place that is none."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.builds import plain_env
from tests.helpers.repository import ROOT

RUN = """
import numpy as np
from data_prep.edges.kernels.components import pixels_of
pixel = np.zeros(4, np.uint32)
pixels_of(np.array([3, 1, 0, 255], np.uint8), np.array([[2, 5]], np.uint32), pixel)
print(pixel.tolist())
"""


def ran(cache: Path, room: int | None = None) -> str:
    def small_files() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    env = {**plain_env(), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", RUN], cwd=ROOT, env=env, capture_output=True, text=True, preexec_fn=small_files
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_disk(tmp_path: Path):
    assert ran(tmp_path, 100) == "[3, 4, 1284, 1539]\n"


def test_no_place_and_then_one(tmp_path: Path):
    (tmp_path / "file").touch()
    assert ran(tmp_path / "file") == "[3, 4, 1284, 1539]\n"
    assert ran(tmp_path / "cache") == "[3, 4, 1284, 1539]\n"
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 1
    assert ran(tmp_path / "cache") == "[3, 4, 1284, 1539]\n"
