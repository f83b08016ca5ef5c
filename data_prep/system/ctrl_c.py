"""Ctrl-C, so that it is neither swallowed nor answered with a traceback. Imports little: it must be there first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

INTERRUPTED = 130
_AGAIN_S = 0.01
_RANK_0_FIRST_S = 1.0


def launcher_rank() -> int:
    """The rank that a launcher gave this process, 0 in a plain run."""
    rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    if rank is None and "SLURM_STEP_ID" in os.environ:
        rank = os.environ.get("SLURM_PROCID")
    return int(rank) if rank is not None and rank.isdecimal() else 0


def let_rank_0_be_first() -> None:
    """Wait until rank 0 has said that it was interrupted and ended the others; come back if it has not.

    A launcher ends all ranks as soon as one is gone, also a rank that is about to say why.
    """
    if launcher_rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(_RANK_0_FIRST_S)


def leave_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Handler of SIGINT: one line, from one rank of many, and the exit code, without a word to the other ranks."""
    let_rank_0_be_first()
    if launcher_rank() == 0:
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Handler of SIGINT: KeyboardInterrupt."""
    raise KeyboardInterrupt


def again_if_ignored(unraisable: sys.UnraisableHookArgs) -> None:
    """Hook of what Python prints and ignores: a KeyboardInterrupt among it comes again a moment later.

    What the callback of a weak reference, of ctypes or a finalizer raises has no caller to go to, and such a callback
    is often the first Python code after a long call into C: about one Ctrl-C in fifty was lost there.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        Timer(_AGAIN_S, signal.raise_signal, [signal.SIGINT]).start()
        return
    sys.__unraisablehook__(unraisable)


def it_was_answered() -> None:
    """Let the exit code stand although there was a Ctrl-C, which was caught and answered.

    A KeyboardInterrupt that passes through `exec` of a text (as `dataclass` and `namedtuple` have, in a module loaded
    late) leaves a mark in the interpreter, and at its end it kills itself by SIGINT instead of giving the code
    (`exit_sigint` in CPython's main.c). The next `exec` of a text takes the mark away.
    """
    exec("")


@contextmanager
def loading() -> Iterator[None]:
    """Ctrl-C inside the block ends the process at once. For imports, before anything is begun.

    An import that is interrupted leaves a traceback, or swallows the interrupt: Python runs handlers in callbacks of
    its module locks too, where an exception is printed and ignored, and the command would go on.
    """
    if current_thread() is not main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, leave_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
