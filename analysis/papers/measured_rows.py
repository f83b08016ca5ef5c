"""Rows of the papers' tables from measured runs, as cells beside the published ones."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

from analysis.comparison.equal_quality import equal_quality
from analysis.comparison.item_scores import interval, row_scores
from analysis.comparison.table import Comparison
from analysis.output.formats import short_commit
from analysis.papers.entries import TEXT, Cell
from analysis.papers.tables import MEASURED, MISSING, SUITE
from analysis.runs.groups import describe
from analysis.runs.records import Row
from analysis.runs.run_files import Curve, read_curves

_MOST_NAMED = 4
_PATCH_PX = 512  # side of HCT's patches; its images are larger, at half resolution too
_HCT, _HIRI, _RIVIT = {"hct", "gmic", "def_gmic"}, {"hiri_vit"}, {"rivit"}


def _btcv(row: Row) -> bool:
    return any("btcv" in (text or "").lower() for text in (row.experiment, row.data))


# Which rows belong to which table of a paper.
BELONGS: dict[str, Callable[[Row], bool]] = {
    "apf2": lambda row: row.task != "classification" and not _btcv(row),
    "apf3": lambda row: row.task != "classification" and not _btcv(row),
    "apf4": lambda row: row.task != "classification" and _btcv(row),
    "apf5": lambda row: row.task == "classification" and row.model not in _HCT | _HIRI | _RIVIT,
    "hct": lambda row: row.model in _HCT,
    "hiri": lambda row: row.model in _HIRI,
    "rivit": lambda row: row.model in _RIVIT,
}


def measured_cells(name: str, comparison: Comparison) -> tuple[list[Cell], list[str]]:
    """Return the cells of a paper's table that runs give, and the notes they need.

    Args:
        name: A key of `tables.TABLES`.
        comparison: The runs.

    Returns:
        Cells in the order of the comparison's rows, none for a table that runs have no numbers for.
    """
    if name not in BELONGS:
        return [], []
    found = [row for row in comparison.rows if BELONGS[name](row)]
    if name == "apf2":  # a table of pairs: adaptive and uniform at one resolution
        found = [row for row in found if not row.tiled]
        kinds = defaultdict(set)
        for row in found:
            kinds[row.resolution].add(row.patching)
        found = [row for row in found if {"apf", "uniform"} <= kinds[row.resolution]]
    maker = _Maker(comparison)
    cells = [
        _cell(row, name, quantity, value, unit) for row in found for quantity, value, unit in _VALUES[name](maker, row)
    ]
    said = [text.replace("{}", _names(labels)) for text, labels in maker.notes.items()]
    return cells, [*_provenance(found), *said]


Value = tuple[str, float | str | None, str]


def _cell(row: Row, table: str, quantity: str, value: float | str | None, unit: str) -> Cell:
    text = "" if value is None else str(value)  # a number with all its digits
    status = MISSING if value is None else MEASURED
    size, note = str(row.resolution or ""), f"{row.hardware}, commit {row.commit}"
    return Cell(SUITE, table, row.label, size, row.model or "", row.patch, quantity, text, unit, status, note)


# ---- what each table shows


class _Maker:
    """Gives the values of one row after the other, and keeps the notes they need.

    In a note {} stands for the labels of its rows: thousands of rows share a few notes.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.notes: dict[str, list[str]] = defaultdict(list)
        self._by_label = comparison.by_label
        self._curves: dict[str, list[Curve]] = {}

    def base(self, row: Row) -> Row | None:
        """The row that this one's speedup is over, or would be; None where there is none."""
        return self._by_label[row.baseline] if row.baseline else None

    def curves(self, row: Row) -> list[Curve]:
        """Validation curves of all seeds, read once; none where one is missing."""
        if row.label not in self._curves:
            self._curves[row.label] = read_curves(row) or []
        return self._curves[row.label]

    def say(self, row: Row, text: str) -> None:
        """Add this row to the rows that a note holds for."""
        self.notes[text].append(row.label)


def _cost(row: Row) -> Iterator[Value]:
    yield "gpus", row.gpus, "gpu"
    yield "seconds_per_image", row.seconds_per_image, "s"
    yield "tokens", row.tokens_per_image, "token"
    if row.patching == "apf":
        yield "depth", math.log2(row.resolution / row.patch) if row.resolution and row.patch else None, "level"


def _dice(row: Row) -> Iterator[Value]:
    yield "dice", None if row.dice is None else 100 * row.dice, "%"
    if row.dice_interval:
        yield "dice_low", 100 * row.dice_interval[0], "%"
        yield "dice_high", 100 * row.dice_interval[1], "%"


