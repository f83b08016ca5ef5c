"""`python -m launch study`: the comparison on open data."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.config.config import ConfigError
from launch.engines.ranks import EXIT_CONFIG

HELP = "APF against its rivals on open data, for the same training time: token files, runs, tables, page"
_DESCRIPTION = f"{HELP}. After Ctrl-C or a kill the same command goes on where it was."


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments; each has a variable of the environment, for `make experiments`."""
    parser.description = _DESCRIPTION
    for name, variable, default, text in (
        ("data", "DATA", "data_prep/sample_data", "folder of the sets: glomeruli24, monuseg_train, hrf"),
        ("sets", "SETS", "glomeruli nuclei vessels vessels_2k", "sets; vessels_4k only when named, it takes long"),
        ("rows", "ROWS", "", "rows, by default all; launch/experiments/open_data.py says what they are"),
        ("seeds", "SEEDS", "0 1 2", "seeds of every row"),
        ("seconds", "RUN_SECONDS", "150", "training seconds of every run"),
        ("jobs", "JOBS", "1", "runs at once; compare only what ran with the same number"),
        ("out", "OPEN_DIR", "runs/open", "where everything goes"),
    ):
        shown = f"{text} (or ${variable}; default: {default})" if default else f"{text} (or ${variable})"
        parser.add_argument(f"--{name}", metavar=variable, default=os.environ.get(variable) or default, help=shown)


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from launch.experiments.open_data import ROWS
    from launch.jobs import study

    code = EXIT_CONFIG
    try:
        code = study.run(
            study.Study(
                Path(args.data),
                tuple(args.sets.split()),
                tuple(args.rows.split() or ROWS),
                tuple(_number("SEEDS", seed) for seed in args.seeds.split()),
                _number("RUN_SECONDS", args.seconds),
                _number("JOBS", args.jobs),
                Path(args.out),
            )
        )
        return code
    finally:
        if code:
            on = "" if code == EXIT_CONFIG else "; the same command goes on from here"
            print(f"\n[study] stopped (exit code {code}){on}", file=sys.stderr)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text} is no number")
    return int(text)
