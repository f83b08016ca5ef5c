"""Rows of cells as aligned columns for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """One line per row, columns two spaces apart and as wide as their widest cell; the head comes first.

    A row that ends early says why in its last cell, which widens no column. The first `left` columns are aligned left
    and the others right; with None all are aligned left.
    """
    columns = len(rows[0])
    telling = [row if len(row) == columns else row[:-1] for row in rows]
    widths = [max(len(row[i]) for row in telling if i < len(row)) for i in range(columns)]
    lines = []
    for row in rows:
        cells = zip([*row, *[""] * (columns - len(row))], widths, strict=True)
        if left is None:
            lines.append("  ".join(cell.ljust(w) for cell, w in cells).rstrip())
        else:
            lines.append("  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells)))
    return "\n".join(lines)
