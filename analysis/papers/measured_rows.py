"""Rows of the papers' tables from measured runs, as cells beside the published ones (no torch, no matplotlib)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

from analysis.comparison.equal_quality import equal_quality
from analysis.comparison.item_scores import interval, read_scores
from analysis.comparison.speedups import Speedup
from analysis.comparison.table import Comparison
from analysis.output.formats import short_commit
from analysis.papers.entries import TEXT, Cell
from analysis.papers.tables import MEASURED, MISSING, SUITE
from analysis.runs.groups import Group, is_tiled, task_of
from analysis.runs.records import Run
from analysis.runs.run_files import Curve, read_curve

_MOST_NAMED = 4
_PATCH_PX = 512  # side of HCT's patches; its images are larger, at half resolution too
_HCT, _HIRI, _RIVIT = {"hct", "gmic", "def_gmic"}, {"hiri_vit"}, {"rivit"}


def _segments(run: Run) -> bool:
    return task_of(run) == "segmentation"


def _btcv(run: Run) -> bool:
    return any("btcv" in (text or "").lower() for text in (run.experiment, run.data))


# Which runs belong to which table of a paper.
BELONGS: dict[str, Callable[[Run], bool]] = {
    "apf2": lambda run: _segments(run) and not _btcv(run),
    "apf3": lambda run: _segments(run) and not _btcv(run),
    "apf4": lambda run: _segments(run) and _btcv(run),
    "apf5": lambda run: not _segments(run) and run.model not in _HCT | _HIRI | _RIVIT,
    "hct": lambda run: run.model in _HCT,
    "hiri": lambda run: run.model in _HIRI,
    "rivit": lambda run: run.model in _RIVIT,
}


def measured_cells(name: str, comparison: Comparison) -> tuple[list[Cell], list[str]]:
    """Return the cells of a paper's table that runs give, and the notes they need.

    Args:
        name: A key of `paper_tables.TABLES`.
        comparison: The runs.

    Returns:
        Cells in the order of the comparison's rows, none for a table that runs have no numbers for.
    """
    if name not in BELONGS:
        return [], []
    found = [
        (group, quotient)
        for group, quotient in zip(comparison.groups, comparison.speedups, strict=True)
        if BELONGS[name](group.first)
    ]
    if name == "apf2":  # a table of pairs: adaptive and uniform at one resolution
        found = [(g, q) for g, q in found if not is_tiled(g.first)]
        kinds = defaultdict(set)
        for group, _ in found:
            kinds[group.first.resolution].add(group.first.patching)
        found = [(g, q) for g, q in found if {"apf", "uniform"} <= kinds[g.first.resolution]]
    cells: list[Cell] = []
    notes: dict[str, list[str]] = defaultdict(list)
    curves = _Curves()
    for group, quotient in found:
        for quantity, value, unit in _VALUES[name](_Row(group, quotient, curves, notes)):
            cells.append(_cell(group, name, quantity, value, unit))
    said = [text.replace("{}", _names(labels)) for text, labels in notes.items()]
    return cells, [*_provenance([g for g, _ in found]), *said]


Value = tuple[str, float | str | None, str]


def _cell(group: Group, table: str, quantity: str, value: float | str | None, unit: str) -> Cell:
    run = group.first
    text = "" if value is None else str(value)  # a number with all its digits
    return Cell(
        SUITE,
        table,
        group.label,
        str(run.resolution or ""),
        run.model or "",
        run.patch,
        quantity,
        text,
        unit,
        MISSING if value is None else MEASURED,
        f"{run.device_name or run.device}, commit {run.commit}",
    )


# ---- what each table shows


class _Curves:
    """Validation curves of rows, each read once."""

    def __init__(self) -> None:
        self._known: dict[int, list[Curve]] = {}

    def of(self, group: Group) -> list[Curve]:
        """The curves of all seeds; none where one is missing."""
        if id(group) not in self._known:
            found = [curve for run in group.runs if (curve := read_curve(run)) is not None]
            self._known[id(group)] = found if len(found) == len(group.runs) else []
        return self._known[id(group)]


@dataclass(frozen=True)
class _Row:
    """A row in the making: its runs, its speedup over the fair baseline, and where notes go.

    A note has {} where the labels of the rows go that it holds for: thousands of rows have few different notes.
    """

    group: Group
    quotient: Speedup
    curves: _Curves
    notes: dict[str, list[str]]

    def say(self, text: str) -> None:
        """Add this row to the rows that a note holds for."""
        self.notes[text].append(self.group.label)


def _cost(group: Group) -> Iterator[Value]:
    run = group.first
    yield "gpus", run.gpus, "gpu"
    yield "seconds_per_image", group.seconds_per_image, "s"
    yield "tokens", group.mean("tokens_per_image"), "token"
    if run.patching == "apf":
        yield "depth", math.log2(run.resolution / run.patch) if run.resolution and run.patch else None, "level"


def _dice(group: Group) -> Iterator[Value]:
    dice, ends = group.mean("dice"), group.dice_interval
    yield "dice", None if dice is None else 100 * dice, "%"
    if ends:
        yield "dice_low", 100 * ends[0], "%"
        yield "dice_high", 100 * ends[1], "%"


def _speedup(row: _Row) -> Iterator[Value]:
    group, quotient = row.group, row.quotient
    if quotient.baseline is group:
        return
    yield "speedup", quotient.ratio, "ratio"
    if quotient.baseline is None or quotient.ratio is None:
        against = f" against {quotient.baseline.label}" if quotient.baseline else ""
        row.say(f"No measured speedup of {{}}{against}: {'; '.join(quotient.refused)}.")
    else:
        row.say(f"Measured speedup of {{}}: over {quotient.baseline.describe()}.")


def _apf2(row: _Row) -> Iterator[Value]:
    group, quotient, curves = row.group, row.quotient, row.curves
    yield from _cost(group)
    yield from _dice(group)
    if group.first.patching != "apf":
        return
    yield from _speedup(row)
    if quotient.ratio is None or quotient.baseline is None or quotient.baseline is group:
        return
    found = equal_quality(curves.of(group), curves.of(quotient.baseline), (1.0,))
    if found and not found[0].unresolved:
        yield "speedup_to_convergence", found[0].speedup, "ratio"
        row.say(
            f"Measured speedup to convergence of {{}}: training time to validation Dice "
            f"{found[0].quality:.3f}, the best that both reach."
        )
    else:
        yield "speedup_to_convergence", None, "ratio"


def _apf3(row: _Row) -> Iterator[Value]:
    group, quotient = row.group, row.quotient
    yield from _cost(group)
    yield from _dice(group)
    base = quotient.baseline
    if base is None or base is group or quotient.ratio is None or group.first.patching != "apf":
        return
    mine, theirs = group.mean("dice"), base.mean("dice")
    floor = max(base.first.floors.values(), default=0.0)
    if mine is None or theirs is None or theirs <= floor:
        yield "stated_gain", None, "%"
        if mine is not None and theirs is not None:
            row.say(
                f"No gain of {{}}: {base.label} with Dice {theirs:.3f} is not above the best score without "
                f"learning, {floor:.3f}."
            )
        return
    yield "stated_gain", 100 * (mine / theirs - 1), "%"
    row.say(f"Measured gain of {{}}: relative Dice over {base.describe()}.")


def _apf4(row: _Row) -> Iterator[Value]:
    yield from _dice(row.group)
    yield from _speedup(row)
    yield "train_seconds", row.group.mean("train_seconds"), "s"


def _scored(group: Group, metric: str, quantity: str) -> Iterator[Value]:
    """A score of a classifier in percent, with its interval over items where its items are there."""
    value = group.mean(metric)
    yield quantity, None if value is None else 100 * value, "%"
    scores = [s for run in group.runs if (s := read_scores(run)) is not None]
    found = interval(metric, scores) if value is not None and len(scores) == len(group.runs) else None
    # Scores of another evaluation than the record's say nothing about its number.
    if found and found.low is not None and found.high is not None and abs(found.value - value) < 1e-4:
        yield f"{quantity}_low", 100 * found.low, "%"
        yield f"{quantity}_high", 100 * found.high, "%"


def _apf5(row: _Row) -> Iterator[Value]:
    yield "gpus", row.group.first.gpus, "gpu"
    yield "patch_sides", None if row.group.first.patch is None else str(row.group.first.patch), TEXT
    yield from _scored(row.group, "accuracy", "accuracy")


def _hct(row: _Row) -> Iterator[Value]:
    run = row.group.first
    yield "parameters", None if run.parameters is None else run.parameters / 1e6, "M"
    yield "optimiser", run.optimiser, TEXT
    patch = (run.samples_per_image or 1) > 1 or (run.resolution or math.inf) <= _PATCH_PX
    yield from _scored(row.group, "auc", "auc_patch" if patch else "auc_image")


def _hiri(row: _Row) -> Iterator[Value]:
    parameters = row.group.first.parameters
    yield from _scored(row.group, "accuracy", "top1")
    yield "parameters", None if parameters is None else parameters / 1e6, "M"
    row.say("Channels, depths and expansions of {} are a reconstruction: the paper's table of them is lost.")


def _rivit(row: _Row) -> Iterator[Value]:
    seconds, images = row.group.seconds_per_image, row.group.first.n_train
    yield from _scored(row.group, "accuracy", "accuracy")
    for side in ("256", "320"):
        there = [run.accuracy_by_size.get(side) for run in row.group.runs]
        known = [value for value in there if value is not None]
        if known and len(known) == len(there):
            yield f"accuracy_{side}", 100 * fmean(known), "%"
    yield "seconds_per_epoch", None if seconds is None or images is None else seconds * images, "s"
    row.say("Measured s/epoch of {}: s/image times the number of training images.")


_VALUES = {
    "apf2": _apf2,
    "apf3": _apf3,
    "apf4": _apf4,
    "apf5": _apf5,
    "hct": _hct,
    "hiri": _hiri,
    "rivit": _rivit,
}


def _provenance(groups: list[Group]) -> list[str]:
    """Return one note per machine, precision and commit that measured rows come from."""
    alike: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        run = group.first
        where = f"{run.device_name or run.device}, {run.precision}, {run.engine}, commit {short_commit(run.commit)}"
        alike[where].append(group.label)
    return [f"measured: on {where}, this suite's data ({_names(labels)})." for where, labels in sorted(alike.items())]


def _names(labels: list[str]) -> str:
    more = f" and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
    return ", ".join(labels[:_MOST_NAMED]) + more
