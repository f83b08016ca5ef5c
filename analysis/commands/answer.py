"""How a command of the analysis ends: its text on the terminal, the names of its files beside it."""

import sys
from collections.abc import Iterable
from pathlib import Path

from analysis.runs.records import Runs
from data_prep.system.command_line import DONE, FAILED


def answer(text: str, written: Iterable[Path], runs: Runs | None = None, folder: Path | None = None) -> int:
    """Print the text of a command and the files it wrote; returns the exit code.

    A command that shows runs gives them and their folder: without a finished run it has failed.
    """
    print(text, end="", flush=True)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if runs and runs.ok.empty:
        print(f"error: {folder}: no finished run among {len(runs.problems)} records and run folders", file=sys.stderr)
        return FAILED
    return DONE
