"""What keeps a training process in check: signals that stop it, its log, and a watchdog that ends it when it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
STOP_FILE = 99  # the file's number among the signals, which end at 64
_PATIENCE_S = 5.0
_LOOK_EVERY_S = 1.0


def signal_name(number: int) -> str:
    """The name of a signal ("SIGTERM" for 15), or of the stop file; "" for 0."""
    if number == STOP_FILE:
        return "file STOP"
    return signal.Signals(number).name if number else ""


class StopFlag:
    """Remembers the number of the first signal that asked this process to stop; 0 before.

    A launcher and the terminal may both deliver Ctrl-C, so a second one counts only after five seconds. Then it
    interrupts at once.

    Args:
        file: `touch` of this file stops the run too. Only one rank gets it: it looks for the file and removes it, so
            that the next start goes on.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.number = 0
        self._file = file
        self._looked_s = 0.0
        self._since_s = 0.0

    def install(self) -> None:
        """Catch the three signals; call it in the main thread."""
        for number in CAUGHT:
            signal.signal(number, self._note)

    def look(self) -> int:
        """The number, after a look for the file (at most once a second, since file systems may be slow)."""
        now_s = time.monotonic()
        if self._file is not None and not self.number and now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            if self._file.exists():
                self._file.unlink(missing_ok=True)
                self.number = STOP_FILE
        return self.number

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.number:
            self.number, self._since_s = number, now_s
        elif number == signal.SIGINT and now_s - self._since_s > _PATIENCE_S:
            raise KeyboardInterrupt


class Log:
    """Prints lines on stderr and into `rank-0.log` of this start's folder; silent on all ranks but 0."""

    def __init__(self, logs: Path, rank: int) -> None:
        self._file, self._speaks = logs / "rank-0.log", rank == 0

    def say(self, text: str) -> None:
        """Print one line."""
        if self._speaks:
            print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError), self._file.open("a") as log:  # a full disk: go on
                log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class Watchdog:
    """Ends a process that hangs, with the stacks of all its threads on disk.

    Whoever works calls `beat`. A Python thread says where the process hangs and may write a record. No Python thread
    runs while a call in C holds the interpreter, such as a read by HDF5 from a dead file system. Then faulthandler's
    own thread writes the stacks a little later and exits with code 1.

    Args:
        limit_s: Longest time between two beats; None watches nothing.
        logs: Folder for `stacks-rank-N.txt`, and on GPUs for `collectives-rank-N.pickle`, NCCL's flight recorder.
        rank: N.
        on_hang: Called once, in the watching thread, with one line that says where the main thread is.
    """

    def __init__(self, limit_s: float | None, logs: Path, rank: int, on_hang: Callable[[str], None]) -> None:
        self._limit_s, self._logs, self._rank, self._on_hang = limit_s, logs, rank, on_hang
        self._pause_s = min(5.0, (limit_s or 0.0) / 10)  # time between two looks
        # faulthandler takes over later than the Python thread needs.
        self._backstop_s = (limit_s or 0.0) + 8 * self._pause_s + 5
        self._beat_s = self._armed_s = 0.0
        self._ended = threading.Event()
        self._file: Any = None

    def start(self) -> None:
        """Start watching; call it in the main thread."""
        if self._limit_s is None:
            return
        self._main = threading.get_ident()
        self._file = (self._logs / f"stacks-rank-{self._rank}.txt").open("w")
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, *_: object) -> None:
        """Say that the process is alive; takes and ignores the arguments of hooks."""
        self._beat_s = time.monotonic()
        if self._file is not None and self._beat_s - self._armed_s > self._pause_s / 2:  # arming starts a thread
            self._armed_s = self._beat_s
            faulthandler.dump_traceback_later(self._backstop_s, exit=True, file=self._file)

    def stop(self) -> None:
        """Stop watching and remove an empty file of stacks."""
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            empty = self._file.tell() == 0
            self._file.close()
            self._file = None
            if empty:
                Path(self._logs / f"stacks-rank-{self._rank}.txt").unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._ended.wait(self._pause_s):
            idle_s = time.monotonic() - self._beat_s
            if self._limit_s is not None and idle_s > self._limit_s:
                break
        else:
            return
        where, waiting = self._look()
        # All ranks hang together, since they wait for one another. Each needs time to write its stacks.
        # The rank that waits for no other is to blame, so it ends first.
        if self._ended.wait((4 if waiting else 2) * self._pause_s):
            return
        self._on_hang(f"nothing happened for {self._limit_s:g} s; the main thread is in {where}")

    def _look(self) -> tuple[str, bool]:
        """Write the stacks; returns where the main thread is and whether it waits for other ranks."""
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()
        _dump_collectives(self._logs / f"collectives-rank-{self._rank}.pickle")
        frame = sys._current_frames().get(self._main)
        # DDP and FSDP talk to other ranks inside backward, where no frame of torch.distributed shows.
        talks = (f"torch{os.sep}distributed", f"torch{os.sep}autograd", "deepspeed")
        waiting = any(word in file for file, _, _ in _walk(frame) for word in talks)
        root = Path(__file__).resolve().parents[2]
        ours = [at for at in _walk(frame) if Path(at[0]).is_relative_to(root) and "site-packages" not in at[0]]
        file, line, name = (ours or [("unknown code", 0, "?")])[-1]
        return f"{name} ({Path(file).name}:{line}){', perhaps waiting for other ranks' if waiting else ''}", waiting


def _walk(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """(file, line, function) of a stack, outermost first."""
    return [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_stack(frame)] if frame else []


def _dump_collectives(path: Path) -> None:
    """Write NCCL's flight recorder, which knows the unfinished collectives (GPUs, TORCH_FR_BUFFER_SIZE > 0)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        path.write_bytes(dump())
