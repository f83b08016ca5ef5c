"""`python -m analysis plots`: every figure that there is data for; draws with matplotlib when it runs."""

import argparse
from pathlib import Path

from analysis.commands.answer import answer
from analysis.output.figure_style import Drawing, save
from analysis.runs.records import load

HELP = "scaling, adaptive against uniform, quality against cost and tokens, curves, lengths, pictures"
_EPILOG = """\
Each figure is written as .png, .svg and .pdf, if there is data for it:
  dice_against_cost, accuracy_against_cost   timed runs with test scores
  against_tokens                             runs with two or more numbers of tokens
  scaling_measured, against_uniform          one training on several numbers of GPUs (`launch submit scaling`)
  training_curves                            metrics.jsonl in the run folders
  dice_per_slide, predictions                scores and pictures of the test slides
  sequence_lengths, preparation              build logs beside the token files that the records name
  erf, split_values                          --erf, --lengths
  published_*                                no RUNS: what the papers print, and nothing else

examples:
  python -m analysis plots runs --out out/plots
  python -m analysis plots --out out/published
  python -m analysis plots runs --out out/plots --erf out/erf/*.npz --lengths out/v20 out/v50

exit codes: 0 done; 1 there is no finished run to show; 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = f"{HELP[0].upper()}{HELP[1:]}.", _EPILOG
    parser.add_argument(
        "runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs; without: the published numbers"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), metavar="DIR", help="folder for the files (default: plots)"
    )
    add_pictures(parser)


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that a report has too."""
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="experiment that is the denominator of every speedup (default: for each run the fair uniform run "
        "of its resolution with the smallest patch)",
    )
    parser.add_argument(
        "--erf", type=Path, nargs="+", default=[], metavar="FILE", help="also fields that `launch erf` measured"
    )
    parser.add_argument(
        "--lengths",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="also Figure 3 from token files built with --split-value",
    )


def more_figures(args: argparse.Namespace) -> list[Drawing]:
    """Figures of files that are no run folders: --erf and --lengths."""
    found = []
    if args.erf:
        from analysis.figures.receptive_field import draw, read_fields

        found.append(draw(read_fields(args.erf)))
    if args.lengths:
        from analysis.figures.sweeps import read_rows, split_values

        found.append(split_values(read_rows(args.lengths)))
    return found


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    more = more_figures(args)
    if args.runs is None:
        from analysis.figures.published import draw_published

        if args.baseline:
            raise ValueError("--baseline needs RUNS, a folder of runs")
        return answer("", save([*draw_published(), *more], args.out))
    from analysis.comparison.table import compare
    from analysis.figures.draw import draw_all

    runs = load(args.runs)
    return answer("", save([*draw_all(compare(runs, args.baseline)), *more], args.out), runs, args.runs)
