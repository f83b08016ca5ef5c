"""One small table type and its Markdown, CSV, LaTeX and HTML forms, each escaped; and how such files are written."""

import csv
import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.system.files import write_atomic

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A column: its head, and whether its cells are numbers (right-aligned)."""

    head: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """Text cells under columns. `kinds` names each row's kind (run, floor, published ...), one per row.

    A cell is plain text, never markup: every form escapes it. None is a missing value and is shown as "-".
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | None]]
    kinds: Sequence[str]
    notes: Sequence[str] = field(default_factory=tuple)
    slug: str = "table"

    def __post_init__(self) -> None:
        wrong = [r for r in self.rows if len(r) != len(self.columns)]
        if wrong or len(self.kinds) != len(self.rows):
            raise ValueError(f"table {self.slug}: rows, kinds and columns do not fit together")


def number(value: float | None, decimals: int = 3) -> str | None:
    """Return a number with fixed decimals and thousands separated, None for a missing one."""
    return None if value is None else f"{value:,.{decimals}f}"


def significant(value: float | None, digits: int = 3) -> str | None:
    """Return a number with this many significant digits and without an exponent, None for a missing one."""
    if value is None:
        return None
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:,.{places}f}"


def whole(value: float | None) -> str | None:
    """Return a count with thousands separated; a mean that is no whole number keeps one decimal."""
    if value is None:
        return None
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def short_commit(commit: str | None) -> str:
    """Return a commit's first twelve letters and, where it was changed ("+dirty"), that it was; "unknown" for none."""
    if not commit:
        return "unknown"
    name, mark, rest = commit.partition("+")
    return name[:12] + mark + rest


# ---- Markdown


