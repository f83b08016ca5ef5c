"""The comparison table of measured runs, its floors, footnotes and list of problems (no torch, no matplotlib)."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import pandas as pd

from analysis.comparison.speedups import speedups
from analysis.comparison.trivial_baselines import TrivialBaseline, find_trivial_baselines
from analysis.output.formats import Column, Table, csv_text, markdown, number, significant, whole
from analysis.runs.groups import describe, group_runs
from analysis.runs.records import Problem, Row, Runs, rows_of
from analysis.runs.stats import BOOTSTRAP_SEED, bootstrap_interval, mean, resamples
from launch.records.record import columns


@dataclass(frozen=True)
class Comparison:
    """Everything the table needs, computed once: rows with their speedups, the floors and the problems.

    `frame` has what `group_runs` and `speedups` give, and `dice_interval`: see `dice_interval`.
    """

    frame: pd.DataFrame
    floors: list[TrivialBaseline]
    problems: list[Problem]
    root: Path

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the frame."""
        return rows_of(self.frame)

    @cached_property
    def by_label(self) -> dict[str, Row]:
        """The rows by their label, which is unique."""
        return {row.label: row for row in self.rows}


def compare(runs: Runs, baseline: str | None = None) -> Comparison:
    """Return the comparison of all usable runs.

    Args:
        runs: the loaded folder.
        baseline: label or experiment of the denominator of every speedup; default: see `speedups`.

    Raises:
        BaselineError: no run has that name.
    """
    frame = group_runs(runs.ok)
    frame = frame.join(speedups(frame, baseline))
    rows = rows_of(frame)
    frame["dice_interval"] = pd.Series(map(dice_interval, rows), index=frame.index, dtype=object)
    return Comparison(frame, find_trivial_baselines(rows), runs.problems, runs.root)


def dice_interval(row: Row) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval over test slides of the mean Dice; None for fewer than two slides.

    None too where the slides do not give the mean that the record states: then the two do not belong together.
    """
    slides = list(row.dice_per_slide.values())
    if row.dice is None or not slides or abs((mean(slides) or 0.0) - row.dice) > 1e-4:
        return None
    return bootstrap_interval(slides)


def dice_cell(row: Row) -> str | None:
    """Return "mean [low, high]", the mean alone where there is no interval, None where there is no Dice."""
    if row.dice is None:
        return None
    ends = row.dice_interval
    return f"{row.dice:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def ratio(value: float) -> str:
    """Return a speedup with three significant digits and a multiplication sign that every terminal has."""
    return f"{significant(value)}x"


DICE, ACCURACY = "Dice [95 % CI]", "accuracy"
_TEXT_HEADS = ("run", "model", "decoder", "patching")


def comparison_table(comparison: Comparison) -> Table:
    """Return the table for people: measured runs, then the floors, footnotes below.

    Columns of segmentation or classification appear where a run has that task; a floor stands in the column of its
    task, so that an accuracy is never read as a Dice.
    """
    rows, floors = comparison.rows, comparison.floors
    tasks = {row.task for row in rows} | {f.task for f in floors}
    heads = [*_TEXT_HEADS, *(["GPUs"] if len({row.gpus for row in rows}) > 1 else [])]
    heads += ["R (px)", "p (px)", "L", "tokens/image", "steps", "train (s)", "s/image"]
    heads += [DICE] if "segmentation" in tasks else []
    heads += [ACCURACY, "AUC"] if "classification" in tasks else []
    heads += ["n", *(["ceiling"] if "segmentation" in tasks else []), "speedup"]
    heads += ["seeds"] if any(len(row.runs) > 1 for row in rows) else []
    notes = _Notes()
    cells = [_run_cells(row, comparison, notes) for row in rows] + _floor_cells(comparison)
    return Table(
        "Comparison of the measured runs",
        [Column(head, head not in _TEXT_HEADS) for head in heads],
        [[of.get(head, "") for head in heads] for of in cells],  # "" does not apply, None is missing
        ["run"] * len(rows) + ["floor"] * len(floors),
        (*notes.lines(), *_fixed_notes(comparison)),
        "comparison",
    )


def _run_cells(row: Row, comparison: Comparison, notes: "_Notes") -> dict[str, str | None]:
    cells = {
        "run": row.label,
        "model": row.model,
        "decoder": row.decoder,
        "patching": row.patching,
        "GPUs": whole(row.gpus),
        "R (px)": whole(row.resolution),
        "p (px)": whole(row.patch),
        "L": whole(row.length),
        "tokens/image": whole(row.tokens_per_image),
        "steps": whole(row.steps),
        "train (s)": number(row.train_seconds, 0),
        "s/image": significant(row.seconds_per_image),
        "n": whole(row.n_test),
        "seeds": str(len(row.runs)),
    }
    if row.task == "classification":
        cells |= {ACCURACY: number(row.accuracy), "AUC": number(row.auc)}
    else:
        cells |= {DICE: dice_cell(row), "ceiling": number(row.dice_ceiling)}
    crops = row.samples_per_image
    if cells["s/image"] is not None and crops not in (None, 1):
        cells["s/image"] += f" {notes.mark(f'trained on crops: {crops:g} crops, the area of one image, count as one')}"
    return cells | {"speedup": _speedup_cell(row, comparison, notes)}


def _floor_cells(comparison: Comparison) -> list[dict[str, str | None]]:
    several = len({row.resolution for row in comparison.rows}) > 1
    alike = Counter((f.name, f.resolution) for f in comparison.floors)
    rows = []
    for floor in comparison.floors:
        label = f"floor: {floor.label}"
        if alike[floor.name, floor.resolution] > 1:
            label += f" ({', '.join(run for run, _ in floor.values)})"
        row: dict[str, str | None] = {"run": label, "n": whole(floor.n_test)}
        row[ACCURACY if floor.task == "classification" else DICE] = floor.text
        row["R (px)"] = (whole(floor.resolution) or "") if several else ""
        rows.append(row)
    return rows


class _Notes:
    """Footnotes numbered a, b, c in the order of first use; equal texts share one."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return self._sign(self.texts.setdefault(text, len(self.texts)))

    @staticmethod
    def _sign(i: int) -> str:
        sign = ""
        while True:
            sign = chr(ord("a") + i % 26) + sign
            i = i // 26 - 1
            if i < 0:
                return f"({sign})"

    def lines(self) -> list[str]:
        return [f"{self._sign(i)} {text}" for i, text in enumerate(self.texts)]


