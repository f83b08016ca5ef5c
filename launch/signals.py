"""USR1, TERM and INT become a flag that the trainer reads between two steps; nothing is done inside the handler.

Must not import torch.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

CAUGHT = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_PATIENCE_S = 5.0


def signal_name(number: int) -> str:
    """SIGTERM for 15 and so on; "" for 0."""
    return signal.Signals(number).name if number else ""


class StopFlag:
    """Remembers the number of the first signal that asked this process to stop; 0 before.

    A launcher and the terminal may both deliver Ctrl-C, so a second one only counts after five seconds: then it
    interrupts at once, for people who do not want to wait for the step to end.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since_s = 0.0

    def install(self) -> None:
        """Take the three signals over; call it in the main thread."""
        for number in CAUGHT:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.number:
            self.number, self._since_s = number, now_s
        elif number == signal.SIGINT and now_s - self._since_s > _PATIENCE_S:
            raise KeyboardInterrupt