def _speedup(maker: _Maker, row: Row) -> Iterator[Value]:
    base = maker.base(row)
    if row.baseline == row.label:
        return
    yield "speedup", row.ratio, "ratio"
    if base is None or row.ratio is None:
        against = f" against {base.label}" if base else ""
        maker.say(row, f"No measured speedup of {{}}{against}: {'; '.join(row.refused)}.")
    else:
        maker.say(row, f"Measured speedup of {{}}: over {describe(base)}.")


def _apf2(maker: _Maker, row: Row) -> Iterator[Value]:
    yield from _cost(row)
    yield from _dice(row)
    if row.patching != "apf":
        return
    yield from _speedup(maker, row)
    base = maker.base(row)
    if row.ratio is None or base is None or base is row:
        return
    found = equal_quality(maker.curves(row), maker.curves(base), (1.0,))
    if found and not found[0].unresolved:
        yield "speedup_to_convergence", found[0].speedup, "ratio"
        best = f"{found[0].quality:.3f}, the best that both reach"
        maker.say(row, f"Measured speedup to convergence of {{}}: training time to validation Dice {best}.")
    else:
        yield "speedup_to_convergence", None, "ratio"


def _apf3(maker: _Maker, row: Row) -> Iterator[Value]:
    yield from _cost(row)
    yield from _dice(row)
    base = maker.base(row)
    if base is None or base is row or row.ratio is None or row.patching != "apf":
        return
    floor = max((base.floors or {}).values(), default=0.0)
    if row.dice is None or base.dice is None or base.dice <= floor:
        yield "stated_gain", None, "%"
        if row.dice is not None and base.dice is not None:
            best = f"the best score without learning, {floor:.3f}"
            maker.say(row, f"No gain of {{}}: {base.label} with Dice {base.dice:.3f} is not above {best}.")
        return
    yield "stated_gain", 100 * (row.dice / base.dice - 1), "%"
    maker.say(row, f"Measured gain of {{}}: relative Dice over {describe(base)}.")


def _apf4(maker: _Maker, row: Row) -> Iterator[Value]:
    yield from _dice(row)
    yield from _speedup(maker, row)
    yield "train_seconds", row.train_seconds, "s"


def _scored(row: Row, metric: str, quantity: str) -> Iterator[Value]:
    """A score of a classifier in percent, with its interval over items where its items are there."""
    value = getattr(row, metric)
    yield quantity, None if value is None else 100 * value, "%"
    scores = row_scores(row)
    found = interval(metric, scores) if value is not None and scores else None
    # Scores of another evaluation than the record's say nothing about its number.
    if found and found.low is not None and found.high is not None and abs(found.value - value) < 1e-4:
        yield f"{quantity}_low", 100 * found.low, "%"
        yield f"{quantity}_high", 100 * found.high, "%"


def _apf5(_: _Maker, row: Row) -> Iterator[Value]:
    yield "gpus", row.gpus, "gpu"
    yield "patch_sides", None if row.patch is None else str(row.patch), TEXT
    yield from _scored(row, "accuracy", "accuracy")


def _hct(_: _Maker, row: Row) -> Iterator[Value]:
    yield "parameters", None if row.parameters is None else row.parameters / 1e6, "M"
    yield "optimiser", row.optimiser, TEXT
    patch = (row.samples_per_image or 1) > 1 or (row.resolution or math.inf) <= _PATCH_PX
    yield from _scored(row, "auc", "auc_patch" if patch else "auc_image")


def _hiri(maker: _Maker, row: Row) -> Iterator[Value]:
    yield from _scored(row, "accuracy", "top1")
    yield "parameters", None if row.parameters is None else row.parameters / 1e6, "M"
    maker.say(row, "Channels, depths and expansions of {} are a reconstruction: the paper's table of them is lost.")


def _rivit(maker: _Maker, row: Row) -> Iterator[Value]:
    seconds, images = row.seconds_per_image, row.n_train
    yield from _scored(row, "accuracy", "accuracy")
    for side in ("256", "320"):
        there: list[Any] = [(run.accuracy_by_size or {}).get(side) for run in row.runs]
        if None not in there:
            yield f"accuracy_{side}", 100 * fmean(there), "%"
    yield "seconds_per_epoch", None if seconds is None or images is None else seconds * images, "s"
    maker.say(row, "Measured s/epoch of {}: s/image times the number of training images.")


_VALUES = {"apf2": _apf2, "apf3": _apf3, "apf4": _apf4, "apf5": _apf5, "hct": _hct, "hiri": _hiri, "rivit": _rivit}


def _provenance(rows: list[Row]) -> list[str]:
    """Return one note per machine, precision and commit that measured rows come from."""
    alike: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        where = f"{row.hardware}, {row.precision}, {row.engine}, commit {short_commit(row.commit)}"
        alike[where].append(row.label)
    return [f"measured: on {where}, this suite's data ({_names(labels)})." for where, labels in sorted(alike.items())]


def _names(labels: list[str]) -> str:
    more = f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
    return ", ".join(labels[:_MOST_NAMED]) + more
