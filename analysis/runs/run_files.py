"""Read what lies in a run folder beside its record: curves, tokens, pictures, versions (no torch, no matplotlib)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from analysis.runs.groups import Group
from analysis.runs.records import Run
from launch.records.record import read_metrics


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


def read_curve(run: Run, quality: str = "dice") -> Curve | None:
    """Return the curves of a run, or None where it left no readable metrics.jsonl.

    A line without a time takes the time that the lines around it give for its step: evaluations are logged by step
    alone, and training need not log every step.

    Args:
        run: The run.
        quality: What `val_dice` shall hold: the values logged as `val_<quality>` (dice, auc, accuracy).
    """
    try:
        lines = read_metrics(run.folder / "metrics.jsonl")
    except (OSError, ValueError):
        return None
    clock, work = [(0.0, 0.0)], [(0.0, 0.0)]
    train: list[tuple[float, float | None, float]] = []
    val: list[tuple[float, float | None, float]] = []
    for line in lines:
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
    arrays = []
    for values in (train, val):
        timed = [(s, np.interp(s, steps, times) if now is None else now, v) for s, now, v in values]
        arrays += list(np.array(timed, dtype=float).reshape(-1, 3).T)
    tflop = np.interp(arrays[3], *np.array(work).T) if len(work) > 1 else None
    return Curve(*arrays, tflop)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Lengths:
    """Tokens per slide of one folder of token files; `counts` is sorted. `source` says where the numbers are from."""

    label: str
    counts: np.ndarray
    source: str


def read_lengths(groups: list[Group]) -> list[Lengths]:
    """Return the token counts of each set of token files that the runs used, once each, in the order of the runs.

    Where the folder or its build_log.jsonl is gone, the record's mean number of tokens stands in, as one number.
    """
    found: dict[str, Lengths] = {}
    for group in groups:
        run = group.first
        name = f"{run.patching or '?'}, p={run.patch or '?'}"
        folder = find_data(run)
        counts = logged_tokens(folder) if folder else []
        key = str(folder.resolve()) if folder and counts else f"record {run.data} {name} {run.tokens_per_image}"
        if key in found:
            continue
        if counts:
            found[key] = Lengths(name, np.sort(np.array(counts)), "build log")
        elif run.tokens_per_image:
            found[key] = Lengths(name, np.array([run.tokens_per_image]), "mean in the record")
    return _distinct(list(found.items()))


def _distinct(found: list[tuple[str, Lengths]]) -> list[Lengths]:
    """Return the sets with the folder's name added to labels that two sets share."""
    labels = [lengths.label for _, lengths in found]
    return [
        Lengths(f"{lengths.label} ({Path(key).name})", lengths.counts, lengths.source)
        if labels.count(lengths.label) > 1
        else lengths
        for key, lengths in found
    ]


def find_data(run: Run) -> Path | None:
    """Return the folder of token files that a record names, also where the run was started from another folder."""
    if not run.data:
        return None
    named = Path(run.data)
    if named.is_absolute():
        return named if named.is_dir() else None
    for base in (Path(), *run.folder.resolve().parents):
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


@dataclass(frozen=True)
class Pictures:
    """One test slide as a run saw it: image (h, w, 3) uint8, truth and prediction (h, w) bool of the same size."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def picture_stems(run: Run) -> set[str]:
    """Return the names of the test slides of which a run left pictures."""
    return {p.name.removeprefix("pred_")[:-4] for p in (run.folder / "predictions").glob("pred_*.png")}


def read_pictures(run: Run, stem: str) -> Pictures | None:
    """Return the pictures of one test slide, or None where one is missing, unreadable or of another size.

    The trainer writes class k of K as gray 255 * k / K; foreground is what is nearer to a class than to zero.
    """
    from PIL import Image

    parts = []
    for name, mode in (("image", "RGB"), ("truth", "L"), ("pred", "L")):
        try:
            with Image.open(run.folder / "predictions" / f"{name}_{stem}.png") as file:
                parts.append(np.asarray(file.convert(mode)))
        except (OSError, ValueError):
            return None
    image, truth, prediction = parts
    if not image.shape[:2] == truth.shape == prediction.shape:
        return None
    darkest = 255 / _classes(run, stem) / 2
    return Pictures(image, truth > darkest, prediction > darkest)


def _classes(run: Run, stem: str) -> int:
    """Return the number of foreground classes of a slide's counts (K, 3); 1 where there are none."""
    try:
        with np.load(run.folder / "predictions" / f"{stem}.npz", allow_pickle=False) as counts:
            return max(1, counts["counts"].shape[0])
    except (OSError, ValueError, KeyError, IndexError, BadZipFile):
        return 1


def read_environment(run: Run) -> dict[str, Any]:
    """Return env.json, or nothing where it is missing or broken."""
    try:
        value = json.loads((run.folder / "env.json").read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