def escape_markdown(text: str) -> str:
    """Return text that GitHub's Markdown (and its $math$) shows literally in a table cell; a_b keeps its underscore."""
    text = re.sub(r"([\\`*|~$])", r"\\\1", _one_line(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("](", "]\\(")


def markdown(table: Table) -> str:
    """Return the table as GitHub Markdown with aligned columns, notes as a list below."""
    heads = [escape_markdown(c.head) for c in table.columns]
    body = [[escape_markdown(MISSING if cell is None else cell) for cell in row] for row in table.rows]
    width = [max(3, len(h), *(len(row[i]) for row in body)) if body else max(3, len(h)) for i, h in enumerate(heads)]

    def line(cells: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if col.numeric else c.ljust(w) for c, w, col in zip(cells, width, table.columns, strict=True)
        ]
        return "| " + " | ".join(parts) + " |"

    rule = "|".join(
        "-" * (w + 1) + ":" if c.numeric else ":" + "-" * (w + 1) for w, c in zip(width, table.columns, strict=True)
    )
    lines = [f"**{escape_markdown(table.caption)}**", "", line(heads), f"|{rule}|", *map(line, body)]
    if table.notes:
        lines += ["", *(f"- {escape_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


# ---- CSV


def csv_text(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return RFC 4180 rows with one head line; None becomes an empty cell and floats keep all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return out.getvalue()


# ---- LaTeX

_LATEX = {
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\ufffd": "?",  # no font of LaTeX has the sign
}


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints literally (needs the T1 font encoding for the double quote)."""
    escaped = "".join(_LATEX.get(c, c) for c in _one_line(text))
    escaped = re.sub("-(?=-)", "-{}", escaped)  # two hyphens are no dash
    return "{[}" + escaped[1:] if escaped.startswith("[") else escaped  # after \\ a bracket would be a length


_TALLEST = 40  # rows of a table that still fits on one page
_LONG_TEXT = 32  # characters; a text column with longer cells gets lines of this length


def latex(table: Table) -> str:
    r"""Return a booktabs table: a float shrunk to the text width, or a longtable where it does not fit on one page.

    A \midrule sets groups of rows apart (runs, trivial baselines, one resolution, one source); notes follow the table.
    """
    tall = len(table.rows) > _TALLEST
    packages = "longtable" if tall else "graphicx"
    caption = f"\\caption{{{escape_latex(table.caption)}}}"
    label = f"\\label{{tab:{re.sub(r'[^a-z0-9-]', '-', table.slug.lower())}}}"
    heads = [" & ".join(escape_latex(c.head) for c in table.columns) + r" \\", "\\midrule"]
    body = ["\\toprule", *heads, *(["\\endhead"] if tall else []), *_latex_rows(table), "\\bottomrule"]
    spec = _latex_columns(table)
    comment = f"% needs \\usepackage{{booktabs}}, \\usepackage{{{packages}}} and \\usepackage[T1]{{fontenc}}"
    notes = [f"  {escape_latex(note)}\\par" for note in table.notes]
    if tall:  # breaks over pages; LaTeX has it for one-column text only
        lines = [comment, "\\begingroup\\footnotesize", f"\\begin{{longtable}}{{{spec}}}", f"  {caption}{label}\\\\"]
        lines += [*(f"  {line}" for line in body), "\\end{longtable}"]
        return "\n".join([*lines, *(["\\noindent", *notes] if notes else []), "\\endgroup"]) + "\n"
    shrink = "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}"
    lines = [comment, "\\begin{table*}", "  \\centering", f"  {caption}", f"  {label}"]
    lines += [f"  {shrink}{{\\begin{{tabular}}{{{spec}}}", *(f"    {line}" for line in body), "  \\end{tabular}}"]
    if notes:
        lines += ["  \\par\\smallskip", "  \\begin{minipage}{\\textwidth}\\footnotesize", *notes, "  \\end{minipage}"]
    return "\n".join([*lines, "\\end{table*}"]) + "\n"


def _latex_columns(table: Table) -> str:
    """Return the column specification; long texts are set in lines instead of making the table tiny."""
    spec = []
    for i, column in enumerate(table.columns):
        longest = max((len(row[i] or "") for row in table.rows), default=0)
        text = f"p{{{_LONG_TEXT / 2:g}em}}" if longest > _LONG_TEXT else "l"
        spec.append("r" if column.numeric else text)
    return "".join(spec)


def _latex_rows(table: Table) -> Iterator[str]:
    previous = None
    for row, kind in zip(table.rows, table.kinds, strict=True):
        if previous is not None and (kind.split()[:1] != previous.split()[:1] or kind.endswith(" first")):
            yield "\\midrule"
        cells = ["--" if cell is None or cell == MISSING else escape_latex(cell) for cell in row]
        yield " & ".join(cells) + r" \\"
        previous = kind


# ---- all of them


def forms(table: Table, text: str | None = None) -> dict[str, str]:
    """Return the table as md, csv and tex; `text` is a CSV with more digits than the table for people shows."""
    text = csv_text([c.head for c in table.columns], table.rows) if text is None else text
    return {"md": markdown(table), "csv": text, "tex": latex(table)}


def write_forms(folder: Path, slug: str, texts: Mapping[str, str]) -> list[Path]:
    """Write SLUG.md, SLUG.csv and so on, as `write_atomically` does, and return their paths."""
    return write_files(folder, {f"{slug}.{suffix}": text for suffix, text in texts.items()})


# ---- HTML


def escape_html(text: object) -> str:
    """Return text for HTML content and quoted attributes; characters that no HTML page may hold are replaced."""
    return html.escape(re.sub(_UNSHOWN, "\ufffd", str(text)), quote=True)


def html_table(table: Table, row_heads: int = 1) -> str:
    """Return a table element with caption, scoped heads and the notes below, in a region that scrolls by keyboard."""
    heads = "".join(f'<th scope="col"{_class(c.numeric)}>{escape_html(c.head)}</th>' for c in table.columns)
    body = []
    for row, kind in zip(table.rows, table.kinds, strict=True):
        cells = []
        for i, (cell, column) in enumerate(zip(row, table.columns, strict=True)):
            text = (
                '<span class="missing" title="missing">&ndash;</span>' if cell in (None, MISSING) else escape_html(cell)
            )
            tag = ("th", ' scope="row"') if i < row_heads else ("td", "")
            cells.append(f"<{tag[0]}{tag[1]}{_class(column.numeric)}>{text}</{tag[0]}>")
        body.append(f'<tr class="{escape_html(re.sub(r"[^a-z0-9]+", "-", kind.lower()))}">{"".join(cells)}</tr>')
    notes = "".join(f"<li>{escape_html(note)}</li>" for note in table.notes)
    ident = escape_html(table.slug)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="cap-{ident}">'
        f'<table id="{ident}"><caption id="cap-{ident}">{escape_html(table.caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _class(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


# Control characters (a terminal obeys them, TeX stops at them), marks that turn the reading direction, half pairs.
_UNSHOWN = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def _one_line(text: str) -> str:
    """Return text on one line, with a replacement character for what no reader should ever be sent."""
    return re.sub(_UNSHOWN, "\ufffd", " ".join(text.split()))


# ---- files


def every_form(table: Table, slug: str | None = None, text: str | None = None) -> dict[str, str]:
    """Return the files of a table by name: SLUG.md, SLUG.csv and SLUG.tex; `text` is a CSV with more than its cells."""
    name = slug or table.slug
    cells = csv_text([c.head for c in table.columns], table.rows) if text is None else text
    return {f"{name}.md": markdown(table), f"{name}.csv": cells, f"{name}.tex": latex(table)}


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write files of these names, each whole or not at all, and return their paths; the folder is made.

    Raises:
        ValueError: the folder or a file cannot be written; the message names it and the cause.
    """
    for name, content in files.items():
        data = content.encode("utf-8", "replace") if isinstance(content, str) else content
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, data)
        except OSError as error:
            raise ValueError(f"{folder / name}: cannot be written ({error.strerror or error})") from error
    return [folder / name for name in files]
