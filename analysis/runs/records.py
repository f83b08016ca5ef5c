"""Find and check the records of runs; what cannot be used is listed as a problem (no torch, no matplotlib)."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from launch.records.record import SCHEMA_VERSION, STATUSES

RECORD = "record.json"
KEPT = ".record.json"  # how a record is called that was kept without its run
_PRUNED = {".git", "__pycache__"}
_REQUIRED = ("run_id", "experiment", "status")


class RunsError(ValueError):
    """RUNS cannot be read at all; `exit_code` is 64 for a wrong argument and 1 for a folder without records."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Problem:
    """One record, or one field of a record, that the tables leave out, and why."""

    path: Path
    kind: str
    reason: str


def _is(kind: str) -> Any:
    """Return a dataclass field that is None unless the record has a value of this kind."""
    return field(default=None, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One record.json (schema 1) and the folder it lies in. None means: not measured, or not written."""

    folder: Path
    run_id: str
    experiment: str
    status: str
    reason: str | None = _is("text")
    model: str | None = _is("text")
    decoder: str | None = _is("text")
    patching: str | None = _is("text")
    resolution: int | None = _is("count")  # side of the frame, px
    patch: int | None = _is("count")  # smallest patch p, px
    length: int | None = _is("count")  # L, slots of the sequence
    tokens_per_image: float | None = _is("number")  # mean number of tokens really used
    parameters: int | None = _is("count")
    gpus: int | None = _is("count")
    nodes: int | None = _is("count")
    device: str | None = _is("text")
    device_name: str | None = _is("text")
    engine: str | None = _is("text")
    precision: str | None = _is("text")
    attention_backend: str | None = _is("text")
    optimiser: str | None = _is("text")
    seed: int | None = _is("count")
    steps: int | None = _is("count")
    epochs: float | None = _is("number")
    global_batch: int | None = _is("count")
    train_seconds: float | None = _is("number")
    train_tflop: float | None = _is("number")  # 10^12 FLOPs of all ranks' steps, two for each multiply-accumulate
    seconds_per_image: float | None = _is("number")
    images_per_s: float | None = _is("number")
    samples_per_image: float | None = _is("number")  # crops that have the area of one frame; 1 without crops
    timed_steps: int | None = _is("count")
    warmup_rule: str | None = _is("text")
    preprocessing_seconds: float | None = _is("number")
    dice: float | None = _is("fraction")
    dice_pooled: float | None = _is("fraction")
    dice_ceiling: float | None = _is("fraction")
    dice_per_slide: Mapping[str, float] = field(default_factory=dict, metadata={"kind": "fractions"})
    dice_val: float | None = _is("fraction")
    floors: Mapping[str, float] = field(default_factory=dict, metadata={"kind": "fractions"})
    task: str | None = _is("text")  # segmentation or classification; records before it was written have none
    accuracy: float | None = _is("fraction")
    auc: float | None = _is("fraction")
    accuracy_by_size: Mapping[str, float] = field(default_factory=dict, metadata={"kind": "fractions"})  # side, px
    score_val: float | None = _is("fraction")  # what the best checkpoint was chosen by: val Dice, AUC or accuracy
    n_train: int | None = _is("count")
    n_test: int | None = _is("count")
    peak_memory_gib: float | None = _is("number")
    memory_source: str | None = _is("text")
    mfu: float | None = _is("number")
    loss_final: float | None = _is("signed")
    data: str | None = _is("text")
    split_sha256: str | None = _is("text")
    config_sha256: str | None = _is("text")
    commit: str | None = _is("text")
    starts: int | None = _is("count")
    started_at: str | None = _is("text")
    finished_at: str | None = _is("text")


_KINDS = {f.name: f.metadata["kind"] for f in fields(Run) if "kind" in f.metadata}


@dataclass(frozen=True)
class Runs:
    """What a folder of runs holds: the usable runs in a fixed order, and everything else."""

    root: Path
    ok: list[Run]
    problems: list[Problem]


def load(root: Path) -> Runs:
    """Read every record.json under a folder, and every kept record NAME.record.json outside of run folders.

    Args:
        root: a folder of run folders at any depth, or one run folder.

    Returns:
        Runs, sorted by experiment, run id and path, whatever the order on disk.

    Raises:
        RunsError: the folder is missing or is no folder (64), or there is no record in it (1).
    """
    if not root.is_dir():
        raise RunsError(f"{root}: {'not a folder' if root.exists() else 'no such folder'} (give a folder of runs)", 64)
    runs: list[Run] = []
    problems: list[Problem] = []
    found = 0
    for folder, has_record in _run_folders(root, problems):
        found += 1
        if has_record:
            run = _read(folder, problems, folder if folder.name.endswith(KEPT) else None)
            if run is not None:
                runs.append(run)
        else:
            problems.append(Problem(folder, "unfinished", "a run folder without record.json: still running, or killed"))
    if not found:
        raise RunsError(f"{root}: no record.json in this folder or below it (train something first)", 1)
    runs = _without_duplicates(runs, problems)
    usable = []
    for run in runs:
        if run.status == "ok":
            usable.append(run)
        else:
            problems.append(Problem(run.folder, run.status, run.reason or "no reason given"))
    usable.sort(key=lambda r: (r.experiment, r.run_id, r.folder.as_posix()))
    problems.sort(key=lambda p: (p.kind, p.path.as_posix(), p.reason))
    return Runs(root, usable, problems)


def load_run(path: Path) -> Run:
    """Read one finished run.

    Args:
        path: A record file of any name. What lies beside it belongs to the run only if it is called record.json.

    Raises:
        RunsError: no such file (64), a record that cannot be used, or a run that did not finish (1).
    """
    if not path.is_file():
        raise RunsError(f"{path}: no such record (give a run folder or a record.json)", 64)
    problems: list[Problem] = []
    run = _read(path.parent if path.name == RECORD else path, problems, path)
    if run is None:
        raise RunsError(f"{path}: {problems[0].reason}", 1)
    if run.status != "ok":
        raise RunsError(f"{path}: status is {run.status} ({run.reason or 'no reason given'}), not ok", 1)
    return run


def _run_folders(root: Path, problems: list[Problem]) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, has a record) for every run folder, without walking into what a run keeps inside.

    A kept record stands for a folder of its own name, which does not exist: nothing beside it belongs to it. Links to
    folders are followed, as runs often lie on another file system; a folder that was seen, as by a link to one above,
    is passed by.
    """
    seen: set[tuple[int, int]] = set()

    def note(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), "unreadable", error.strerror or str(error)))

    for here, folders, files in os.walk(root, onerror=note, followlinks=True):
        try:
            found = Path(here).stat()
        except OSError as error:  # removed since it was listed
            note(error)
            continue
        if (found.st_dev, found.st_ino) in seen:
            folders[:] = []
            continue
        seen.add((found.st_dev, found.st_ino))
        links = {name for name in folders if (Path(here) / name).is_symlink()}
        folders[:] = [*sorted(set(folders) - links), *sorted(links)]
        if RECORD in files or "config.yaml" in files or "metrics.jsonl" in files:
            yield Path(here), RECORD in files
            folders[:] = []
        else:
            folders[:] = [name for name in folders if name not in _PRUNED]
            yield from ((Path(here) / name, True) for name in files if name.endswith(KEPT))


