"""`python -m analysis tables`: which tables, from records, from the papers or both, in which form."""

import argparse
from pathlib import Path

from analysis.commands.answer import answer
from analysis.comparison import table as tables
from analysis.output.formats import Table, csv_text, latex, markdown, write_files
from analysis.papers.tables import TABLES, cells_csv, contradictions_table, paper_table, table_cells
from analysis.runs.records import load

COMPARISON, CONTRADICTIONS = "comparison", "contradictions"
NAMES = (COMPARISON, *TABLES, CONTRADICTIONS)
SOURCES = ("records", "reference", "joined")
_TITLES = {
    COMPARISON: "all measured runs, with speedups and trivial baselines",
    **{name: table.title for name, table in TABLES.items()},
    CONTRADICTIONS: "where the published numbers contradict each other",
    "all": "every one of these",
}
HELP = "comparison of the runs and the papers' tables: Markdown, CSV or LaTeX"
_EPILOG = f"""\
RUNS is a folder of runs (runs/<experiment>/<run id>/record.json at any depth), or one run folder. Without RUNS the
published tables are printed.

tables:
{chr(10).join(f"  {name:<15} {title}" for name, title in _TITLES.items())}
sources: records (measured rows), reference (published rows), joined (both, and modelled rows where the scaling model
has them; a column says which)

examples:
  python -m analysis tables runs                       the comparison of the runs, as Markdown
  python -m analysis tables runs --out out/tables      the same, and comparison.md, .csv, .tex, problems.csv
  python -m analysis tables --which apf2,apf3          the papers' tables, lost cells marked
  python -m analysis tables --which contradictions     where the published numbers contradict each other
  python -m analysis tables runs --which apf3 --source joined --format tex

exit codes: 0 done; 1 there is no finished run to show; 64 wrong arguments (no such folder, table or baseline).
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "Tables of measured and published numbers; every row says which it is."
    parser.epilog = _EPILOG
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs")
    parser.add_argument(
        "--which", metavar="T,...", help=f"tables (default: {COMPARISON} with RUNS, else all published)"
    )
    parser.add_argument("--source", choices=SOURCES, help="of the papers' tables (default: records with RUNS)")
    parser.add_argument("--format", choices=("md", "csv", "tex"), default="md", help="on the terminal (default: md)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write every form of every table there")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="experiment that is the denominator of every speedup (default: for each run the fair uniform run of its "
        "resolution with the smallest patch)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    names = _names(args)
    source = args.source or ("records" if args.runs else "reference")
    if source != "reference" and not args.runs:
        raise ValueError(f"--source {source} needs RUNS, a folder of runs")
    if source == "reference" and args.runs:
        raise ValueError("--source reference takes no RUNS; joined shows both")
    if COMPARISON in names and not args.runs:
        raise ValueError(f"--which {COMPARISON} needs RUNS, a folder of runs")
    runs = load(args.runs) if args.runs else None
    comparison = tables.compare(runs, args.baseline) if runs else None
    forms = [_forms(name, source, comparison) for name in names]
    text = _terminal(forms, args.format)
    written = []
    if args.out:
        if COMPARISON in names and comparison:
            written += tables.write_tables(comparison, args.out)
        others = [form for name, form in zip(names, forms, strict=True) if name != COMPARISON]
        files = {f"{form['slug']}.{suffix}": form[suffix] for form in others for suffix in ("md", "csv", "tex")}
        written += write_files(args.out, files)
    return answer(text, written, runs, args.runs)


def _names(args: argparse.Namespace) -> list[str]:
    if args.which is None:
        return [COMPARISON] if args.runs else [*TABLES, CONTRADICTIONS]
    if args.which == "all":
        return [name for name in NAMES if name != COMPARISON or args.runs]
    names = [name.strip() for name in args.which.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"--which: no table {(unknown or [args.which])[0]!r}; there are: {', '.join(NAMES)}, all")
    return list(dict.fromkeys(names))


def _forms(name: str, source: str, comparison: tables.Comparison | None) -> dict[str, str]:
    """Return a table in every form; "cells" are the lines of its CSV that other tables can follow."""
    if name == COMPARISON and comparison:
        table, text = tables.comparison_table(comparison), tables.comparison_csv(comparison)
        return {"slug": table.slug, "md": tables.as_markdown(comparison), "csv": text, "tex": latex(table)}
    if name == CONTRADICTIONS:
        table = contradictions_table()
        return _of(table, csv_text([c.head for c in table.columns], table.rows))
    cells = [] if source == "records" else table_cells(name)
    remarks: list[str] = []
    if comparison and source != "reference":
        from analysis.papers.measured_rows import measured_cells

        measured, remarks = measured_cells(name, comparison)
        cells = [*cells, *measured]
        if not measured:
            remarks = ["No measured run belongs to this table."]
    if source == "joined":
        from analysis.scaling.table3 import modelled_cells

        modelled, said = modelled_cells(name)
        cells, remarks = [*cells, *modelled], [*remarks, *said]
    return _of(paper_table(name, cells, remarks), cells_csv(cells))


def _of(table: Table, text: str) -> dict[str, str]:
    return {"slug": table.slug, "md": markdown(table), "csv": text, "tex": latex(table)}


def _terminal(forms: list[dict[str, str]], suffix: str) -> str:
    if suffix != "csv":
        return "\n".join(form[suffix] for form in forms)
    heads = {form["csv"].partition("\n")[0] for form in forms}
    if len(heads) > 1:
        raise ValueError("--format csv: these tables have different columns; give one of them, or --out")
    return heads.pop() + "\n" + "".join(form["csv"].partition("\n")[2] for form in forms)
