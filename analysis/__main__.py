"""Command line of the analysis; plots and page are imported only when asked for (no torch)."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from analysis.commands.auc import add_verb as add_auc
from analysis.commands.collect import add_verb as add_collect
from analysis.commands.compare import add_verb as add_compare
from analysis.commands.scaling import add_verb as add_scaling
from analysis.commands.tables import add_verb as add_tables
from analysis.comparison.gains import add_verb as add_gains
from analysis.figures.receptive_field import add_verb as add_erf
from analysis.figures.sweeps import add_verb as add_lengths
from analysis.runs.records import Runs, RunsError, load

EPILOG = """\
RUNS is a folder of runs (runs/<experiment>/<run id>/record.json at any depth), one run folder, or a study that
`collect` wrote (NAME.jsonl).

examples:
  python -m analysis tables runs --out out/tables      comparison.md, .csv, .tex, problems.csv, and on the terminal
  python -m analysis tables --which apf3,contradictions
  python -m analysis compare runs/demo_apf runs/demo_uniform_patch
  python -m analysis plots  runs --out out/plots       each figure as .png, .svg and .pdf
  python -m analysis report runs --out out             out/index.html, one self-contained page
  python -m analysis scaling --site frontier --gpus 1,64,2048
  python -m analysis collect runs --out study.jsonl    one file, which every command reads like the folder

Every command has a --help of its own.

exit codes: 0 done; 1 there is no finished run to show; 64 wrong arguments (no such folder, unknown baseline).
"""
PLOTS = """\
Each figure is written as .png, .svg and .pdf. Drawn is what there is data for:
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
REPORT = """\
DIR/index.html needs no other file and no network. Sections: measured runs and their figures; the papers' tables with
the measured rows in them; the scaling model; published numbers; their contradictions; records that are in no table,
and why; where each number comes from. Measured, modelled and published numbers are told apart by words, not by colour.

examples:
  python -m analysis report runs --out out
  python -m analysis report runs --out out --site frontier,lumi --erf out/erf/*.npz --lengths out/v20 out/v50

A PDF: print the page from a browser, or
  chromium --headless --no-pdf-header-footer --print-to-pdf=report.pdf out/index.html

exit codes: 0 done; 1 there is no finished run to show (the page then says so); 64 wrong arguments.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m analysis`."""
    top = argparse.ArgumentParser(
        "python -m analysis",
        description="Tables, plots and one page from run directories.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "{tables,compare,gains,auc,erf,lengths,plots,report,scaling,collect}"
    verbs = top.add_subparsers(dest="verb", required=True, metavar=names)
    texts = {
        "plots": "scaling, adaptive against uniform, quality against cost and tokens, curves, lengths, pictures",
        "report": "one self-contained page: measured, joined, modelled and published tables, plots, provenance",
    }
    outs = {"plots": "plots", "report": None}
    add_tables(verbs)
    for verb, text in texts.items():
        sub = verbs.add_parser(
            verb,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog={"plots": PLOTS, "report": REPORT}[verb],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb == "plots":
            sub.add_argument(
                "runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs; without: the published numbers"
            )
        else:
            sub.add_argument("runs", type=Path, metavar="RUNS", help="folder of runs")
        sub.add_argument(
            "--out",
            type=Path,
            default=Path(out) if (out := outs[verb]) else None,
            required=verb == "report",
            metavar="DIR",
            help="folder for the files" + (f" (default: {outs[verb]})" if outs[verb] else ""),
        )
        sub.add_argument(
            "--baseline",
            metavar="NAME",
            help="experiment that is the denominator of every speedup (default: for each run the fair uniform run "
            "of its resolution with the smallest patch)",
        )
        sub.add_argument(
            "--erf", type=Path, nargs="+", default=[], metavar="FILE", help="also fields that `launch erf` measured"
        )
        sub.add_argument(
            "--lengths",
            type=Path,
            nargs="+",
            default=[],
            metavar="DIR",
            help="also Figure 3 from token files built with --split-value",
        )
        if verb == "report":
            sub.add_argument(
                "--site", default="frontier", metavar="S,...", help="sites of the modelled section (default: frontier)"
            )
            sub.add_argument(
                "--runs-site", metavar="S", help="site that RUNS ran on (default: local for CPUs, else no fit)"
            )
    add_compare(verbs)
    add_gains(verbs)
    add_auc(verbs)
    add_erf(verbs)
    add_lengths(verbs)
    add_scaling(verbs)
    add_collect(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:
        return 64 if stop.code == 2 else int(stop.code or 0)
    if hasattr(sys.stdout, "reconfigure"):  # a name in a record may hold what this terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(args)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RunsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64


def _run(args: argparse.Namespace) -> int:
    if args.verb == "scaling":
        from analysis.commands.scaling import run

        return run(args)
    text, runs = "", None
    if args.verb in ("lengths", "compare", "gains", "auc", "erf", "collect"):
        text, written = args.run(args)
    elif args.verb == "tables":
        text, written, runs = args.run(args)
    else:
        written, runs = _pictures(args)
    print(text, end="", flush=True)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if runs and runs.ok.empty:
        print(
            f"error: {args.runs}: no finished run among {len(runs.problems)} records and run folders", file=sys.stderr
        )
        return 1
    return 0


def _pictures(args: argparse.Namespace) -> tuple[list[Path], Runs | None]:
    """Run `plots` or `report`; return the files that were written and the runs that were read."""
    from analysis.comparison.table import compare
    from analysis.output.figure_style import save

    more = _more(args)
    if args.runs is None:
        from analysis.figures.published import draw_published

        if args.baseline:
            raise ValueError("--baseline needs RUNS, a folder of runs")
        return save([*draw_published(), *more], args.out), None
    runs = load(args.runs)
    comparison = compare(runs, args.baseline)
    if args.verb == "plots":
        from analysis.figures.draw import draw_all

        return save([*draw_all(comparison), *more], args.out), runs
    from analysis.report.page import PageOptions, write_report

    options = PageOptions(tuple(args.site.split(",")), args.runs_site, tuple(more))
    return [write_report(comparison, args.out, options)], runs


def _more(args: argparse.Namespace) -> list[Any]:
    """Figures of files that are no run folders."""
    found = []
    if args.erf:
        from analysis.figures.receptive_field import draw, read_fields

        found.append(draw(read_fields(args.erf)))
    if args.lengths:
        from analysis.figures.sweeps import read_rows, split_values

        found.append(split_values(read_rows(args.lengths)))
    return found


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # files are whole, or as they were before
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
