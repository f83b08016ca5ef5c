"""Put the seeds of one experiment together: one row of a table, one line of a plot (no torch, no matplotlib)."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from analysis.runs.records import Run
from analysis.runs.stats import bootstrap_interval, mean
from launch.config.config import ADDED

# Runs that agree on all of these, and on their config apart from the seed, are seeds of one row.
IDENTITY = (
    "experiment",
    "model",
    "decoder",
    "patching",
    "resolution",
    "patch",
    "length",
    "gpus",
    "nodes",
    "device",
    "device_name",
    "engine",
    "precision",
    "attention_backend",
    "optimiser",
    "global_batch",
    "data",
    "split_sha256",
)
# Keys of config.yaml that name a run and do not change what it computes.
_NAMING = {"seed", "run_id", "run_root", "force", "experiment"}


class BaselineError(ValueError):
    """The baseline that was asked for is not among the rows."""


@dataclass(frozen=True)
class Group:
    """The seeds of one experiment: one row of a table, one line of a plot."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that stands for what all seeds share."""
        return self.runs[0]

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of a number of the record; seeds without it are left out."""
        return mean(getattr(run, name) for run in self.runs)

    @property
    def seconds_per_image(self) -> float | None:
        """Training seconds per frame, mean over seeds; a tiled model's crops count by their area."""
        return self.mean("seconds_per_image")

    @cached_property
    def dice_per_slide(self) -> dict[str, float]:
        """Dice per test slide, mean over the seeds, for slides that every seed has; in the order of slide names."""
        shared = set.intersection(*(set(run.dice_per_slide) for run in self.runs))
        return {s: mean(run.dice_per_slide[s] for run in self.runs) or 0.0 for s in sorted(shared)}

    @cached_property
    def dice_interval(self) -> tuple[float, float] | None:
        """95 % percentile bootstrap interval over test slides of the mean Dice; None for fewer than two slides.

        None too where the slides do not give the mean that the record states: then the two do not belong together.
        """
        stated, slides = self.mean("dice"), self.dice_per_slide
        if stated is None or not slides or abs(mean(slides.values()) - stated) > 1e-4:
            return None
        return bootstrap_interval(list(slides.values()))

    @property
    def n_test(self) -> int | None:
        """Number of test slides: as recorded, or counted."""
        return self.first.n_test if self.first.n_test is not None else len(self.dice_per_slide) or None

    def describe(self) -> str:
        """Return the row in words, for footnotes: label (model, patching, p, L)."""
        run = self.first
        parts = [run.model, run.patching, run.patch and f"p={run.patch}", run.length and f"L={run.length}"]
        return f"{self.label} ({', '.join(p for p in parts if p)})"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return the rows: seeds together, in an order that does not depend on the order of the runs.

    The order is resolution, adaptive before uniform before the rest, model, smallest patch, label.
    """
    alike: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        alike[tuple(getattr(run, name) for name in IDENTITY)].append(run)
    sets: list[list[Run]] = []
    for same in alike.values():
        by_config: dict[str, list[Run]] = defaultdict(list)
        for run in same:
            by_config[_config_without_names(run.folder) if len(same) > 1 else ""].append(run)
        sets += by_config.values()
    sets = [sorted(s, key=lambda r: (-1 if r.seed is None else r.seed, r.run_id, r.folder.as_posix())) for s in sets]
    labels = _labels([s[0] for s in sets])
    for more in (lambda run: f"on {run.device_name or run.device}", lambda run: f"in {run.folder.as_posix()}"):
        alike = Counter(labels)
        labels = [x if alike[x] == 1 else f"{x} {more(s[0])}" for x, s in zip(labels, sets, strict=True)]
    return sorted((Group(x, tuple(s)) for x, s in zip(labels, sets, strict=True)), key=_order)


_STUDY = {"gpus", "nodes", "global_batch"}  # what a scaling study varies


def _labels(rows: Sequence[Run]) -> list[str]:
    """The experiment of each row; with its number of GPUs where rows differ in that alone, else with its run id."""
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in rows:
        by_name[run.experiment].append(run)
    study = {
        name
        for name, same in by_name.items()
        if len({run.gpus for run in same}) == len(same) > 1
        and all(run.gpus for run in same)
        and {key for key in IDENTITY if len({getattr(run, key) for run in same}) > 1} <= _STUDY
    }
    return [
        run.experiment
        if len(by_name[run.experiment]) == 1
        else f"{run.experiment}, {run.gpus:,} GPU{'s' * (run.gpus != 1)}"
        if run.experiment in study
        else f"{run.experiment}/{run.run_id}"
        for run in rows
    ]


def _order(group: Group) -> tuple:
    run = group.first
    kind = {"apf": 0, "uniform": 1}.get(run.patching or "", 2)
    return (
        run.resolution or 0,
        2 if is_tiled(run) else kind,
        run.model or "",
        run.patch or 0,
        group.label,
        run.folder.as_posix(),
    )


def _config_without_names(folder: Path) -> str:
    """Return config.yaml as canonical text without the keys that name a run; unreadable ones count as equal.

    A key that came later does not tell runs apart while it has the value that earlier ones had.
    """

    def strip(value):
        if isinstance(value, dict):
            return {str(k): strip(v) for k, v in value.items() if k not in _NAMING}
        return [strip(v) for v in value] if isinstance(value, list) else value

    config = strip(read_config(folder))
    for key, before in ADDED.items():
        section, name = key.split(".")
        if isinstance(config.get(section), dict) and config[section].get(name) == before:
            config[section].pop(name, None)
    return json.dumps(config, sort_keys=True, default=str)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml of a run folder, or nothing where it is missing or broken."""
    try:
        config = yaml.load((folder / "config.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def task_of(run: Run) -> str:
    """Return segmentation or classification; a record from before tasks were written is told by its scores."""
    scored = run.accuracy is not None or run.auc is not None
    return run.task or ("classification" if scored and run.dice is None else "segmentation")


def is_tiled(run: Run) -> bool:
    """Whether a run trains on crops of the image: its patch is the crop, so it is no uniform row of that patch."""
    return "tiled" in (run.model or "") or run.patching == "tiles" or run.samples_per_image not in (None, 1)
