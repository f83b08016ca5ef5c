"""Shows progress: a tqdm bar on a terminal, one plain line per 30 s in a log file.

The caller says which rank it is, since this module knows no MPI.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Self, TextIO


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`, the way tqdm writes them."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def counted(count: int, unit: str) -> str:
    """A number of things in words: "1 file", "2 files"; `unit` is the singular."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


class Progress:
    """Counts finished units and shows them; a context manager.

    On a terminal this is a tqdm bar. Bars fill log files with control characters, so a log gets one line per
    `interval_s` and one at the end. Ranks other than 0 are silent.

    Args:
        total: Units to do, or None when unknown (then there is no ETA).
        label: What is being done, e.g. "build".
        unit: Name of the units in the plural, e.g. "slides"; "s" when the work is measured in seconds.
        initial: Units done before this start (resume); they count in the position, not in the rate.
        stream: Where to print; default is the standard error of the moment.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "steps",
        *,
        rank: int = 0,
        initial: int = 0,
        interval_s: float = 30.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.done = initial
        self._initial = initial
        self._interval_s = interval_s
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = rank != 0
        self._note = ""
        self._bar: Any = None
        self._started_s = self._printed_s = time.monotonic()

    def __enter__(self) -> Self:
        self._started_s = self._printed_s = time.monotonic()
        if not self._quiet and self._stream.isatty():
            from tqdm import tqdm

            in_seconds = "{l_bar}{bar}| {n_fmt}/{total_fmt} s [ETA {remaining}{postfix}]"
            self._bar = tqdm(
                total=self.total,
                desc=self.label,
                unit=" " + self.unit,
                initial=self._initial,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=in_seconds if self.unit == "s" else None,
            )
        return self

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units and show `note` beside them. With n = 0 a long wait can print its line."""
        self.done += n
        if note:
            self._note = note
        if self._quiet:
            return
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
            if n == 0:
                self._bar.refresh()
            return
        now_s = time.monotonic()
        if now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            self._print(self.line())

    def write(self, text: str) -> None:
        """Print one line of text without tearing the bar; only rank 0 prints."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def line(self) -> str:
        """The plain line: label, position, rate, elapsed, ETA, note."""
        elapsed_s = time.monotonic() - self._started_s
        fresh = self.done - self._initial
        rate = fresh / elapsed_s if elapsed_s > 0 else 0.0
        parts = [f"{self.label}: {self.done}"]
        if self.total is not None:
            percent = f" ({100 * self.done // self.total} %)" if self.total else ""
            parts[0] += f"/{self.total} {self.unit}{percent}"
        else:
            parts[0] += f" {self.unit}"
        if self.unit != "s":  # a rate of seconds per second says nothing
            parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 0.1 or not fresh else f"{1 / rate:.3g} s each")
        parts.append(f"{format_duration(elapsed_s)} elapsed")
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"ETA {format_duration((self.total - self.done) / rate)}")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)

    def close(self) -> None:
        """Finish the bar, or print the last line."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        else:
            self._print(self.line())
        self._quiet = True

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def __exit__(self, *error: object) -> None:
        self.close()
