"""One command for many items: as an array on the real SLURM, and as processes of this machine."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from launch.config.config import ConfigError
from launch.jobs.for_each import executor, fill, map_items
from tests.helpers.cluster import Cluster, wait_for
from tests.helpers.command_line import error, launch
from tests.helpers.repository import ROOT

TASK = "bash -c 'echo $0 on $(hostname); [ $0 != bad ]' {}"


def test_the_item_goes_into_the_command():
    assert fill("look {} --out 'o u t/{stem}.png'", "a/b c.svs") == ["look", "a/b c.svs", "--out", "o u t/b c.png"]
    with pytest.raises(ConfigError, match="where does the item go"):
        fill("ls", "a")
    with pytest.raises(ConfigError, match="No closing quotation"):
        fill("ls '{}", "a")


def test_items_in_processes_here(tmp_path: Path):
    done = launch("each", TASK, "a", "bad", "c", "--jobs", "2", "--folder", tmp_path / "each")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 of 3 done")
    assert "error: bad: exit 1: bad on" in done.stderr
    assert "--jobs" in error(launch("each", TASK, "a", "--jobs", "0"))


def test_items_on_slurm_nodes(cluster: Cluster, tmp_path: Path):
    done = launch("each", TASK, "a", "bad", "c", "--jobs", "3", "--folder", tmp_path / "each", **cluster.env)
    assert done.returncode == 1 and "2 of 3 done" in done.stdout, done.stdout + done.stderr
    assert "error: bad: exit 1: bad on node" in done.stderr, "it ran on a node of the cluster"


@pytest.mark.slow
def test_a_cancelled_job_is_told_and_not_waited_for(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    made = executor(tmp_path, 2, 5, 1, None, None)
    threading.Thread(target=lambda: _cancel_when_running(cluster)).start()
    outcomes = map_items(made, "sleep {}", ["300", "301"], 2)
    assert [(outcome.item, outcome.code) for outcome in outcomes] == [("300", None), ("301", None)]


def _cancel_when_running(cluster: Cluster) -> None:
    wait_for(lambda: len(cluster.run("squeue", "-h", "-n", "each", "-t", "R", "-o", "%i").split()) == 2, 60, "running")
    cluster.run("scancel", "--name=each")
