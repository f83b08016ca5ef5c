"""Ctrl-C while modules load, and where Python would swallow it."""

import ctypes
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.system.ctrl_c import take_over
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


@pytest.fixture
def taken_over() -> Iterator[None]:
    """The handlers and the hook of a command's process, in this one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    hook = sys.unraisablehook
    take_over(at_once=False)
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("callback", [by_weak_reference, by_ctypes])
def test_an_interrupt_in_a_callback_comes_again(callback: Callable[[], None], taken_over, capsys):
    """What such a callback raises has no caller to go to: Python prints it and goes on."""
    with pytest.raises(KeyboardInterrupt):
        callback()
        time.sleep(5)
    assert capsys.readouterr().err == ""


def test_other_ignored_exceptions_are_printed(taken_over, capsys):
    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()
    assert "ZeroDivisionError" in capsys.readouterr().err


def process(folder: Path, command: str, at_once: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m` of a package in the folder with one command, whose module is the text."""
    room = folder / "toy" / "commands"
    room.mkdir(parents=True)
    for path in (room, room.parent):
        (path / "__init__.py").touch()
    (room / "go.py").write_text(f"HELP = ''\ndef add_command(parser): pass\n{command}")
    (room.parent / "__main__.py").write_text(
        "from data_prep.system.command_line import CommandLine\n"
        f"CommandLine('toy', '', {{'go': 'go'}}, at_once={at_once}).start()\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "toy", "go"],
        cwd=folder,
        env=plain_env(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )


CAUGHT = """import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
print('went on')
"""
RUN = "def run(args):\n    "


@pytest.mark.parametrize(
    ("command", "at_once"),
    [
        (CAUGHT + RUN + "return 0\n", False),  # while modules load, where an import may swallow what is raised
        (RUN + CAUGHT.replace("\n", "\n    ") + "\n", True),
        # A dataclass is made by `exec` of a text, after which an interpreter ends itself by SIGINT.
        (RUN + "exec('import signal; signal.raise_signal(signal.SIGINT)')\n", False),
        (RUN + "import signal; signal.raise_signal(signal.SIGINT)\n", False),
    ],
)
def test_one_line_and_the_exit_code(command: str, at_once: bool, tmp_path: Path):
    done = process(tmp_path, command, at_once)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_says_how_it_goes_on(tmp_path: Path):
    done = process(tmp_path, "GOES_ON = 'again'\n" + RUN + "raise KeyboardInterrupt\n")
    assert (done.returncode, done.stderr) == (130, "interrupted: again\n")