def _speedup_cell(row: Row, comparison: Comparison, notes: _Notes) -> str:
    base = describe(comparison.by_label[row.baseline]) if row.baseline else ""
    if row.ratio is None:
        against = f" against {base}" if base else ""
        return f"- {notes.mark(f'no speedup{against}: ' + '; '.join(row.refused))}"
    cell = f"{ratio(row.ratio)} {notes.mark(f'speedup: s/image of {base} divided by s/image of the row')}"
    if row.remarks:
        cell += notes.mark(f"compared although not alike in: {'; '.join(row.remarks)}")
    return cell


def _fixed_notes(comparison: Comparison) -> list[str]:
    notes, rows = [], comparison.rows
    if counts := sorted({resamples(len(row.dice_per_slide)) for row in rows if row.dice_interval}):
        draws = " or ".join(f"{n:,}" for n in counts)
        notes.append(
            f"Dice: mean over the n test slides of the hard Dice in frame pixels; interval: percentile bootstrap over "
            f"slides, {draws} draws, seed {BOOTSTRAP_SEED}. It holds for these slides and seeds."
        )
    if any(row.dice_ceiling is not None for row in rows):
        notes.append("ceiling: the best Dice that any prediction on the run's cells could reach.")
    if comparison.floors:
        differ = any(" to " in f.text for f in comparison.floors)
        ranges = "; a range where the runs' cells give different values" if differ else ""
        notes.append(f"floor: a score that needs no learning, on the same slides{ranges}.")
    if any((row.model or "").startswith("hiri_") for row in rows):
        notes.append("hiri_vit and hiri_body with its front: a reconstruction; the paper's sizes are lost.")
    if rules := sorted({row.warmup_rule for row in rows if row.warmup_rule}):
        notes.append(f"s/image: end-to-end training time per image over all ranks; {'; '.join(rules)}.")
    return notes


def problem_table(comparison: Comparison) -> Table:
    """Return the records that the comparison leaves out, or parts of them, each with its reason."""
    rows = [[p.kind, _relative(p.path, comparison.root), p.reason] for p in comparison.problems]
    return Table(
        f"Not in the table ({len(rows)})",
        [Column("what"), Column("run folder"), Column("why")],
        rows,
        ["problem"] * len(rows),
        slug="problems",
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


# The columns of comparison.csv: those of a record, and behind some of them what a table adds.
_ADDED = {
    "experiment": ("run_ids", "seeds"),
    "dice": ("dice_low", "dice_high"),
    "auc": ("speedup", "speedup_baseline", "speedup_refused"),
}
CSV_HEADS = ("kind", "label", *chain.from_iterable((head, *_ADDED.get(head, ())) for head in columns().values()))


def comparison_csv(comparison: Comparison) -> str:
    """Return the table for programs: full precision, units in the heads, one row per line of the table."""
    rows: list[dict[str, object]] = [
        {
            **{head: getattr(row, "hardware" if head == "hardware" else name) for name, head in columns().items()},
            "kind": "run",
            "label": row.label,
            "run_ids": " ".join(run.run_id for run in row.runs),
            "seeds": " ".join("?" if run.seed is None else str(run.seed) for run in row.runs),
            **dict(zip(("dice_low", "dice_high"), row.dice_interval or (), strict=False)),
            "speedup": row.ratio,
            "speedup_baseline": row.baseline,
            "speedup_refused": "; ".join(row.refused) or None,
        }
        for row in comparison.rows
    ]
    rows += [
        {
            "kind": "floor",
            "label": floor.label,
            "experiment": " ".join(run for run, found in floor.values if found == value),
            "resolution_px": floor.resolution,
            "task": floor.task,
            "accuracy" if floor.task == "classification" else "dice": value,
            "n_test": floor.n_test,
        }
        for floor in comparison.floors
        for value in sorted({value for _, value in floor.values})
    ]
    return csv_text(CSV_HEADS, [[row.get(head) for head in CSV_HEADS] for row in rows])


def as_markdown(comparison: Comparison) -> str:
    """Return the table and the list of problems as Markdown."""
    return with_problems(markdown(comparison_table(comparison)), comparison)


def with_problems(text: str, comparison: Comparison) -> str:
    """Return the Markdown of a table, and the list of problems below it if there is any."""
    return text + ("\n" + markdown(problem_table(comparison)) if comparison.problems else "")
