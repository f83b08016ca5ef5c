"""USR1, TERM, INT or a file STOP become a flag that the trainer reads between two steps; handlers do nothing else.

Must not import torch.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

CAUGHT = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
STOP_FILE = 99  # stands for the file where others have the number of a signal; those end at 64
_PATIENCE_S = 5.0
_LOOK_EVERY_S = 1.0


def signal_name(number: int) -> str:
    """SIGTERM for 15 and so on; "" for 0."""
    if number == STOP_FILE:
        return "file STOP"
    return signal.Signals(number).name if number else ""


class StopFlag:
    """Remembers the number of the first signal that asked this process to stop; 0 before.

    A launcher and the terminal may both deliver Ctrl-C, so a second one only counts after five seconds: then it
    interrupts at once, for people who do not want to wait for the step to end.

    Args:
        file: `touch` of this file asks too; None looks for none. One rank looks, and removes it, so that the next start
            goes on.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.number = 0
        self._file = file
        self._looked_s = 0.0
        self._since_s = 0.0

    def install(self) -> None:
        """Take the three signals over; call it in the main thread."""
        for number in CAUGHT:
            signal.signal(number, self._note)

    def look(self) -> int:
        """The number, after a look for the file (at most once a second: file systems may be far away)."""
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
