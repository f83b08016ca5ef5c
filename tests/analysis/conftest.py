from pathlib import Path

import pytest

from analysis.__main__ import main
from tests.helpers.run_folders import demo_runs, record, write_run


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory) -> Path:
    """Runs like the demo's, and one that failed."""
    root = demo_runs(tmp_path_factory.mktemp("demo"))
    write_run(root, record("demo_apf", seed=7, status="oom", reason="out of <b>memory</b>"))
    return root


@pytest.fixture(scope="session")
def report(runs_dir: Path) -> Path:
    """The page of those runs; nothing else lies in its folder."""
    out = runs_dir.parent / "page"
    assert main(["report", str(runs_dir), "--out", str(out)]) == 0
    return out / "index.html"
