"""Command line of the analysis; plots and page are imported only when asked for (no torch)."""

import argparse
import os
import sys
from pathlib import Path

from analysis.auc_cli import add_verb as add_auc
from analysis.compare_cli import add_verb as add_compare
from analysis.erf import add_verb as add_erf
from analysis.groups import BaselineError
from analysis.records import RunsError, load
from analysis.scaling import add_verb as add_scaling
from analysis.sweep_figures import add_verb as add_lengths
from analysis.tables_cli import add_verb as add_tables

EPILOG = """\
RUNS is a folder of runs (runs/<experiment>/<run id>/record.json at any depth), or one run folder.

examples:
  python -m analysis tables runs --out out/tables      comparison.md, .csv, .tex, problems.csv, and on the terminal
  python -m analysis tables --which apf3,contradictions
  python -m analysis compare runs/demo_apf runs/demo_uniform_patch
  python -m analysis plots  runs --out out/plots       each figure as .png, .svg and .pdf
  python -m analysis report runs --out out             out/index.html, one self-contained page

exit codes: 0 done; 1 there is no finished run to show; 64 wrong arguments (no such folder, unknown baseline).
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m analysis`."""
    top = argparse.ArgumentParser(
        "python -m analysis",
        description="Tables, plots and one page from run directories.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "{tables,compare,auc,erf,lengths,plots,report,scaling}"
    verbs = top.add_subparsers(dest="verb", required=True, metavar=names)
    texts = {
        "plots": "training curves, sequence lengths, Dice against cost, Dice per slide, pictures side by side",
        "report": "one self-contained page with tables, plots, pictures, provenance and published numbers",
    }
    outs = {"plots": "plots", "report": None}
    add_tables(verbs)
    for verb, text in texts.items():
        sub = verbs.add_parser(
            verb,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("runs", type=Path, metavar="RUNS", help="folder of runs")
        sub.add_argument(
            "--out",
            type=Path,
            default=outs[verb] and Path(outs[verb]),
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
    add_compare(verbs)
    add_auc(verbs)
    add_erf(verbs)
    add_lengths(verbs)
    add_scaling(verbs)
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
    except (BaselineError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 64


def _run(args: argparse.Namespace) -> int:
    if args.verb == "scaling":
        from analysis.scaling import run

        return run(args)
    text, runs = "", None
    if args.verb in ("lengths", "compare", "auc", "erf"):
        text, written = args.run(args)
    elif args.verb == "tables":
        text, written, runs = args.run(args)
    else:
        from analysis.tables import compare

        runs = load(args.runs)
        comparison = compare(runs, args.baseline)
        if args.verb == "plots":
            from analysis.figures import write_figures

            written = write_figures(comparison, args.out)
        else:
            from analysis.report import write_report

            written = [write_report(comparison, args.out)]
    print(text, end="", flush=True)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if runs and not runs.ok:
        print(
            f"error: {args.runs}: no finished run among {len(runs.problems)} records and run folders", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
