"""`python -m analysis gains`: how much better rows are than others, over several data sets."""

import argparse
import sys
from pathlib import Path

from analysis.commands.answer import answer
from analysis.comparison.gains import NoPairError, find_pairs, gains, gains_table
from analysis.output.formats import latex, markdown, write_files
from analysis.runs.groups import group_runs
from analysis.runs.records import RunsError, load

HELP = "relative gain of Dice over several data sets, with interval"
_EPILOG = """\
In a pattern * stands for the data set: --a 'open_*_apf' --b 'open_*_unet' compares open_nuclei_apf with
open_nuclei_unet, and so on for every set that has both. Seeds count as one row: their mean per slide. The interval is
a percentile bootstrap over test slides, the same for both rows, and over the seeds of each row. From one seed it
cannot say how others would do.

examples:
  python -m analysis gains runs/open/runs                # the rows of `make experiments`
  python -m analysis gains runs --a 'demo_*apf' --b 'demo_*uniform_tokens' --out out

exit codes: 0 done, also where the default left out a pair of rows or one of its sets (it says which); 1 none could be
compared, or with --b that one of the sets could not; 64 wrong arguments; 66 there is no set with both.
"""
_BETTER = "open_*_apf"
# Rivals, then ablations.
_THAN = (
    "uniform_tokens uniform_patch unetr unet swin_unetr transunet uniform_leaf_unet apf_whole apf_alone apf_blind "
    "apf_variance apf_entropy apf_fixed apf_jittered apf_cubic apf_half apf_double apf_deep apf_unturned apf_shallow "
    "apf_leaf apf_token apf_token_still apf_geometric apf_raster"
).split()
_ALSO = (
    # Standardised filters: against the rivals, then what they do to each.
    ("open_*_apf_std", "open_*_unet_std"),
    ("open_*_apf_std", "open_*_unet"),
    ("open_*_apf_std", "open_*_transunet"),
    ("open_*_apf_std", "open_*_uniform_leaf_unet_std"),
    ("open_*_apf_std", "open_*_apf"),
    ("open_*_unet_std", "open_*_unet"),
    # Which leaves make a token; how the tree is cut to L leaves.
    ("open_*_apf_still", "open_*_apf_strip"),
    ("open_*_apf_token_still", "open_*_apf_token_strip"),
    ("open_*_apf_unturned", "open_*_apf_drop"),
    # Position codes under a linear head.
    ("open_*_apf_token_placed", "open_*_apf_token_still"),
    ("open_*_apf_token_placed", "open_*_apf_token_blind"),
)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "How much better A is than B on every data set, and over all of them."
    parser.epilog = _EPILOG
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of runs")
    parser.add_argument("--a", default=_BETTER, metavar="PATTERN", help=f"default {_BETTER}")
    parser.add_argument(
        "--b",
        action="append",
        metavar="PATTERN",
        help="what A is held against, again for more; default: every open_*_ROW of `make experiments` that has runs",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write gains.md and gains.tex there")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    runs = load(args.runs)
    for problem in runs.problems:
        print(f"left out: {problem.path}: {problem.kind}: {problem.reason}", file=sys.stderr)
    groups = group_runs(runs.ok)
    tables, refused = [], []
    pairs = [(args.a, b) for b in args.b or [f"open_*_{row}" for row in _THAN]]
    if not args.b and args.a == _BETTER:
        pairs.extend(_ALSO)
    for a, b in pairs:
        sets: list[RunsError] = []
        try:
            found = find_pairs(groups, a, b, None if args.b else sets)
        except NoPairError:
            if args.b:
                raise
            continue
        if found:
            tables.append(gains_table(a, b, gains(found)))
        for error in sets:
            print(f"left out: {a} over {b}: {error}", file=sys.stderr)
        refused.extend(sets)
    if not tables:
        if refused:
            raise RunsError(f"{args.runs}: nothing is left to compare", 1)
        raise NoPairError(f"{args.runs}: no data set has runs of {args.a} and of a row to hold it against")
    text = "\n".join(map(markdown, tables))
    files = {"gains.md": text, "gains.tex": "\n".join(map(latex, tables))}
    return answer(text, write_files(args.out, files) if args.out else [])
