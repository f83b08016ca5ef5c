"""`python -m launch experiments`: what there is to train. Must not import torch."""

from __future__ import annotations

import argparse

from launch.experiments.load import EXPERIMENTS, describe

HELP = "list the named experiments"


def add_command(parser: argparse.ArgumentParser) -> None:
    """It has no arguments."""


def run(args: argparse.Namespace) -> int:  # noqa: ARG001
    """Print a line for each; returns the exit code."""
    width = max(map(len, EXPERIMENTS))
    for name in EXPERIMENTS:
        print(f"{name:<{width}}  {describe(name)}")
    return 0
