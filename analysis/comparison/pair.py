"""One run against another: fair or refused, paired over images, and at equal quality."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.comparison.equal_quality import EqualQuality, equal_quality, label
from analysis.comparison.item_scores import interval, row_scores
from analysis.comparison.speedups import differences, remarks
from analysis.output.formats import Column, Table, csv_text, short_commit, significant, whole
from analysis.runs.groups import describe, group_runs
from analysis.runs.records import RECORD, Row, RunsError, load, rows_of
from analysis.runs.run_files import read_curves
from analysis.runs.stats import BOOTSTRAP_SEED, bootstrap_interval, mean, resamples

# What else makes two optimisers of one name different, and two trainings of one length.
_OPTIMISER = "lr weight_decay betas momentum rho clip schedule warmup decay_at decay_factor".split()
_SAME_EPOCHS, _SAME_TIME = 0.01, 0.05  # relative; a time limit ends with the step it falls into


@dataclass(frozen=True)
class Line:
    """One line of a comparison: what, A, B, A minus B or B over A with its interval, and over how many.

    `kind` says what `against` is: "difference" (A - B), "ratio" (B / A: how many times less A needs) or "".
    """

    quantity: str
    a: float | None
    b: float | None
    kind: str = ""
    against: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    shown: str | None = None  # `against` for people, where a number alone would say too much
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Two rows put side by side; `unfair` holds the reasons why their times must not be divided."""

    a: Row
    b: Row
    unfair: tuple[str, ...]
    remarks: tuple[str, ...]
    rows: tuple[Line, ...]
    no_equal_quality: str = ""


class UnfairError(RunsError):
    """Two runs that must not be compared; the message gives every reason."""

    def __init__(self, reasons: Sequence[str]):
        super().__init__(
            f"A and B must not be compared: {'; '.join(reasons)} (--unfair-ok compares and says so in the caption)", 1
        )


def read_side(path: Path) -> Row:
    """Return what one argument names: a run, or the seeds of the one experiment in a folder or a collected study.

    Raises:
        RunsError: no such path, or several experiments in a folder (64); no finished run (1).
    """
    runs = load(path.parent if path.name == RECORD else path)
    if runs.ok.empty:
        raise RunsError(f"{path}: no finished run ({runs.problems[0].kind}: {runs.problems[0].reason})", 1)
    rows = rows_of(group_runs(runs.ok))
    if len(rows) > 1:
        names = ", ".join(row.label for row in rows[:5])
        raise RunsError(f"{path}: {len(rows)} experiments ({names}{', ...' * (len(rows) > 5)}); name one run", 64)
    return rows[0]


def compare_pair(a: Row, b: Row, unfair_ok: bool = False) -> Pair:
    """Return the comparison of two rows.

    Args:
        a: The row in question.
        b: The row it is compared with.
        unfair_ok: Compare rows whose settings differ, and keep the reasons.

    Raises:
        UnfairError: the settings differ and that was not allowed.
    """
    same = [run.folder for run in a.runs] == [run.folder for run in b.runs]
    reasons = () if same else tuple(dict.fromkeys(unfair(a, b)))
    if reasons and not unfair_ok:
        raise UnfairError(reasons)
    rows, missing = _equal_quality(a, b)
    return Pair(a, b, reasons, tuple(_remarks(a, b)), (*_rows(a, b), *rows), missing)


# ---- fair or not


def unfair(a: Row, b: Row) -> list[str]:
    """Return every reason not to compare two rows: hardware to timing window, task, optimiser settings and budget.

    The budget is the same when both took the same steps on the same global batch, the same epochs (1 %), or the same
    training time (5 %).
    """
    reasons = [*differences(a, b), *_other_settings(a, b)]
    trained = budget(a, b)
    return [*reasons, trained] if trained else reasons


def _other_settings(a: Row, b: Row) -> list[str]:
    mine, theirs = (row.runs[0].files.config.get("train") for row in (a, b))
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return []
    return [
        f"optimiser {key} {mine.get(key)} against {theirs.get(key)}"
        for key in _OPTIMISER
        if mine.get(key) != theirs.get(key)
    ]


def budget(a: Row, b: Row) -> str | None:
    """Return how the training budgets of two rows differ, None where they do not; see `unfair`."""

    def near(name: str, tolerance: float) -> bool | None:
        x, y = getattr(a, name), getattr(b, name)
        return None if x is None or y is None else bool(abs(x - y) <= tolerance * max(x, y))

    steps, batch = near("steps", 0), near("global_batch", 0)
    answers = [steps and batch, near("epochs", _SAME_EPOCHS), near("train_seconds", _SAME_TIME)]
    if any(answers):
        return None
    if all(answer is None for answer in answers):
        return "training budget not recorded"

    def words(row: Row) -> str:
        parts = (("steps", "steps"), ("epochs", "epochs"), ("train_seconds", "s"))
        return ", ".join(f"{significant(v)} {w}" for k, w in parts if (v := getattr(row, k)) is not None)

    return f"training budget {words(a)} against {words(b)}"


