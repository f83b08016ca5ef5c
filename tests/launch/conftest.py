"""Fixtures of the launch tests: folders of token files, an undisturbed run, processes that are gone when a test ends.

`pytest --repeat 20 tests/launch/train/test_resume.py` runs each test twenty times: what is killed at any moment should
not depend on the moment.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.small_runs import Group, finish_well, free_port, launch_rank, stoppable, write_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--repeat N`."""
    parser.addoption("--repeat", type=int, default=1, metavar="N", help="tests/launch: run each test N times")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test once, or N times."""
    # The default is for `pytest tests`, which finds this file too late for an option.
    times = metafunc.config.getoption("repeat", 1)
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(1, times + 1))


@pytest.fixture(scope="session")
def apf_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adaptive token files."""
    return write_folder(tmp_path_factory.mktemp("tokens") / "apf")


@pytest.fixture(scope="session")
def tile_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uniform token files of 32 px tiles at full resolution."""
    return write_folder(tmp_path_factory.mktemp("tokens") / "tiles", "uniform", 32)


@pytest.fixture(scope="session")
def whole(apf_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    port, program = str(free_port()), ["-m", "launch", "train", "smoke", *stoppable(apf_files, root)]
    finish_well(Group([launch_rank(rank, 2, port, program) for rank in range(2)]))
    return root / "smoke" / "r"


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
