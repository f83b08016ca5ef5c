"""`python -m analysis report`: one page of all there is; draws with matplotlib when it runs."""

import argparse
from pathlib import Path

from analysis.commands.answer import answer
from analysis.commands.plots import add_pictures, more_figures
from analysis.runs.records import load

HELP = "one self-contained page: measured, joined, modelled and published tables, plots, provenance"
_EPILOG = """\
DIR/index.html needs no other file and no network. Sections: measured runs and their figures; the papers' tables with
measured rows; the scaling model; published numbers and their contradictions; records left out, and why; where each
number comes from. Words, not colours, tell measured, modelled and published numbers apart.

examples:
  python -m analysis report runs --out out
  python -m analysis report runs --out out --site frontier,lumi --erf out/erf/*.npz --lengths out/v20 out/v50

A PDF: print the page from a browser, or
  chromium --headless --no-pdf-header-footer --print-to-pdf=report.pdf out/index.html

exit codes: 0 done; 1 there is no finished run to show (the page then says so); 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = f"{HELP[0].upper()}{HELP[1:]}.", _EPILOG
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    add_pictures(parser)
    parser.add_argument(
        "--site", default="frontier", metavar="S,...", help="sites of the modelled section (default: frontier)"
    )
    parser.add_argument("--runs-site", metavar="S", help="site that RUNS ran on (default: local for CPUs, else no fit)")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from analysis.comparison.table import compare
    from analysis.report.page import PageOptions, write_report

    options = PageOptions(tuple(args.site.split(",")), args.runs_site, tuple(more_figures(args)))
    runs = load(args.runs)
    return answer("", [write_report(compare(runs, args.baseline), args.out, options)], runs, args.runs)