def _remarks(a: Row, b: Row) -> list[str]:
    """Return what differs and may be compared, but must be said."""
    said = remarks(a, b)
    if a.commit != b.commit:
        said.append(f"code {short_commit(a.commit)} against {short_commit(b.commit)}")
    versions = [row.runs[0].files.environment.get("versions") for row in (a, b)]
    torch = [v.get("torch") for v in versions if isinstance(v, dict)]
    if len(set(torch)) == 2:
        said.append(f"torch {torch[0]} against {torch[1]}")
    for name, row in (("A", a), ("B", b)):
        if not isinstance(row.runs[0].files.config.get("train"), dict):
            said.append(f"optimiser settings of {name} not known (no config.yaml beside the record)")
    return said


# ---- the numbers


def _rows(a: Row, b: Row) -> list[Line]:
    rows = [*_dice(a, b), *_classification(a, b)]
    for what, name in _RATIOS.items():
        rows.append(_ratio(what, *(_gpu_hours(row) if name == "gpu_hours" else getattr(row, name) for row in (a, b))))
    return [row for row in rows if row.a is not None or row.b is not None]


_RATIOS = {
    "training s/image": "seconds_per_image",
    "training (s)": "train_seconds",
    "training (TFLOP)": "train_tflop",
    "GPU hours": "gpu_hours",
    "tokens/image": "tokens_per_image",
    "peak memory (GiB)": "peak_memory_gib",
    "preprocessing (s/image)": "preprocessing_seconds",
}


def _gpu_hours(row: Row) -> float | None:
    return None if row.train_seconds is None or row.gpus is None else row.train_seconds * row.gpus / 3600


def _ratio(quantity: str, a: float | None, b: float | None) -> Line:
    if a is None or b is None or not a > 0 or not math.isfinite(b / a):
        return Line(quantity, a, b)
    return Line(quantity, a, b, "ratio", b / a)


def _dice(a: Row, b: Row) -> list[Line]:
    """The difference of the mean Dice, paired over the slides that both have."""
    mine, theirs = a.dice_per_slide, b.dice_per_slide
    shared = sorted(set(mine) & set(theirs))
    rows = []
    if shared:
        gaps = [mine[s] - theirs[s] for s in shared]
        low, high = bootstrap_interval(gaps) or (None, None)
        x, y = (mean(side[s] for s in shared) for side in (mine, theirs))
        better, worse = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
        note = f"A is better on {better}, equal on {len(gaps) - better - worse} and worse on {worse} slides"
        left = len(set(mine) ^ set(theirs))
        note += f"; {left} slides that only one side has are left out" if left else ""
        rows.append(Line("test Dice", x, y, "difference", mean(gaps), low, high, len(shared), note=note))
    elif a.dice is not None or b.dice is not None:
        rows.append(Line("test Dice", a.dice, b.dice, note="no slide that both sides have: not paired"))
    rows.append(Line("Dice ceiling", a.dice_ceiling, b.dice_ceiling))
    return rows


def _classification(a: Row, b: Row) -> list[Line]:
    """The differences of accuracy and AUC, paired over the test items."""
    rows = []
    for metric in ("accuracy", "auc"):
        x, y = getattr(a, metric), getattr(b, metric)
        if x is None and y is None:
            continue
        sides = [row_scores(row) for row in (a, b)]
        found = interval(metric, *sides) if all(sides) else None
        name = f"test {'AUC' if metric == 'auc' else metric}"
        if found is None:
            why = "several seeds or classes" if all(sides) else "not every run has a scores.csv"
            gap = None if x is None or y is None else x - y
            rows.append(Line(name, x, y, "difference", gap, note=f"not paired over items: {why}, or other items"))
        else:
            rows.append(Line(name, x, y, "difference", found.value, found.low, found.high, found.n))
    return rows


def _equal_quality(a: Row, b: Row) -> tuple[list[Line], str]:
    """The rows of equal quality, or none and why."""
    reason = "not every run has a metrics.jsonl"
    for quality, word in (("dice", "Dice"), ("auc", "AUC"), ("accuracy", "accuracy")):
        mine, theirs = read_curves(a, quality), read_curves(b, quality)
        if mine is None or theirs is None:
            return [], reason
        sides = (mine, theirs)
        curves = [*mine, *theirs]
        if any(not c.val_dice.size for c in curves):
            reason = "not every run was evaluated while it trained" if reason.startswith("not") else reason
            continue
        if found := equal_quality(*sides):
            seeds = max(len(row.runs) for row in (a, b))
            rows = [_equal_quality_row(value, f"training (s) to validation {word}", seeds) for value in found]
            if all(c.val_tflop is not None for c in curves):
                work = equal_quality(*sides, of="val_tflop")
                rows += [_equal_quality_row(v, f"training (TFLOP) to validation {word}", seeds) for v in work]
            return rows, ""
        best = [max(float(c.val_dice.max()) for c in side) for side in sides]
        reason = f"the best validation {word} is {best[0]:.3f} for A and {best[1]:.3f} for B, no common quality above 0"
        if min(float(c.val_dice.max()) for c in curves) > 0:
            reason = "not every evaluation has a training time: the first steps were not logged"
    return [], reason


