"""`python -m analysis compare A B`: its arguments, and the files it writes."""

import argparse
import json
from pathlib import Path

from analysis.commands.answer import answer
from analysis.comparison.pair import compare_pair, pair_csv, pair_json, pair_table, read_side
from analysis.output.formats import every_form, write_files

HELP = "two runs side by side: refused unless fair, paired over images, at equal quality"
_EPILOG = """\
A and B are run folders, folders with the seeds of one experiment, or the same inside of a study that `collect` wrote.
B / A is how many times less A needs; A - B is paired over the test images. Runs whose hardware, GPUs, precision,
attention backend, data, optimiser, training budget or timing window differ are refused, with every reason.

examples:
  python -m analysis compare runs/demo_apf runs/demo_uniform_patch
  python -m analysis compare analysis/measured/demo_cpu.jsonl/demo_apf runs/mine --json
  python -m analysis compare a b --unfair-ok --out out       compare.md, .csv, .tex and .json; the caption says why

exit codes: 0 done; 1 a record cannot be used, or the comparison is not fair; 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "Compare run A with run B."
    parser.epilog = _EPILOG
    parser.add_argument("a", type=Path, metavar="A", help="run folder, or STUDY.jsonl/RUN")
    parser.add_argument("b", type=Path, metavar="B", help="the same; the denominator")
    parser.add_argument("--unfair-ok", action="store_true", help="compare anyway; the caption says what differs")
    parser.add_argument("--json", action="store_true", help="JSON on the terminal instead of Markdown")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write compare.md, .csv, .tex and .json there")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    pair = compare_pair(read_side(args.a), read_side(args.b), args.unfair_ok)
    data = json.dumps(pair_json(pair), indent=1) + "\n"
    files = {**every_form(pair_table(pair), text=pair_csv(pair)), "compare.json": data}
    return answer(data if args.json else files["compare.md"], write_files(args.out, files) if args.out else [])
