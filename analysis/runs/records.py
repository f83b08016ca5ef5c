"""Find and check the records of runs: one frame, and a list of what cannot be used."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from pydantic import ValidationError

from analysis.runs.run_files import RunFiles
from launch.records.record import SCHEMA_VERSION, Record, first_fault

RECORD = "record.json"
_PRUNED = {".git", "__pycache__"}
Row = Any  # a row of a frame as `rows_of` gives it


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


@dataclass(frozen=True)
class Found:
    """A run folder, or a run of a collected study: its files, and its record as JSON has it or why there is none."""

    files: RunFiles
    raw: dict[str, Any] | None
    problem: Problem | None = None


@dataclass(frozen=True)
class Runs:
    """What a folder of runs holds: the finished runs in a fixed order, and everything else.

    `ok` has a row per run: the fields of `Record` with the types they have there, `folder` and `files`.
    """

    root: Path
    ok: pd.DataFrame
    problems: list[Problem]


def load(root: Path) -> Runs:
    """Read every run under a folder, or of a collected study.

    Args:
        root: A folder of run folders and collected studies at any depth; one run folder; a collected study
            (NAME.jsonl); or runs inside of one (NAME.jsonl/FOLDER).

    Returns:
        Runs, sorted by experiment, run id and path, whatever the order on disk.

    Raises:
        RunsError: There is nothing of that kind (64), no record in it, or a study that is damaged (1).
    """
    problems: list[Problem] = []
    found = list(find(root, problems))
    if not found:
        raise RunsError(f"{root}: no {RECORD} in this folder or below it (train something first)", 1)
    checked = [(entry.files, _checked(entry, problems)) for entry in found]
    frame = frame_of([vars(r) | {"folder": files.folder, "files": files} for files, r in checked if r is not None])
    usable = _finished(_without_duplicates(frame, problems), problems)
    problems.sort(key=lambda p: (p.kind, p.path.as_posix(), p.reason))
    return Runs(root, usable, problems)


# ---- frames

_BESIDE = ("folder", "files")  # what a frame of runs has beside the fields of a record
_DTYPES = {int: "Int64", float: "float64"}


def _dtype(annotation: Any) -> str:
    """The column type of a field: whole numbers that may be missing, floats, or objects."""
    kinds = [getattr(kind, "__origin__", kind) for kind in get_args(annotation)]
    return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), "object")


DTYPES = {name: _dtype(field.annotation) for name, field in Record.model_fields.items()}


def frame_of(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a row per record, each with `folder` and `files`, with the types of `Record`."""
    columns = {name: [record[name] for record in records] for name in (*DTYPES, *_BESIDE)}
    return pd.DataFrame({k: pd.Series(v, dtype=DTYPES.get(k, "object")) for k, v in columns.items()})


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """Return the rows of a frame as named tuples, None where a value is missing."""
    plain = frame.astype(object)
    return list(plain.where(frame.notna(), None).itertuples(index=False, name="Row"))


def _without_duplicates(frame: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    """Keep, of records with one experiment and run id, the one that finished last, and note the others.

    A run id names model, data, ranks and seed, but neither machine nor batch. So the same id on other hardware, or with
    another batch, is another run.
    """
    paths = frame.folder.map(Path.as_posix)
    order = pd.DataFrame({"ok": frame.status == "ok", "finished": frame.finished_at.fillna(""), "path": paths})
    frame = frame.loc[order.sort_values(["ok", "finished", "path"]).index]
    machine = frame.device_name.where(frame.device_name.fillna("") != "", frame.device)
    key = frame[["experiment", "run_id", "nodes", "global_batch"]].assign(machine=machine)
    lost = key.duplicated(keep="last")
    used = frame.folder.groupby([key[name] for name in key], dropna=False).transform("last")
    problems += [
        Problem(path, "duplicate", f"same experiment and run id as {other}, which is used")
        for path, other in zip(frame.folder[lost], used[lost], strict=True)
    ]
    return frame[~lost]


def _finished(frame: pd.DataFrame, problems: list[Problem]) -> pd.DataFrame:
    done = frame.status == "ok"
    lost = frame[~done]
    reasons = lost.reason.fillna("").replace("", "no reason given")
    problems += map(Problem, lost.folder, lost.status, reasons)
    frame = frame[done]
    order = frame[["experiment", "run_id"]].assign(path=frame.folder.map(Path.as_posix))
    return frame.loc[order.sort_values([*order]).index].reset_index(drop=True)


# ---- finding


def find(root: Path, problems: list[Problem]) -> Iterator[Found]:
    """Yield every run folder under a folder, or every run of a collected study; what cannot be read is a problem.

    Raises:
        RunsError: See `load`.
    """
    if root.is_dir():
        for here, files in _walk(root, problems):
            if RECORD in files:
                yield _read(here)
            elif "config.yaml" in files or "metrics.jsonl" in files:
                reason = "a run folder without record.json: still running, or killed"
                yield Found(RunFiles(here), None, Problem(here, "unfinished", reason))
            else:
                for name in sorted(files):
                    if name.endswith(STUDY) and _is_study(here / name):
                        yield from _read_study(here / name)
        return
    study = next((path for path in (root, *root.parents) if path.suffix == STUDY and path.is_file()), None)
    if study is None:
        what = "not a folder" if root.exists() else "no such folder"
        raise RunsError(f"{root}: {what} (give a folder of runs, or a study that `collect` wrote)", 64)
    inside = [entry for entry in _read_study(study) if entry.files.folder.is_relative_to(root)]
    if not inside:
        raise RunsError(f"{root}: {study} has no run of that name", 64)
    yield from inside


def _walk(root: Path, problems: list[Problem]) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, names of its files), without walking into run folders.

    Links are followed, as runs often lie on another file system. A folder that was seen already is left out.
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
        folders[:] = [n for n in (*sorted(set(folders) - links), *sorted(links)) if n not in _PRUNED]
        if {RECORD, "config.yaml", "metrics.jsonl"} & set(files):
            folders[:] = []
        yield Path(here), files


