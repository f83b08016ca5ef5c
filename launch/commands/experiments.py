"""`python -m launch experiments`: what there is to train."""

from __future__ import annotations

import argparse

from launch.experiments.load import describe

HELP = "list the named experiments"


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its argument."""
    parser.add_argument("word", metavar="WORD", nargs="*", help="a group, or part of a name or description")


def run(args: argparse.Namespace) -> int:
    """Print the groups, or a line for each experiment with the word; returns the exit code."""
    print("\n".join(describe(" ".join(args.word))))
    return 0
