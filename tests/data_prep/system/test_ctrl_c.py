"""Ctrl-C while modules load, and where Python would swallow it."""

import ctypes
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.system.ctrl_c import again_if_ignored, interrupt, loading
from tests.helpers.builds import plain_env
from tests.helpers.repository import ROOT


class Thing:
    pass


def by_weak_reference() -> None:
    thing = Thing()
    _ = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing


def by_ctypes() -> None:
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()


@pytest.mark.parametrize("callback", [by_weak_reference, by_ctypes])
def test_an_interrupt_in_a_callback_comes_again(callback: Callable[[], None], monkeypatch, capsys):
    """What such a callback raises has no caller to go to: Python prints it and goes on."""
    monkeypatch.setattr(sys, "unraisablehook", again_if_ignored)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            callback()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_other_ignored_exceptions_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", again_if_ignored)
    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_while_modules_load_the_process_ends_at_once():
    code = (
        "import signal\nfrom data_prep.system.ctrl_c import loading\n"
        "with loading():\n"
        "    try:\n        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n        pass\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_handler_of_before_is_back():
    before = signal.getsignal(signal.SIGINT)
    with loading():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: loading().__enter__())  # no handlers there, and no fault
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


LATE = """
import runpy
import data_prep.cli

def main():
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return 130

data_prep.commands.parser.main = main
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("raise SystemExit(main())", -signal.SIGINT), ("runpy.run_module('data_prep', run_name='__main__')", 130)],
)
def test_an_interrupt_in_a_module_that_is_loaded_late_keeps_the_exit_code(end: str, code: int, tmp_path: Path):
    """A dataclass is made by `exec` of a text, after which an interpreter ends itself by SIGINT, as the first does."""
    (tmp_path / "late.py").write_text(LATE + end)
    done = subprocess.run(
        [sys.executable, "-m", "late"],
        cwd=tmp_path,
        env=plain_env() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, "")
