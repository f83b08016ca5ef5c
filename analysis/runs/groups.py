"""Puts the seeds of one experiment together: one row of a table, one line of a plot."""

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.records import DTYPES, Row, rows_of
from analysis.runs.stats import mean
from launch.records.record import fields_of

# Runs that agree on all of these, and on their config apart from the seed, are seeds of one row.
IDENTITY = fields_of("row")
MEANS = fields_of("mean")
# Keys of config.yaml that name a run and do not change what it computes.
_NAMING = {"seed", "run_id", "run_root", "force", "experiment"}
_STUDY = {"gpus", "nodes", "global_batch"}  # what a scaling study varies
_ORDER = {"apf": 0, "uniform": 1}


def group_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for the seeds of each experiment, in an order that does not depend on the order of the runs.

    The order is resolution, adaptive before uniform before the rest, model, smallest patch, label.

    Args:
        runs: What `records.load` found.

    Returns:
        The fields of a record. A number that training gives is the mean over the seeds that have it; other fields are
        the first seed's. Also `label` and `hardware`; `tiled`: trained on crops, so that its patch is the crop; `runs`:
        the seeds, as `rows_of` gives them; `dice_per_slide`: mean over the seeds, for the slides that every seed has;
        `n_test` as recorded, or counted.
    """
    # Seeds of one row stand together, in the order of their numbers.
    frame = runs.assign(path=runs.folder.map(lambda folder: folder.as_posix()))
    frame["row"] = _same_row(frame)
    frame = frame.assign(order=frame.seed.fillna(-1)).sort_values(["row", "order", "run_id", "path"])
    rows = frame.drop_duplicates("row").reset_index(drop=True)
    seeds = rows_of(frame[[*DTYPES, "folder", "files"]])
    starts = np.flatnonzero(~frame.row.duplicated())
    ends = [*starts, len(frame)][1:]
    spans = list(zip(starts, ends, strict=True))
    # Means over the seeds, and what the row has beside a record's fields.
    for name in MEANS:
        values = frame[name].astype("float64").to_numpy()
        known = [values[a:b][~np.isnan(values[a:b])] for a, b in spans]
        rows[name] = np.array([mean(part) for part in known], dtype="float64")
    rows["runs"] = [tuple(seeds[a:b]) for a, b in spans]
    rows["dice_per_slide"] = [_per_slide(some) for some in rows.runs]
    counted = rows.dice_per_slide.map(len).astype("Int64").replace(0, pd.NA)
    rows["n_test"] = rows.n_test.fillna(counted)
    rows["hardware"] = rows.device_name.where(rows.device_name.fillna("") != "", rows.device)
    crops = rows.samples_per_image.fillna(1) != 1
    rows["tiled"] = crops | rows.model.fillna("").str.contains("tiled") | (rows.patching == "tiles")
    rows["label"] = _labels(rows)
    # The order of the table.
    kind = rows.patching.map(_ORDER).fillna(2).where(~rows.tiled, 2)
    order = rows[["label", "path"]].assign(kind=kind, model=rows.model.fillna(""))
    order = order.assign(resolution=rows.resolution.fillna(0), patch=rows.patch.fillna(0))
    order = order.sort_values(["resolution", "kind", "model", "patch", "label", "path"])
    return rows.drop(columns=["row", "order", "path"]).loc[order.index].reset_index(drop=True)


def _same_row(frame: pd.DataFrame) -> pd.Series:
    """A number for each row that the runs belong to."""
    alike = frame.groupby(IDENTITY, dropna=False, sort=False).ngroup()
    several = alike.duplicated(keep=False)
    config = [settings_of(files.config) if more else "" for files, more in zip(frame.files, several, strict=True)]
    return frame.assign(alike=alike, config=config).groupby(["alike", "config"], sort=False).ngroup()


def settings_of(config: dict[str, Any]) -> str:
    """Return config.yaml as canonical text without the keys that name a run; unreadable ones count as equal."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): strip(v) for k, v in value.items() if k not in _NAMING}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(config), sort_keys=True, default=str)


def _per_slide(runs: tuple[Row, ...]) -> dict[str, float]:
    scores = [run.dice_per_slide or {} for run in runs]
    shared = sorted(set.intersection(*map(set, scores)))
    return {slide: mean(score[slide] for score in scores) or 0.0 for slide in shared}


def _labels(rows: pd.DataFrame) -> pd.Series:
    """The experiment of each row; with its number of GPUs where rows differ in that alone, else with its run id.

    Rows that are still called alike are told apart by their machine, and then by the folder of their first run.
    """
    named = rows.groupby("experiment", sort=False)
    size = named.experiment.transform("size")
    fixed = [name for name in IDENTITY if name not in _STUDY]
    other = rows[["experiment"]].assign(n=rows.groupby(fixed, dropna=False, sort=False).ngroup())
    study = (other.groupby("experiment").n.transform("nunique") == 1) & (named.gpus.transform("nunique") == size)
    study &= named.gpus.transform("min").fillna(0) > 0
    gpus = rows.gpus.map(lambda n: "" if pd.isna(n) else f", {n:,} GPU{'s' * (n != 1)}")
    labels = (rows.experiment + gpus).where(study, rows.experiment + "/" + rows.run_id).where(size > 1, rows.experiment)
    for more in (" on " + rows.hardware.fillna("None").astype(str), " in " + rows.path):
        labels = (labels + more).where(labels.duplicated(keep=False), labels)
    return labels


def describe(row: Row) -> str:
    """Return a row in words, for footnotes: label (model, patching, p, L)."""
    parts = [row.model, row.patching, row.patch and f"p={row.patch}", row.length and f"L={row.length}"]
    return f"{row.label} ({', '.join(p for p in parts if p)})"
