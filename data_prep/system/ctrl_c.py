"""Answers Ctrl-C so that it is neither lost nor a traceback. Imports little, since it must be there first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
_AGAIN_S = 0.01
_RANK_0_FIRST_S = 1.0
_PASS_ON_S = 0.3


def launcher_rank() -> int:
    """The rank that a launcher gave this process, 0 in a plain run."""
    rank = os.environ.get("RANK") if "WORLD_SIZE" in os.environ else None  # torchrun, also inside a SLURM step
    rank = rank or os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    if rank is None and "SLURM_STEP_ID" in os.environ:
        rank = os.environ.get("SLURM_PROCID")
    return int(rank) if rank is not None and rank.isdecimal() else 0


def mpi_abort() -> Callable[[int], None] | None:
    """`Abort` of this process's MPI world; None without a world, or alone in it."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi.COMM_WORLD.Abort if mpi is not None and mpi.COMM_WORLD.size > 1 else None


def take_over(at_once: bool) -> None:
    """Answer Ctrl-C from now on by KeyboardInterrupt, or with `at_once` by `end`."""
    handler = _end_at_once if at_once else _interrupt
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGALRM, handler)
    sys.unraisablehook = _again


def end(text: str = "interrupted") -> NoReturn:
    """Say that this process was interrupted, then end it, and its MPI world, with `INTERRUPTED`.

    It calls `os._exit`: a KeyboardInterrupt that passed through `exec` of a text, as in `dataclass`, leaves a mark that
    makes Python end with SIGINT instead of the exit code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, abort = launcher_rank(), mpi_abort()
    if rank:  # the first rank says it and ends all others, unless it alone was not interrupted
        time.sleep(_RANK_0_FIRST_S)
    if rank == 0 or abort is not None:
        os.write(2, f"{text}\n".encode())
    if abort is not None:
        end_all(abort, INTERRUPTED)
    os._exit(INTERRUPTED)


def end_all(abort: Callable[[int], None], code: int) -> None:
    """End all ranks. A launcher that must abort drops output that it still holds, so give it time first."""
    time.sleep(_PASS_ON_S)
    abort(code)


def _end_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    end()


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Raise KeyboardInterrupt. An import would swallow it or print a traceback, so end at once inside one."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _again(unraisable: sys.UnraisableHookArgs) -> None:
    """Hook for exceptions that Python prints and ignores: raise a KeyboardInterrupt again a moment later.

    A callback of a weak reference, of ctypes or of a finalizer has no caller that could catch it. Such a callback is
    often the first Python code after a long call into C: about one Ctrl-C in fifty was lost there.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
