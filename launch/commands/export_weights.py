"""`python -m launch export-weights`: a run's weights as one file."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a run's weights as a plain state dict"
_DESCRIPTION = (
    "Write the weights of a run directory as a plain state dict: names of the bare model, fp32 as trained, whichever "
    "engine and however many ranks saved them. torch.load(FILE, weights_only=True) reads it, train.init_from=FILE "
    "starts from it."
)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write, e.g. w.pt")
    parser.add_argument("--step", default="last", help="last (default), best (score on val), or a number of steps")
    parser.add_argument("--average", action="store_true", help="the running average of the weights (train.ema_decay)")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from launch.predict.export_weights import export_weights

    return export_weights(args.run_dir, args.out, args.step, args.average)
