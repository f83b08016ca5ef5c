"""The run directory: may this run use it, is it finished, what is in it; rank 0 looks, all ranks hear the same.

Must not import torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_prep.system.files import remove_stale, write_atomic
from launch.config.config import Config, ConfigError, differing_keys
from launch.records.record import read_record

_OURS = ("config.yaml", "env.json", "metrics.jsonl", "record.json", "checkpoints", "predictions")
_LOCK = "lock"
_FORCED = "forced_by_job"  # number of the job that last replaced what was there
_LOCK_WAIT_S = 60.0
_held: dict[Path, int] = {}  # descriptors of locks; the kernel lets go of them when this process ends, however it ends


@dataclass(frozen=True)
class OpenedRun:
    """What rank 0 found: `finished` needs no work; `logs` is the folder of this start; `starts` counts it."""

    finished: bool
    logs: str
    starts: int


def open_run(run_dir: Path, config: Config) -> OpenedRun:
    """Make or reopen a run directory. Rank 0 only.

    With `force` everything that an earlier run wrote there goes, except its logs, once: a job that the scheduler
    restarts goes on where it was, as long as one of its lives came here.

    Raises:
        ConfigError: The directory belongs to a run with other settings, is in use, or cannot be written.
    """
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
    later_life = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    force = config.force and not (later_life and _was_here(run_dir, job))
    try:
        if run_dir.is_dir():
            _lock(run_dir)
        if force:
            for name in _OURS:
                _remove(run_dir / name)
        asked = config.model_dump(mode="json")
        if (run_dir / "config.yaml").exists():
            try:
                found = yaml.safe_load((run_dir / "config.yaml").read_text())
                differences = differing_keys(found, asked)
            except (yaml.YAMLError, AttributeError):
                differences = ["config.yaml cannot be read"]
            if differences:
                raise ConfigError(
                    f"{run_dir} holds a run with other settings ({'; '.join(differences)}); "
                    "give run_id=NAME for a new one or force=true to replace it"
                )
            record = read_record(run_dir)
            if record is not None and record["status"] == "ok":
                return OpenedRun(True, "", 0)
        run_dir.mkdir(parents=True, exist_ok=True)
        _lock(run_dir)
        for folder in (run_dir, run_dir / "predictions"):
            remove_stale(folder, [""])
        write_atomic(run_dir / "config.yaml", config.to_yaml().encode())
        _remove(run_dir / "record.json")
        if force:
            write_atomic(run_dir / _FORCED, job.encode())
        return OpenedRun(False, *_new_logs(run_dir / "logs"))
    except OSError as error:
        raise ConfigError(f"run_root={config.run_root}: {run_dir}: {error.strerror or error}") from None


def _was_here(run_dir: Path, job: str) -> bool:
    try:
        return (run_dir / _FORCED).read_text() == job
    except OSError:
        return False


def forced_at(run_dir: Path) -> float:
    """When a start with force=true last replaced what was there, in seconds since 1970; 0 when none did."""
    try:
        return (run_dir / _FORCED).stat().st_mtime
    except OSError:
        return 0.0


def _lock(run_dir: Path) -> None:
    """Keep other starts out of a run directory until this process ends; waits a little for one that is just ending.

    Raises:
        ConfigError: Another process is at work there.
    """
    if run_dir in _held:
        return
    handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    give_up_s = time.monotonic() + _LOCK_WAIT_S
    told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() > give_up_s:
                os.close(handle)
                raise ConfigError(f"{run_dir} is in use by {owner}; stop it or give run_id=NAME") from None
            if not told:
                print(f"{run_dir} is in use by {owner}; waiting for it to end", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        except OSError:  # a file system without locks (some parallel ones): go without
            break
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
    _held[run_dir] = handle


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new_logs(parent: Path) -> tuple[str, int]:
    """A new folder for this start, named by the job when there is one, and the number of starts so far."""
    parent.mkdir(exist_ok=True)
    earlier = sum(1 for path in parent.iterdir() if path.is_dir())
    job = os.environ.get("SLURM_JOB_ID", "local")
    folder = parent / f"{job}-{earlier + 1}"
    folder.mkdir(exist_ok=True)
    return str(folder), earlier + 1
