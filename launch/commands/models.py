"""`python -m launch models`: what every model costs, from shapes alone."""

from __future__ import annotations

import argparse
import json

from data_prep.system.command_line import positive
from launch.config.config import Config, apply_overrides
from launch.config.model import MODELS
from launch.experiments.load import load
from launch.plan.inventory import NOTES, inventory, reference, table

HELP = "list every model: task, input, parameters, MACs, FLOPs, activation memory"


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = " ".join(f"{HELP}. {NOTES}".split())
    parser.add_argument("--name", action="append", metavar="M", help="only this model (repeat it for more)")
    parser.add_argument(
        "--experiment", action="append", metavar="E", help="the model of an experiment on its own data (repeatable)"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="inputs per forward pass (default 1)")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings of all of them, e.g. data.image_hw=[1664,1280]"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON.

    Raises:
        ConfigError: An unknown name.
    """
    configs: dict[str, Config] = {}
    for name in args.name or ([] if args.experiment else sorted(MODELS)):
        configs[name] = apply_overrides(reference(name, args.batch or 1), args.overrides)
    for name in args.experiment or []:
        configs[name] = load(name, [f"train.batch={args.batch or 1}", "train.accumulate=1", *args.overrides])
    rows = inventory(configs)
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0