def _equal_quality_row(value: EqualQuality, what: str, seeds: int) -> Line:
    note = f"{value.unresolved} passed it before the first evaluation" if value.unresolved else ""
    low, high = (value.low, value.high) if seeds > 1 else (None, None)
    name = f"{what} {value.quality:.3f}"
    return Line(name, value.a, value.b, "ratio", value.speedup, low, high, None, label(value), note)


# ---- for people and programs


def pair_table(pair: Pair) -> Table:
    """Return the comparison as a table; what is not fair about it stands in its caption."""
    caption = f"A = {describe(pair.a)} against B = {describe(pair.b)}"
    if pair.unfair:
        caption += f". NOT A FAIR COMPARISON: {'; '.join(pair.unfair)}"
    columns = [Column("quantity"), *(Column(h, True) for h in ("A", "B", "A - B", "B / A", "95 % interval", "n"))]
    rows = []
    for row in pair.rows:
        gap = f"{row.against:+.3f}" if row.kind == "difference" and row.against is not None else ""
        times = (row.shown or f"{significant(row.against)}x") if row.kind == "ratio" else ""
        sides = [_cell(row, value) for value in (row.a, row.b)]
        rows.append([row.quantity, *sides, gap, times, _interval(row), whole(row.n) or ""])
    return Table(caption, columns, rows, ["measured"] * len(rows), tuple(_notes(pair)), "compare")


def _cell(row: Line, value: float | None) -> str | None:
    fraction = row.kind == "difference" or "Dice ceiling" in row.quantity or row.quantity.startswith("test ")
    return None if value is None else f"{value:.3f}" if fraction else significant(value)


def _interval(row: Line) -> str:
    if row.low is None or row.high is None:
        return ""
    if row.kind == "ratio":
        return f"seeds: {significant(row.low)}x to {significant(row.high)}x"
    return f"[{row.low:+.3f}, {row.high:+.3f}]"


def _notes(pair: Pair) -> list[str]:
    notes = [f"{row.quantity}: {row.note}." for row in pair.rows if row.note]
    if any(row.low is not None and row.kind == "difference" for row in pair.rows):
        draws = " or ".join(f"{n:,}" for n in sorted({resamples(r.n) for r in pair.rows if r.n}))
        notes.append(
            f"Interval of A - B: percentile bootstrap, paired over the n test images, {draws} draws, seed "
            f"{BOOTSTRAP_SEED}. It holds for these images and seeds."
        )
    if any(row.quantity.startswith("training (s) to") for row in pair.rows):
        notes.append(
            "Time to a validation quality: training seconds, linear between evaluations of the best value so far; "
            "evaluation itself and preprocessing are not counted."
        )
    if any("TFLOP" in row.quantity for row in pair.rows):
        notes.append(
            "TFLOP: 10^12 operations, two per multiply-accumulate, of forward and backward passes on all ranks; "
            "counted in some steps, which stand for the others."
        )
    if pair.no_equal_quality:
        notes.append(f"No equal-quality speedup: {pair.no_equal_quality}.")
    for name, side in (("A", pair.a), ("B", pair.b)):
        seeds = f", mean of {len(side.runs)} seeds" if len(side.runs) > 1 else ""
        notes.append(
            f"{name}: {side.label}, {side.gpus} x {side.hardware}, {side.precision}, {side.engine}, "
            f"commit {short_commit(side.commit)}{seeds}; measured."
        )
    return notes + ([f"Compared although not alike in: {'; '.join(pair.remarks)}."] if pair.remarks else [])


CSV_HEADS = ("quantity", "a", "b", "kind", "against", "low", "high", "n", "note", "fair")


def pair_csv(pair: Pair) -> str:
    """Return the comparison for programs: all digits, one quantity per line."""
    fair = "no" if pair.unfair else "yes"
    return csv_text(
        CSV_HEADS, [[r.quantity, r.a, r.b, r.kind, r.against, r.low, r.high, r.n, r.note, fair] for r in pair.rows]
    )


def pair_json(pair: Pair) -> dict[str, Any]:
    """Return the comparison as plain values."""
    return {
        "a": [run.folder.as_posix() for run in pair.a.runs],
        "b": [run.folder.as_posix() for run in pair.b.runs],
        "fair": not pair.unfair,
        "unfair": list(pair.unfair),
        "remarks": list(pair.remarks),
        "rows": [{k: v for k, v in asdict(row).items() if k != "shown"} for row in pair.rows],
    }
