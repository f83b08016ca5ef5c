"""The comparison table of measured runs, its floors, footnotes and list of problems (no torch, no matplotlib)."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from analysis.comparison.speedups import Baselines, Speedup
from analysis.comparison.trivial_baselines import Floor, find_floors
from analysis.output.formats import Column, Table, csv_text, latex, markdown, number, significant, whole, write_files
from analysis.runs.groups import Group, group_runs, task_of
from analysis.runs.records import Problem, Runs
from analysis.runs.stats import BOOTSTRAP_SEED, resamples


@dataclass(frozen=True)
class Comparison:
    """Everything the table needs, computed once: rows, their speedups, the floors and the problems."""

    groups: list[Group]
    speedups: list[Speedup]
    floors: list[Floor]
    problems: list[Problem]
    root: Path


def compare(runs: Runs, baseline: str | None = None) -> Comparison:
    """Return the comparison of all usable runs.

    Args:
        runs: the loaded folder.
        baseline: label or experiment of the denominator of every speedup; default: see `speedups.Baselines`.

    Raises:
        BaselineError: no run has that name.
    """
    groups = group_runs(runs.ok)
    baselines = Baselines(groups)
    return Comparison(
        groups, [baselines.speedup(g, baseline) for g in groups], find_floors(groups), runs.problems, runs.root
    )


def dice_cell(group: Group) -> str | None:
    """Return "mean [low, high]", the mean alone where there is no interval, None where there is no Dice."""
    dice, interval = group.mean("dice"), group.dice_interval
    if dice is None:
        return None
    return f"{dice:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


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
    tasks = {task_of(g.first) for g in comparison.groups} | {f.task for f in comparison.floors}
    several = len({g.first.gpus for g in comparison.groups}) > 1
    heads = [*_TEXT_HEADS, *(["GPUs"] if several else []), "R (px)", "p (px)", "L", "tokens/image", "steps"]
    heads += ["train (s)", "s/image"]
    heads += [DICE] if "segmentation" in tasks else []
    heads += [ACCURACY, "AUC"] if "classification" in tasks else []
    heads += ["n", *(["ceiling"] if "segmentation" in tasks else []), "speedup"]
    heads += ["seeds"] if any(len(g.runs) > 1 for g in comparison.groups) else []
    notes = _Notes()
    rows: list[dict[str, str | None]] = []
    for group, quotient in zip(comparison.groups, comparison.speedups, strict=True):
        rows.append(_run_cells(group, quotient, notes))
    kinds = ["run"] * len(rows) + ["floor"] * len(comparison.floors)
    rows += _floor_cells(comparison)
    return Table(
        "Comparison of the measured runs",
        [Column(head, head not in _TEXT_HEADS) for head in heads],
        [[row.get(head, "") for head in heads] for row in rows],  # "" does not apply, None is missing
        kinds,
        (*notes.lines(), *_fixed_notes(comparison)),
        "comparison",
    )


def _run_cells(group: Group, quotient: Speedup, notes: "_Notes") -> dict[str, str | None]:
    run = group.first
    cells = {
        "run": group.label,
        "model": run.model,
        "decoder": run.decoder,
        "patching": run.patching,
        "GPUs": whole(run.gpus),
        "R (px)": whole(run.resolution),
        "p (px)": whole(run.patch),
        "L": whole(run.length),
        "tokens/image": whole(group.mean("tokens_per_image")),
        "steps": whole(group.mean("steps")),
        "train (s)": number(group.mean("train_seconds"), 0),
        "s/image": _seconds_cell(group, notes),
        "n": whole(group.n_test),
        "speedup": _speedup_cell(quotient, group, notes),
        "seeds": str(len(group.runs)),
    }
    if task_of(run) == "classification":
        return {**cells, ACCURACY: number(group.mean("accuracy")), "AUC": number(group.mean("auc"))}
    return {**cells, DICE: dice_cell(group), "ceiling": number(group.mean("dice_ceiling"))}


def _floor_cells(comparison: Comparison) -> list[dict[str, str | None]]:
    several = len({g.first.resolution for g in comparison.groups}) > 1
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

    def __init__(self):
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


def _seconds_cell(group: Group, notes: _Notes) -> str | None:
    seconds, crops = significant(group.seconds_per_image), group.first.samples_per_image
    if seconds is None or crops in (None, 1):
        return seconds
    return f"{seconds} {notes.mark(f'trained on crops: {crops:g} crops, the area of one image, count as one')}"


def _speedup_cell(quotient: Speedup, group: Group, notes: _Notes) -> str:
    if quotient.ratio is None:
        against = f" against {quotient.baseline.describe()}" if quotient.baseline else ""
        return f"- {notes.mark(f'no speedup{against}: ' + '; '.join(quotient.refused))}"
    text = f"speedup: s/image of {quotient.baseline.describe()} divided by s/image of the row"
    cell = f"{ratio(quotient.ratio)} {notes.mark(text)}"
    if quotient.baseline is not group and quotient.remarks:
        cell += notes.mark(f"compared although not alike in: {'; '.join(quotient.remarks)}")
    return cell


def _fixed_notes(comparison: Comparison) -> list[str]:
    notes = []
    if counts := sorted({resamples(len(g.dice_per_slide)) for g in comparison.groups if g.dice_interval}):
        draws = " or ".join(f"{n:,}" for n in counts)
        notes.append(
            f"Dice: mean over the n test slides of the hard Dice in frame pixels; interval: percentile bootstrap over "
            f"slides, {draws} draws, seed {BOOTSTRAP_SEED}. It holds for these slides and seeds."
        )
    ceilings = [(g.mean("dice"), g.mean("dice_ceiling")) for g in comparison.groups]
    if any(c is not None for _, c in ceilings):
        notes.append("ceiling: the best Dice that any prediction on the run's cells could reach.")
    if comparison.floors:
        differ = any(" to " in f.text for f in comparison.floors)
        ranges = "; a range where the runs' cells give different values" if differ else ""
        notes.append(f"floor: a score that needs no learning, on the same slides{ranges}.")
    if any((g.first.model or "").startswith("hiri_") for g in comparison.groups):
        notes.append("hiri_vit and hiri_body with its front: a reconstruction; the paper's sizes are lost.")
    rules = sorted({g.first.warmup_rule for g in comparison.groups if g.first.warmup_rule})
    if rules:
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


CSV_HEADS = (
    "kind",
    "label",
    "experiment",
    "run_ids",
    "seeds",
    "model",
    "decoder",
    "patching",
    "resolution_px",
    "patch_px",
    "length",
    "tokens_per_image",
    "parameters",
    "steps",
    "epochs",
    "train_seconds",
    "seconds_per_image",
    "samples_per_image",
    "preprocessing_seconds",
    "dice",
    "dice_low",
    "dice_high",
    "dice_pooled",
    "n_test",
    "dice_ceiling",
    "task",
    "accuracy",
    "auc",
    "speedup",
    "speedup_baseline",
    "speedup_refused",
    "peak_memory_gib",
    "mfu",
    "loss_final",
    "gpus",
    "nodes",
    "hardware",
    "engine",
    "precision",
    "attention_backend",
    "optimiser",
    "global_batch",
    "split_sha256",
    "commit",
)


def comparison_csv(comparison: Comparison) -> str:
    """Return the table for programs: full precision, units in the heads, one row per line of the table."""
    rows: list[list[object]] = []
    for group, quotient in zip(comparison.groups, comparison.speedups, strict=True):
        run, interval = group.first, group.dice_interval or (None, None)
        averaged = {
            name: group.mean(name)
            for name in (
                "tokens_per_image",
                "steps",
                "epochs",
                "train_seconds",
                "seconds_per_image",
                "preprocessing_seconds",
                "dice",
                "dice_pooled",
                "dice_ceiling",
                "peak_memory_gib",
                "mfu",
                "loss_final",
                "accuracy",
                "auc",
            )
        }
        known = {
            **{h: getattr(run, h, None) for h in CSV_HEADS},
            **averaged,
            "kind": "run",
            "label": group.label,
            "run_ids": " ".join(r.run_id for r in group.runs),
            "seeds": " ".join("?" if r.seed is None else str(r.seed) for r in group.runs),
            "task": task_of(run),
            "resolution_px": run.resolution,
            "patch_px": run.patch,
            "dice_low": interval[0],
            "dice_high": interval[1],
            "n_test": group.n_test,
            "hardware": run.device_name or run.device,
            "speedup": quotient.ratio,
            "speedup_baseline": quotient.baseline.label if quotient.baseline else None,
            "speedup_refused": "; ".join(quotient.refused) or None,
        }
        rows.append([known[h] for h in CSV_HEADS])
    for floor in comparison.floors:
        for value in sorted({value for _, value in floor.values}):
            known = {
                "kind": "floor",
                "label": floor.label,
                "experiment": " ".join(run for run, found in floor.values if found == value),
                "resolution_px": floor.resolution,
                "task": floor.task,
                "accuracy" if floor.task == "classification" else "dice": value,
                "n_test": floor.n_test,
            }
            rows.append([known.get(h) for h in CSV_HEADS])
    return csv_text(CSV_HEADS, rows)


def as_markdown(comparison: Comparison) -> str:
    """Return the table and the list of problems as Markdown."""
    text = markdown(comparison_table(comparison))
    return text + ("\n" + markdown(problem_table(comparison)) if comparison.problems else "")


def write_tables(comparison: Comparison, out: Path) -> list[Path]:
    """Write comparison.md, .csv and .tex and problems.csv (always, so that an empty one says that there was none).

    Raises:
        ValueError: the folder cannot be written.
    """
    problems = problem_table(comparison)
    files = {
        "comparison.md": as_markdown(comparison),
        "comparison.csv": comparison_csv(comparison),
        "comparison.tex": latex(comparison_table(comparison)),
        "problems.csv": csv_text([c.head for c in problems.columns], problems.rows),
    }
    return write_files(out, files)
