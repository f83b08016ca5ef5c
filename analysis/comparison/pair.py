"""One run against another: fair or refused, paired over images, and at equal quality (no torch, no matplotlib)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.comparison.equal_quality import EqualQuality, equal_quality, label
from analysis.comparison.item_scores import interval, read_scores
from analysis.comparison.speedups import differences, remarks
from analysis.output.formats import Column, Table, csv_text, short_commit, significant, whole
from analysis.runs.groups import Group, group_runs, read_config
from analysis.runs.records import RECORD, Run, RunsError, load, load_run
from analysis.runs.run_files import read_curve, read_environment
from analysis.runs.stats import BOOTSTRAP_SEED, bootstrap_interval, mean, resamples

# What else makes two optimisers of one name different, and two trainings of one length.
_OPTIMISER = (
    "lr",
    "weight_decay",
    "betas",
    "momentum",
    "rho",
    "clip",
    "schedule",
    "warmup",
    "decay_at",
    "decay_factor",
)
_SAME_EPOCHS, _SAME_TIME = 0.01, 0.05  # relative; a time limit ends with the step it falls into


@dataclass(frozen=True)
class Row:
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

    a: Group
    b: Group
    unfair: tuple[str, ...]
    remarks: tuple[str, ...]
    rows: tuple[Row, ...]
    no_equal_quality: str = ""


class UnfairError(RunsError):
    """Two runs that must not be compared; the message gives every reason."""

    def __init__(self, reasons: Sequence[str]):
        super().__init__(
            f"A and B must not be compared: {'; '.join(reasons)} (--unfair-ok compares and says so in the caption)", 1
        )


def read_side(path: Path) -> Group:
    """Return what one argument names: the run of a record, or the seeds of the one experiment in a folder.

    Raises:
        RunsError: no such path, or several experiments in a folder (64); no finished run (1).
    """
    if path.is_file() or not path.exists():
        run = load_run(path)
        return Group(run.experiment, (run,))
    if (path / RECORD).exists():
        run = load_run(path / RECORD)
        return Group(run.experiment, (run,))
    runs = load(path)
    if not runs.ok:
        raise RunsError(f"{path}: no finished run ({runs.problems[0].kind}: {runs.problems[0].reason})", 1)
    groups = group_runs(runs.ok)
    if len(groups) > 1:
        names = ", ".join(g.label for g in groups[:5])
        raise RunsError(f"{path}: {len(groups)} experiments ({names}{', ...' * (len(groups) > 5)}); name one run", 64)
    return groups[0]


def compare_pair(a: Group, b: Group, unfair_ok: bool = False) -> Pair:
    """Return the comparison of two rows.

    Args:
        a: The row in question.
        b: The row it is compared with.
        unfair_ok: Compare rows whose settings differ, and keep the reasons.

    Raises:
        UnfairError: the settings differ and that was not allowed.
    """
    reasons = () if a.runs == b.runs else tuple(dict.fromkeys(unfair(a, b)))
    if reasons and not unfair_ok:
        raise UnfairError(reasons)
    rows, missing = _equal_quality(a, b)
    return Pair(a, b, reasons, tuple(_remarks(a, b)), (*_rows(a, b), *rows), missing)


# ---- fair or not


def unfair(a: Group, b: Group) -> list[str]:
    """Return every reason not to compare two rows: hardware to timing window, task, optimiser settings and budget.

    The budget is the same when both took the same steps on the same global batch, the same epochs (1 %), or the same
    training time (5 %).
    """
    x, y = a.first, b.first
    reasons = [*differences(x, y), *_other_settings(x, y)]
    trained = budget(a, b)
    return [*reasons, trained] if trained else reasons


def _other_settings(x: Run, y: Run) -> list[str]:
    mine, theirs = (read_config(run.folder).get("train") for run in (x, y))
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return []
    return [
        f"optimiser {key} {mine.get(key)} against {theirs.get(key)}"
        for key in _OPTIMISER
        if mine.get(key) != theirs.get(key)
    ]


def budget(a: Group, b: Group) -> str | None:
    """Return how the training budgets of two rows differ, None where they do not; see `unfair`."""

    def near(name: str, tolerance: float) -> bool | None:
        x, y = a.mean(name), b.mean(name)
        return None if x is None or y is None else abs(x - y) <= tolerance * max(x, y)

    steps, batch = near("steps", 0), near("global_batch", 0)
    answers = [steps and batch, near("epochs", _SAME_EPOCHS), near("train_seconds", _SAME_TIME)]
    if any(answers):
        return None
    if all(answer is None for answer in answers):
        return "training budget not recorded"

    def words(group: Group) -> str:
        parts = (("steps", "steps"), ("epochs", "epochs"), ("train_seconds", "s"))
        return ", ".join(f"{significant(v)} {w}" for k, w in parts if (v := group.mean(k)) is not None)

    return f"training budget {words(a)} against {words(b)}"


def _remarks(a: Group, b: Group) -> list[str]:
    """Return what differs and may be compared, but must be said."""
    x, y = a.first, b.first
    said = remarks(x, y)
    if x.commit != y.commit:
        said.append(f"code {short_commit(x.commit)} against {short_commit(y.commit)}")
    versions = [read_environment(run).get("versions") for run in (x, y)]
    if all(isinstance(v, dict) for v in versions) and versions[0].get("torch") != versions[1].get("torch"):
        said.append(f"torch {versions[0].get('torch')} against {versions[1].get('torch')}")
    for name, run in (("A", x), ("B", y)):
        if not isinstance(read_config(run.folder).get("train"), dict):
            said.append(f"optimiser settings of {name} not known (no config.yaml beside the record)")
    return said


# ---- the numbers


def _rows(a: Group, b: Group) -> list[Row]:
    rows = [*_dice(a, b), *_classification(a, b)]
    rows += [
        _ratio("training s/image", a.seconds_per_image, b.seconds_per_image),
        _ratio("training (s)", a.mean("train_seconds"), b.mean("train_seconds")),
        _ratio("training (TFLOP)", a.mean("train_tflop"), b.mean("train_tflop")),
        _ratio("GPU hours", _gpu_hours(a), _gpu_hours(b)),
        _ratio("tokens/image", a.mean("tokens_per_image"), b.mean("tokens_per_image")),
        _ratio("peak memory (GiB)", a.mean("peak_memory_gib"), b.mean("peak_memory_gib")),
        _ratio("preprocessing (s/image)", a.mean("preprocessing_seconds"), b.mean("preprocessing_seconds")),
    ]
    return [row for row in rows if row.a is not None or row.b is not None]


def _gpu_hours(group: Group) -> float | None:
    seconds, gpus = group.mean("train_seconds"), group.first.gpus
    return None if seconds is None or gpus is None else seconds * gpus / 3600


def _ratio(quantity: str, a: float | None, b: float | None) -> Row:
    if a is None or b is None or not a > 0 or not math.isfinite(b / a):
        return Row(quantity, a, b)
    return Row(quantity, a, b, "ratio", b / a)


def _dice(a: Group, b: Group) -> list[Row]:
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
        rows.append(Row("test Dice", x, y, "difference", mean(gaps), low, high, len(shared), note=note))
    elif a.mean("dice") is not None or b.mean("dice") is not None:
        rows.append(Row("test Dice", a.mean("dice"), b.mean("dice"), note="no slide that both sides have: not paired"))
    rows.append(Row("Dice ceiling", a.mean("dice_ceiling"), b.mean("dice_ceiling")))
    return rows


def _classification(a: Group, b: Group) -> list[Row]:
    """The differences of accuracy and AUC, paired over the test items."""
    rows = []
    for metric in ("accuracy", "auc"):
        values = [g.mean(metric) for g in (a, b)]
        if values == [None, None]:
            continue
        sides = [[s for run in g.runs if (s := read_scores(run)) is not None] for g in (a, b)]
        whole_sides = all(len(side) == len(g.runs) for side, g in zip(sides, (a, b), strict=True))
        found = interval(metric, *sides) if whole_sides and all(sides) else None
        name = f"test {'AUC' if metric == 'auc' else metric}"
        if found is None:
            why = "several seeds or classes" if whole_sides and all(sides) else "not every run has a scores.csv"
            gap = None if None in values else values[0] - values[1]
            rows.append(Row(name, *values, "difference", gap, note=f"not paired over items: {why}, or other items"))
        else:
            rows.append(Row(name, *values, "difference", found.value, found.low, found.high, found.n))
    return rows


def _equal_quality(a: Group, b: Group) -> tuple[list[Row], str]:
    """The rows of equal quality, or none and why."""
    reason = "not every run has a metrics.jsonl"
    for quality, word in (("dice", "Dice"), ("auc", "AUC"), ("accuracy", "accuracy")):
        sides = [[c for run in g.runs if (c := read_curve(run, quality)) is not None] for g in (a, b)]
        if any(len(side) < len(g.runs) for side, g in zip(sides, (a, b), strict=True)):
            return [], reason
        curves = [c for side in sides for c in side]
        if any(not c.val_dice.size for c in curves):
            reason = "not every run was evaluated while it trained" if reason.startswith("not") else reason
            continue
        if found := equal_quality(*sides):
            seeds = max(len(g.runs) for g in (a, b))
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


def _equal_quality_row(value: EqualQuality, what: str, seeds: int) -> Row:
    note = f"{value.unresolved} passed it before the first evaluation" if value.unresolved else ""
    low, high = (value.low, value.high) if seeds > 1 else (None, None)
    name = f"{what} {value.quality:.3f}"
    return Row(name, value.a, value.b, "ratio", value.speedup, low, high, None, label(value), note)


# ---- for people and programs


def pair_table(pair: Pair) -> Table:
    """Return the comparison as a table; what is not fair about it stands in its caption."""
    caption = f"A = {pair.a.describe()} against B = {pair.b.describe()}"
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


def _cell(row: Row, value: float | None) -> str | None:
    fraction = row.kind == "difference" or "Dice ceiling" in row.quantity or row.quantity.startswith("test ")
    return None if value is None else f"{value:.3f}" if fraction else significant(value)


def _interval(row: Row) -> str:
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
    for name, group in (("A", pair.a), ("B", pair.b)):
        run = group.first
        seeds = f", mean of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        notes.append(
            f"{name}: {group.label}, {run.gpus} x {run.device_name or run.device}, {run.precision}, {run.engine}, "
            f"commit {short_commit(run.commit)}{seeds}; measured."
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
