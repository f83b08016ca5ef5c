"""`python -m analysis lengths`: sequence length against split value and patch, drawn and as tables."""

import argparse
from pathlib import Path

from analysis.commands.answer import answer
from analysis.figures.sweeps import Sweep, by_patch, by_split_value, read_rows, split_values
from analysis.output.figure_style import save
from analysis.output.formats import Column, Table, markdown, number, whole

HELP = "sequence length against split value and patch (Fig. 3), with growth exponents"
_EPILOG = """\
DIR is a folder of token files that `python -m data_prep build --split-value V` wrote. A line shows the slides that all
of its settings have.

example:
  for v in 20 50 100; do
    python -m data_prep build IMAGES --out out/v$v --resolution 512 --patch 4 --split-value $v
  done
  python -m analysis lengths out/v20 out/v50 out/v100 --out out/plots

exit codes: 0 done; 64 no such folder, or no token file with a split value.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = (
        "Plot tokens per image against the split value of token files, one line per resolution and patch,\n"
        "and against the smallest patch where it varies, with growth exponents and their intervals."
    )
    parser.epilog = _EPILOG
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of token files")
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="default: plots")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    rows = read_rows(args.folders)
    tables = [_table("split value", "p (px)", by_split_value(rows))]
    patches = [s for s in by_patch(rows) if s.values.size > 1]
    if patches:
        tables.append(_table("p (px)", "split value", patches))
    return answer("\n".join(markdown(t) for t in tables) + "\n", save([split_values(rows)], args.out))


def _table(varied: str, fixed: str, sweeps: list[Sweep]) -> Table:
    rows = []
    for sweep in sweeps:
        fit = sweep.exponent()
        said = None if fit is None else f"{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"
        for x in sweep.values:
            counts = sweep.lengths[x]
            settings = map(whole, (sweep.resolution, sweep.fixed, int(x), len(counts)))
            ends = map(whole, (int(counts.min()), int(counts.max())))
            rows.append([*settings, number(float(counts.mean()), 1), *ends, said])
    heads = ("R (px)", fixed, varied, "slides", "mean L", "shortest", "longest", "exponent [95 % CI]")
    columns = [Column(head, True) for head in heads]
    return Table(f"Measured: tokens per image by {varied}.", columns, rows, ["run"] * len(rows), (), "lengths")