def _read(folder: Path, problems: list[Problem], path: Path | None = None) -> Run | None:
    """Return the checked record of a folder; a record that cannot be used is noted and gives None."""
    try:
        raw = json.loads((path or folder / RECORD).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        problems.append(Problem(folder, "unreadable", error.strerror or str(error)))
        return None
    except (ValueError, RecursionError) as error:
        problems.append(Problem(folder, "broken", f"the record is not whole JSON ({_one_line(error)})"))
        return None
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        older = isinstance(version, int) and version < SCHEMA_VERSION
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        kind = "older-schema" if older else "newer-schema" if newer else "broken"
        problems.append(Problem(folder, kind, f"schema_version is {version!r}, these tables read {SCHEMA_VERSION}"))
        return None
    try:
        return _checked(folder, raw, problems)
    except ValueError as error:
        problems.append(Problem(folder, "broken", str(error)))
        return None


def _checked(folder: Path, raw: dict[str, Any], problems: list[Problem]) -> Run:
    """Return the record as a Run.

    Raises:
        ValueError: a required key is missing, or a value has the wrong type or range; the message names the key.
    """
    for key in _REQUIRED:
        if not isinstance(raw.get(key), str) or not raw[key]:
            raise ValueError(f"{key} is missing or not text")
    if raw["status"] not in STATUSES:
        raise ValueError(f"status is {raw['status']!r}, known are {', '.join(STATUSES)}")
    values: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        value = _plain(raw.get(key), kind)
        if kind == "fractions":
            values[key] = {
                name: number
                for name, v in _mapping(key, value).items()
                if (number := _number(f"{key}[{name}]", v, "fraction", folder, problems)) is not None
            }
        elif value is None:
            values[key] = None
        elif kind == "text":
            values[key] = value
        else:
            values[key] = _number(key, value, kind, folder, problems)
    return Run(folder=folder, **{key: raw[key] for key in _REQUIRED}, **values)


def _plain(value: Any, kind: str) -> Any:
    """Return nested values of text fields (an optimiser with its settings) as one line of JSON with sorted keys."""
    if kind == "text" and value is not None and not isinstance(value, str):
        return json.dumps(value, sort_keys=True)
    return value


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r:.40}, not an object")
    return value


def _number(key: str, value: Any, kind: str, folder: Path, problems: list[Problem]) -> float | int | None:
    """Return a checked number. NaN and infinity are noted and become missing: the rest of the record still holds."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} is {value!r:.40}, not a number")
    if isinstance(value, int) and abs(value) >= 2**63:  # JSON has no limit, and a float cannot hold all of them
        raise ValueError(f"{key} is a whole number of {value.bit_length()} bits, out of range")
    if not math.isfinite(value):
        problems.append(Problem(folder, "missing number", f"{key} is {value}; shown as missing"))
        return None
    if kind != "signed" and value < 0:
        raise ValueError(f"{key} is {value}, negative")
    if kind == "fraction" and value > 1:
        raise ValueError(f"{key} is {value}, not between 0 and 1")
    if kind == "count":
        if value != int(value):
            raise ValueError(f"{key} is {value}, not a whole number")
        return int(value)
    return float(value)


def _without_duplicates(runs: list[Run], problems: list[Problem]) -> list[Run]:
    """Keep, of records with one experiment and run id, the one that finished last, and note the others.

    A run id names model, data, ranks and seed, but neither machine nor batch: the same run on other hardware, or of a
    strong and of a weak scaling study, is another run.
    """
    newest: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda r: (r.status == "ok", r.finished_at or "", r.folder.as_posix())):
        key = (run.experiment, run.run_id, run.device_name or run.device, run.nodes, run.global_batch)
        if key in newest:
            problems.append(
                Problem(newest[key].folder, "duplicate", f"same experiment and run id as {run.folder}, which is used")
            )
        newest[key] = run
    return list(newest.values())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
