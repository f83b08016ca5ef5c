"""`python -m analysis erf FILE...`: receptive fields that `python -m launch erf` measured, drawn."""

import argparse
from pathlib import Path

from analysis.commands.answer import answer
from analysis.figures.receptive_field import MOST_FIELDS, draw, read_fields
from analysis.output.figure_style import save

HELP = "draw effective receptive fields side by side"
_EPILOG = """\
FILE is what `python -m launch erf EXPERIMENT --out DIR` wrote.

example:
  python -m launch erf gmic_image train.init_from=RUN --out out/erf
  python -m launch erf hct_image train.init_from=RUN --out out/erf
  python -m analysis erf out/erf/gmic_image.npz out/erf/hct_image.npz --out out/plots

exit codes: 0 done; 1 a file cannot be used; 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "Draw what `python -m launch erf` measured."
    parser.epilog = _EPILOG
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help=f"npz files, at most {MOST_FIELDS}")
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="folder (default: plots)")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    drawing = draw(read_fields(args.files))
    return answer(f"{drawing.caption}\n", save([drawing], args.out))
