"""What lies beside a record: settings, environment, curves, scores, token counts, pictures.

A run's files are its folder, or its line of a collected study; every part is read through `RunFiles`, the same of both.
"""

import base64
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml

from launch.records.record import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """The files of one run."""

    folder: Path  # The run's folder; where a collected study would have it, if the run is from one
    data: str | None = None  # The folder of token files that its record names
    kept: dict[str, Any] | None = None  # The parts of a collected run; None: they are read from the folder

    def part(self, name: str) -> Any:
        """One of `PARTS` as plain JSON values; None where it is missing or broken."""
        if self.kept is not None:
            return self.kept.get(name)
        try:
            return PARTS[name](self)
        except (OSError, ValueError, RecursionError, yaml.YAMLError, csv.Error):
            return None

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml, or nothing."""
        return self.part("config") or {}

    @property
    def environment(self) -> dict[str, Any]:
        """env.json, or nothing."""
        return self.part("environment") or {}


def _config(files: RunFiles) -> Any:
    config = yaml.load((files.folder / "config.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config if isinstance(config, dict) else None


def _environment(files: RunFiles) -> Any:
    value = json.loads((files.folder / "env.json").read_text())
    return value if isinstance(value, dict) else None


def _metrics(files: RunFiles) -> Any:
    return read_metrics(files.folder / "metrics.jsonl")


def _scores(files: RunFiles) -> Any:
    with (files.folder / "predictions" / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _tokens(files: RunFiles) -> Any:
    folder = find_data(files)
    counts = logged_tokens(folder) if folder else []
    return {"folder": str(folder.resolve()), "counts": counts} if folder and counts else None


def find_data(files: RunFiles) -> Path | None:
    """Return the folder of token files that a record names, also where the run was started from another folder."""
    if not files.data:
        return None
    named = Path(files.data)
    if named.is_absolute():
        return named if named.is_dir() else None
    for base in (Path(), *files.folder.resolve().parents):
        if (base / named).is_dir():
            return base / named
    return None


def logged_tokens(folder: Path) -> list[int]:
    """Return the last known token count of every slide in a folder's build_log.jsonl; none without one."""
    last: dict[str, int] = {}
    try:
        lines = (folder / "build_log.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line at which a build was killed
            continue
        if isinstance(entry, dict) and isinstance(entry.get("tokens"), int) and entry.get("status") != "failed":
            last[str(entry.get("slide"))] = entry["tokens"]
    return list(last.values())


# ---- pictures of test slides

_SHOWN = ("image", "truth", "pred")


def _pictures(files: RunFiles) -> Any:
    """The pictures of each test slide as base64, and its number of foreground classes; null for one that is missing."""
    folder = files.folder / "predictions"
    return {
        stem: {
            **{name: _encoded(folder / f"{name}_{stem}.png") for name in _SHOWN},
            "classes": _classes(folder / f"{stem}.npz"),
        }
        for stem in sorted(picture_stems(files))
    } or None


def _encoded(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _classes(path: Path) -> int:
    """Return the number of foreground classes of a slide's counts (K, 3); 1 where there are none."""
    try:
        with np.load(path, allow_pickle=False) as counts:
            return max(1, int(counts["counts"].shape[0]))
    except (OSError, ValueError, KeyError, IndexError, BadZipFile):
        return 1


# What a run folder has beside its record, and who reads it.
PARTS: dict[str, Callable[[RunFiles], Any]] = {
    "config": _config,
    "environment": _environment,
    "metrics": _metrics,
    "scores": _scores,
    "tokens": _tokens,
    "pictures": _pictures,
}


@dataclass(frozen=True)
class Pictures:
    """One test slide as a run saw it: image (h, w, 3) uint8, truth and prediction (h, w) bool of the same size."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def picture_stems(files: RunFiles) -> set[str]:
    """Return the names of the test slides that a run left pictures of."""
    if files.kept is not None:
        return set(files.kept.get("pictures") or ())
    return {p.name.removeprefix("pred_")[:-4] for p in (files.folder / "predictions").glob("pred_*.png")}


def read_pictures(files: RunFiles, stem: str) -> Pictures | None:
    """Return the pictures of one test slide, or None where one is missing, unreadable or of another size.

    The trainer writes class k of K as gray 255 * k / K; foreground is what is nearer to a class than to zero.
    """
    from PIL import Image

    kept = None if files.kept is None else (files.kept.get("pictures") or {}).get(stem, {})
    folder = files.folder / "predictions"
    parts = []
    for name, mode in zip(_SHOWN, ("RGB", "L", "L"), strict=True):
        try:
            source = folder / f"{name}_{stem}.png" if kept is None else io.BytesIO(base64.b64decode(kept[name]))
            with Image.open(source) as file:
                parts.append(np.asarray(file.convert(mode)))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    image, truth, prediction = parts
    if not image.shape[:2] == truth.shape == prediction.shape:
        return None
    darkest = 255 / (_classes(folder / f"{stem}.npz") if kept is None else kept["classes"]) / 2
    return Pictures(image, truth > darkest, prediction > darkest)


# ---- curves


@dataclass(frozen=True)
class Curve:
    """One run's training: arrays of equal length for the loss, and for the quality (Dice) on the validation slides.

    `val_tflop` is the arithmetic until each evaluation, 10^12 FLOPs; None where the run did not count it.
    """

    step: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    val_step: np.ndarray
    val_seconds: np.ndarray
    val_dice: np.ndarray
    val_tflop: np.ndarray | None = None


def read_curve(files: RunFiles, quality: str = "dice") -> Curve | None:
    """Return the curves of a run, or None where it left no readable metrics.jsonl.

    Evaluations are logged by step alone. A line without a time gets one from the lines around it.

    Args:
        files: The run's files.
        quality: What `val_dice` shall hold: the values logged as `val_<quality>` (dice, auc, accuracy).
    """
    clock, work = [(0.0, 0.0)], [(0.0, 0.0)]
    train: list[tuple[float, float | None, float]] = []
    val: list[tuple[float, float | None, float]] = []
    for line in files.part("metrics") or ():
        step, now = _finite(line.get("step")), _finite(line.get("train_seconds"))
        if step is None:
            continue
        if now is not None and step > clock[-1][0]:
            clock.append((step, now))
        if (tflop := _finite(line.get("train_tflop"))) is not None and step > work[-1][0]:
            work.append((step, tflop))
        for values, name in ((train, "loss"), (val, f"val_{quality}")):
            if (value := _finite(line.get(name))) is not None:
                values.append((step, now, value))
    if not train and not val:
        return None
    steps, times = np.array(clock).T
    step, seconds, loss = _timed(train, steps, times)
    val_step, val_seconds, val_quality = _timed(val, steps, times)
    tflop = np.interp(val_step, *np.array(work).T) if len(work) > 1 else None
    return Curve(step, seconds, loss, val_step, val_seconds, val_quality, tflop)


def _timed(values: list[tuple[float, float | None, float]], steps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(3, n): step, seconds and value."""
    timed = [(s, np.interp(s, steps, times) if now is None else now, v) for s, now, v in values]
    return np.array(timed, dtype=float).reshape(-1, 3).T


def read_curves(row: Any, quality: str = "dice") -> list[Curve] | None:
    """Return the curves of all seeds of a row, or None where one left none."""
    found = [read_curve(run.files, quality) for run in row.runs]
    return None if None in found else [curve for curve in found if curve is not None]


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return float(value)


# ---- lengths of sequences


@dataclass(frozen=True)
class Lengths:
    """Tokens per slide of one folder of token files; `counts` is sorted. `source` says where the numbers are from."""

    label: str
    counts: np.ndarray
    source: str


def read_lengths(rows: list[Any]) -> list[Lengths]:
    """Return the token counts of each set of token files that the runs used, once each, in the order of the rows.

    Where the folder or its build_log.jsonl is gone, the record's mean number of tokens stands in, as one number.
    """
    found: dict[str, Lengths] = {}
    for row in rows:
        run = row.runs[0]
        name = f"{run.patching or '?'}, p={run.patch or '?'}"
        tokens = run.files.part("tokens")
        key = tokens["folder"] if tokens else f"record {run.data} {name} {run.tokens_per_image}"
        if key in found:
            continue
        if tokens:
            found[key] = Lengths(name, np.sort(np.array(tokens["counts"])), "build log")
        elif run.tokens_per_image:
            found[key] = Lengths(name, np.array([run.tokens_per_image]), "mean in the record")
    labels = [lengths.label for lengths in found.values()]
    return [
        Lengths(f"{x.label} ({Path(key).name})", x.counts, x.source) if labels.count(x.label) > 1 else x
        for key, x in found.items()
    ]
