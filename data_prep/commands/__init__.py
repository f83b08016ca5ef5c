"""Further commands of `python -m data_prep`, one module each with `add_command(commands)`; imported to print help.

A module here must import nothing heavy at its top: the work lies beside this folder and is imported when it runs.
"""

from __future__ import annotations

import importlib
from typing import Any

# In the order of the help.
NAMES: tuple[str, ...] = ("synth", "convert", "doctor", "export", "volume", "pack")


def add_commands(commands: Any) -> None:
    """Let every module of this folder add its parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned. A command's parser sets the default `run`, a function
            of the parsed arguments that returns the exit code.
    """
    for name in NAMES:
        importlib.import_module(f"data_prep.commands.{name}").add_command(commands)
