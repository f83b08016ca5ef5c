"""The pool and Ctrl-C: workers never see it, whenever it comes, and the parent takes them along."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.parallel.pool import run_pool
from tests.helpers.builds import command, plain_env, some_slides, token_bytes
from tests.helpers.pool_tasks import dies_the_first_time, half_a_result, sigint_is_blocked
from tests.helpers.repository import ROOT

TREE = ["--resolution", "1024", "--patch", "16", "--length", "256"]


def test_no_worker_sees_ctrl_c(tmp_path: Path):
    """In a fresh process: its first worker also starts the resource tracker, which unblocks SIGINT."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from data_prep.parallel.pool import run_pool\n"
        "from tests.helpers.pool_tasks import sigint_is_blocked\n"
        "if __name__ == '__main__':\n"
        "    print(list(run_pool(sigint_is_blocked, [1, 2, 3], 3, lambda task, why: why)))\n"
        "    print(sigint_is_blocked(0))\n"
    )
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=plain_env(), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[True, True, True]", "False"], done.stderr


def test_ctrl_c_while_a_worker_starts_waits_for_it(monkeypatch: pytest.MonkeyPatch):
    """Given to another thread, the signal passes by the main thread's mask, and Python would raise anywhere."""
    started, stop = [], threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    spawned = multiprocessing.get_context("spawn").Process
    real = spawned.start

    def start(process: multiprocessing.process.BaseProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(50):  # time for the other thread to take the signal, and for Python to run a handler
            time.sleep(0.01)
        real(process)  # type: ignore[arg-type]
        started.append(process)

    monkeypatch.setattr(spawned, "start", start)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_pool(abs, [1, 2], 2, lambda task, why: 0))
    finally:
        stop.set()
        thread.join()
    assert len(started) == 1 and not started[0].is_alive()
    assert signal.getsignal(signal.SIGINT) is handler and not sigint_is_blocked(0)


def test_closing_the_results_stops_the_workers():
    results = run_pool(abs, range(100), 2, lambda task, why: 0)
    next(results)
    mine = [child for child in multiprocessing.active_children() if child.name.startswith("SpawnProcess")]
    assert len(mine) == 2
    results.close()
    assert not any(child.is_alive() for child in mine)


def test_a_worker_that_dies_in_the_middle_of_its_result_costs_its_task_only():
    assert list(run_pool(half_a_result, [1, 2], 1, lambda task, why: f"{task}: {why}")) == [
        f"{task}: its worker process was killed by SIGKILL (out of memory?), twice" for task in (1, 2)
    ]


def test_what_a_dead_worker_was_at_is_done_again_by_a_new_one(tmp_path: Path):
    tasks = [str(tmp_path / name) for name in "abcd"]
    results = list(run_pool(dies_the_first_time, tasks, 2, lambda task, why: why))
    assert len(results) == 4 and all(isinstance(result, int) for result in results)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_at_any_moment_is_one_line(jobs: str, tmp_path: Path):
    images, _ = some_slides(tmp_path, 24)
    for number, delay_s in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.1)):
        out = tmp_path / f"{jobs}-{number}"
        process = subprocess.Popen(
            command("build", images, "--out", out, *TREE, "--jobs", jobs),
            cwd=ROOT,
            env=plain_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and b"numpy" not in Path(f"/proc/{process.pid}/maps").read_bytes():
            time.sleep(0.002)  # the interpreter itself is started: what comes before is not ours
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        _, text = process.communicate(timeout=60)
        assert process.returncode in (130, 0), text  # 0: it was done before
        assert "Traceback" not in text, text
        if out.exists():
            left = [path.name for path in out.iterdir() if path.name.startswith(".")]
            assert left == [] and len(token_bytes(out)) <= 24
