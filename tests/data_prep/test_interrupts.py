"""Ctrl-C while modules load, and where Python would swallow it."""

import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from data_prep.interrupts import interrupt, loading
from tests.data_prep.builds import ROOT, plain_env


class Thing:
    pass


def test_an_interrupt_in_a_callback_comes_again():
    """What a weak reference's callback raises is printed and forgotten."""
    names = {"signal": signal}
    exec(compile("def gone(_): signal.raise_signal(signal.SIGINT)", weakref.__file__, "exec"), names)
    before = signal.signal(signal.SIGINT, interrupt)
    ignored: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, ignored.append
    try:
        thing = Thing()
        reference = weakref.ref(thing, names["gone"])
        with pytest.raises(KeyboardInterrupt):
            del thing
            time.sleep(5)
        assert reference() is None
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
    assert ignored == []


def test_while_modules_load_the_process_ends_at_once():
    code = ("import signal\nfrom data_prep.interrupts import loading\n"
            "with loading():\n"
            "    try:\n        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n        pass\n"
            "print('went on')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_handler_of_before_is_back():
    before = signal.getsignal(signal.SIGINT)
    with loading():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: loading().__enter__())     # no handlers there, and no fault
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
