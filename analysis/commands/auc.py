"""`python -m analysis auc RUN`: AUC of test scores with intervals, by finding size and type, paired."""

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.commands.answer import answer
from analysis.comparison.auc import (
    AUC,
    auc_difference,
    auc_interval,
    below_sizes,
    broken_down,
    finding_types,
    size_thirds,
)
from analysis.output.formats import Column, Table, csv_text, every_form, number, write_files
from analysis.runs.records import STUDY, RunsError, find

HELP = "AUC of a classifier with bootstrap intervals, by finding size and type, against a baseline"
_EPILOG = """\
RUN is a run folder (its predictions/scores.csv is read), a run of a collected study (STUDY.jsonl/RUN), or such a CSV
file: name, label, p0, p1, ...
FINDINGS is a CSV file with the columns name, size_px (square root of the area of the finding's box; may be empty) and
types (several separated by semicolons; may be empty). An item without a line has no finding on record.

examples:
  python -m analysis auc runs/hct_image/RUN
  python -m analysis auc runs/hct_image/RUN --baseline runs/gmic_image/RUN --findings findings.csv --out out/auc

Intervals: percentile bootstrap over items, 10,000 resamples, 95 %. Each part holds some positives and all negatives.
exit codes: 0 done; 1 a file cannot be used; 64 wrong arguments.
"""


def _unusable(text: str) -> RunsError:
    return RunsError(text, 1)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "AUC of the test items of one run, or its difference from another run's."
    parser.epilog = _EPILOG
    parser.add_argument("of", type=Path, metavar="RUN", help="run folder or scores.csv")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="also RUN minus this one, resampled together")
    parser.add_argument("--findings", type=Path, metavar="CSV", help="sizes and types of the positives' findings")
    parser.add_argument("--positive", type=int, default=1, metavar="CLASS", help="class against the rest (default 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write auc.md, .csv and .tex there")


def read_scores(path: Path, positive: int) -> tuple[list[str], NDArray[np.float64], NDArray[np.bool_]]:
    """Names, scores of one class and whether an item is of it.

    Args:
        path: Run folder or CSV file.
        positive: The class.

    Raises:
        RunsError: No such file, or it lacks columns, numbers or rows.
        ValueError: No such class.
    """
    file = path / "predictions" / "scores.csv" if path.is_dir() else path
    scored = None if path.is_dir() or path.is_file() else _collected(path)
    rows = _read(file, ("name", "label", "p0")) if scored is None else scored
    if not 0 <= positive < sum(key.startswith("p") and key[1:].isdecimal() for key in rows[0]):
        raise ValueError(f"--positive {positive}: {file} has no column p{positive}")
    try:
        scores = np.array([float(row[f"p{positive}"]) for row in rows])
        labels = np.array([int(row["label"]) for row in rows]) == positive
    except (TypeError, ValueError) as error:
        raise _unusable(f"{file}: {error}") from None
    if not np.isfinite(scores).all():
        raise _unusable(f"{file}: a score is not finite")
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        raise _unusable(f"{file}: a name stands there twice")
    return names, scores, labels


def read_findings(path: Path, names: list[str]) -> tuple[NDArray[np.float64], list[frozenset[str]]]:
    """Size in pixels (nan: none) and types of the finding of each item, in the order of `names`.

    Raises:
        RunsError: No such file, or it lacks columns or holds no numbers.
    """
    found = {row["name"]: row for row in _read(path, ("name", "size_px", "types"))}
    if not set(found) & set(names):
        raise _unusable(f"{path}: none of its names is among the {len(names)} scored items")
    try:
        sizes = [float(found[name]["size_px"] or "nan") if name in found else math.nan for name in names]
    except (TypeError, ValueError) as error:
        raise _unusable(f"{path}: size_px: {error}") from None
    kinds = [found[name]["types"] or "" if name in found else "" for name in names]
    return np.array(sizes), [frozenset(part.strip() for part in text.split(";") if part.strip()) for text in kinds]


def _collected(path: Path) -> list[dict[str, str]] | None:
    """The scores of a run inside of a collected study; None where the path names none."""
    if not any(parent.suffix == STUDY for parent in path.parents):
        return None
    found = [entry.files.part("scores") for entry in find(path, [])]
    if len(found) != 1 or not found[0] or not {"name", "label", "p0"} <= set(found[0][0]):
        raise _unusable(f"{path}: {len(found)} runs, where one with scores of a classifier is needed")
    return [dict(zip(found[0][0], row, strict=False)) for row in found[0][1:]]


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unusable(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows or not set(columns) <= set(rows[0]):
        raise _unusable(f"{path}: needs a header line with the columns {', '.join(columns)}, and rows below it")
    return rows


def measure(args: argparse.Namespace) -> list[tuple[str, AUC]]:
    """Return every area that the arguments ask for, each with what it is: `AUC` or `difference`.

    Raises:
        RunsError: A file cannot be used, or the runs were not scored on the same items.
        ValueError: An argument is wrong.
    """
    names, scores, labels = read_scores(args.of, args.positive)
    masks: dict[str, NDArray[np.bool_]] = {}
    if args.findings:
        sizes, types = read_findings(args.findings, names)
        masks = {**below_sizes(labels, sizes), **size_thirds(labels, sizes), **finding_types(labels, types)}
    areas = [("AUC", area) for area in (auc_interval(scores, labels), *broken_down(scores, labels, masks))]
    if args.baseline:
        others, theirs, truth = read_scores(args.baseline, args.positive)
        place = {name: i for i, name in enumerate(others)}
        if set(place) != set(names):
            raise _unusable(f"{args.baseline}: not scored on the same items as {args.of}")
        order = [place[name] for name in names]
        if (truth[order] != labels).any():
            raise _unusable(f"{args.baseline}: has other labels than {args.of}")
        base = theirs[order]
        found = (auc_difference(scores, base, labels), *broken_down(scores, labels, masks, base))
        areas += [("difference", area) for area in found]
    return areas


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    areas = measure(args)
    heads = ("items", "what", "AUC", "low", "high", "positives", "negatives")
    numbers = [(a.name, what, a.value, a.low, a.high, a.positives, a.negatives) for what, a in areas]
    table = Table(
        caption=f"AUC of {args.of}" + (f", and minus that of {args.baseline}" if args.baseline else ""),
        columns=[Column(head, i > 1) for i, head in enumerate(heads)],
        rows=[(*row[:2], *(number(v, 4) for v in row[2:5]), *(str(v) for v in row[5:])) for row in numbers],
        kinds=[what for what, _ in areas],
        notes=["Intervals: 95 %, percentile bootstrap over items, 10,000 resamples."],
        slug="auc",
    )
    files = every_form(table, text=csv_text(heads, numbers))
    return answer(files["auc.md"], write_files(args.out, files) if args.out else [])
