"""`python -m launch show` and `train`: one experiment."""

from __future__ import annotations

import argparse
from functools import partial

from data_prep.system.command_line import Command
from launch.commands import EXAMPLES
from launch.experiments.load import load

_SHOW = "print an experiment's settings as YAML, each with its meaning"
_TRAIN = "train, or resume, an experiment"


def add_experiment(
    parser: argparse.ArgumentParser, more: str = "settings to change, e.g. train.max_seconds=60"
) -> None:
    """Add the arguments of a command that is about one experiment."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a name from `python -m launch experiments`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=more)


def _add(description: str, parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = description, EXAMPLES
    add_experiment(parser)


def _show(args: argparse.Namespace) -> int:
    print(load(args.experiment, args.overrides).to_yaml(comments=True), end="")
    return 0


def _train(args: argparse.Namespace) -> int:
    config = load(args.experiment, args.overrides)
    from launch.train.run import train

    return train(config)


COMMANDS = {
    "show": Command(_SHOW, partial(_add, _SHOW), _show),
    "train": Command(_TRAIN, partial(_add, _TRAIN), _train),
}