def _read(folder: Path) -> Found:
    """One run folder with a record."""
    try:
        raw = json.loads((folder / RECORD).read_text())
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
    except OSError as error:
        return Found(RunFiles(folder), None, Problem(folder, "unreadable", error.strerror or str(error)))
    except (ValueError, RecursionError) as error:
        reason = f"the record is not whole JSON ({' '.join(str(error).split())[:120]})"
        return Found(RunFiles(folder), None, Problem(folder, "broken", reason))
    data = raw.get("data")
    return Found(RunFiles(folder, data if isinstance(data, str) else None), raw)


# ---- collected studies

STUDY = ".jsonl"
HEAD = '{"study": '  # how the first line of a collected study begins


def _is_study(path: Path) -> bool:
    """Whether a file in a folder of runs is a collected study; other JSON lines may lie there too."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(len(HEAD)) == HEAD
    except OSError:
        return False


def _read_study(path: Path) -> Iterator[Found]:
    """Yield the runs of a collected study.

    Raises:
        RunsError: A line that is damaged or of something else, or one that is missing; the message names file and line.
    """
    number, asked = 0, None
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                values = json.loads(line)
                if number == 1:
                    asked = _study_runs(values)
                else:
                    yield _study_run(path, values)
    except OSError as error:
        raise RunsError(f"{path}: {error.strerror or error}", 1) from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        number += isinstance(error, UnicodeDecodeError)
        raise RunsError(
            f"{path}:{number}: no line of a collected study ({' '.join(str(error).split())[:120]})", 1
        ) from None
    if asked is None or number != asked + 1:
        raise RunsError(f"{path}:{number + 1}: the file ends here, after {max(0, number - 1)} of {asked} runs", 1)


def _study_runs(values: Any) -> int:
    if not isinstance(values, dict) or "study" not in values or not isinstance(values.get("runs"), int):
        raise ValueError("the first line does not say which study it is, and of how many runs")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {values.get('schema_version')!r}, known is {SCHEMA_VERSION}")
    return int(values["runs"])


def _study_run(path: Path, values: Any) -> Found:
    if not isinstance(values, dict) or not isinstance(values.get("folder"), str):
        raise ValueError("no folder of a run")
    folder = path / values["folder"]
    files = RunFiles(folder, kept=values)
    if "problem" in values:
        return Found(files, None, Problem(folder, values["problem"]["kind"], values["problem"]["reason"]))
    if not isinstance(values.get("record"), dict):
        raise ValueError(f"{values['folder']} has neither a record nor a problem")
    return Found(files, values["record"])


# ---- checking


def _checked(entry: Found, problems: list[Problem]) -> Record | None:
    """Return the record of a run, None where it has none or a wrong one, which is noted.

    NaN and infinity are noted and become missing: the rest of the record still holds.
    """
    folder, raw = entry.files.folder, entry.raw
    if raw is None:
        problems += [entry.problem] if entry.problem else []
        return None
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        reason = f"schema_version is {version!r}, these tables read {SCHEMA_VERSION}"
        problems.append(Problem(folder, "newer-schema" if newer else "broken", reason))
        return None
    known: dict[str, Any] = {}
    for key, value in raw.items():
        known[key] = value
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(Problem(folder, "missing number", f"{key} is {value}; shown as missing"))
            known[key] = None
        elif isinstance(value, dict):
            lost = [k for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)]
            problems += [Problem(folder, "missing number", f"{key}[{k}] is {value[k]}; shown as missing") for k in lost]
            known[key] = {k: v for k, v in value.items() if k not in lost and v is not None}
    try:
        return Record.model_validate(known)
    except ValidationError as error:
        problems.append(Problem(folder, "broken", first_fault(error)))
        return None
