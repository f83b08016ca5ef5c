"""Fixtures of the launch tests: folders of token files, and processes that are gone when a test ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch.small import Group, free_port, launch_rank, write_folder


@pytest.fixture(scope="session")
def apf_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adaptive token files."""
    return write_folder(tmp_path_factory.mktemp("tokens") / "apf")


@pytest.fixture(scope="session")
def tile_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform token files of 32 px tiles at full resolution."""
    return write_folder(tmp_path_factory.mktemp("tokens") / "tiles", "uniform", 32)


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    """`start(world, words)` runs `python -m launch train smoke words...`; afterwards all ranks are gone."""
    groups: list[Group] = []

    def run(world: int, words: list[str], **popen: object) -> Group:
        port = str(free_port())
        program = ["-m", "launch", "train", "smoke", *words]
        processes = [launch_rank(rank, world, port, program, **popen) for rank in range(world)]
        groups.append(Group(processes))
        return groups[-1]

    yield run
    for group in groups:
        for process in group.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
