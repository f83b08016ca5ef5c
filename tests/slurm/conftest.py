"""Clusters for the tests: one small, one of 2048 declared nodes. Without root or SLURM's packages the skip says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import Cluster, missing
from tests.helpers.jobs import Jobs
from tests.helpers.small_runs import write_folder


def _cluster(nodes: int, booted: int | None) -> Iterator[Cluster]:
    if lacks := missing():
        pytest.skip(f"no SLURM cluster here: {lacks}")
    with Cluster(nodes, booted, kill_wait_s=20) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes."""
    yield from _cluster(4, None)


@pytest.fixture(scope="session")
def large_cluster() -> Iterator[Cluster]:
    """2048 nodes, of which two run; the others are booted when a job gets them."""
    yield from _cluster(2048, 2)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adaptive token files of ten small slides."""
    return write_folder(tmp_path_factory.mktemp("tokens") / "apf")


@pytest.fixture
def jobs(cluster: Cluster, files: Path, tmp_path: Path) -> Iterator[Jobs]:
    """Submits job scripts to the small cluster; what still runs at the end is cancelled."""
    made = Jobs(cluster, files, tmp_path)
    yield made
    made.end()
