"""Reads PAIP's tables of tumour burdens: viable over whole area of every slide."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.slides.base import SlideError
from data_prep.system.files import one_line

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)%?")


def read_burdens(path: Path, columns: Sequence[str] = ()) -> dict[str, float]:
    """Tumour burden per slide (viable over whole area) from a CSV: percent or fraction, slides in the first column.

    `columns` are possible names of the burden column, in any case; without them it is the only column of numbers.

    Raises:
        SlideError: The file cannot be read, has no such column, or several columns of numbers and none is named.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{path}: cannot be read: {one_line(error)}") from error
    header, rows = (rows[0], rows[1:]) if rows else ([], [])
    at = _burden_column(path, header, rows, columns)
    found = {
        Path(row[0]).stem.casefold(): float(row[at].rstrip("%"))
        for row in rows
        if len(row) > at and row[0] and _NUMBER.fullmatch(row[at])
    }
    if not found:
        raise SlideError(f"{path}: no numbers in column {header[at]!r}")
    if max(found.values()) > 1.5:
        found = {name: value / 100 for name, value in found.items()}
    return found


def _burden_column(path: Path, header: list[str], rows: list[list[str]], columns: Sequence[str]) -> int:
    wanted = {name.strip().casefold() for name in columns}
    if wanted:
        named = [i for i, name in enumerate(header) if name.casefold() in wanted]
        if len(named) != 1:
            listed = ", ".join(header) or "nothing"
            raise SlideError(f"{path}: {len(named)} columns called {' or '.join(columns)}; its columns are {listed}")
        return named[0]
    numbers = [i for i in range(1, len(header)) if any(len(row) > i and _NUMBER.fullmatch(row[i]) for row in rows)]
    if not numbers:
        raise SlideError(f"{path}: no column of numbers after the names of slides")
    if len(numbers) > 1:
        listed = ", ".join(header[i] for i in numbers)
        raise SlideError(f"{path}: several columns of numbers ({listed}); say with --burden-column which holds burdens")
    return numbers[0]
