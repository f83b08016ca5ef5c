"""`python -m launch rescore RUN --at DIR`: a run's answers, scored on frames of another size."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.system.command_line import DONE, FAILED
from data_prep.system.files import write_atomic
from launch.config.config import Config, ConfigError
from launch.engines.ranks import find_ranks, pick_device
from launch.records.record import read_record, write_record
from launch.score.rescore import UnfinishedError, load_model, other_files, own_files, read_run, rescore, rescored_record

if TYPE_CHECKING:
    from launch.data.token_files import TokenFiles

HELP = "score finished runs on frames of another size"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
TOLERANCE = 0.002  # another device, or another number of threads, changes a few pixels
_DESCRIPTION = """\
Score finished runs on frames of another size, so that runs at different resolutions can be compared on the same pixels.
The weights by which the run was scored predict every test slide at the run's resolution. The logits are enlarged
bilinearly, or pooled, to the frame of the token files in --at. These have the same slides and masks, cut uniformly with
patches of full resolution:

  python -m data_prep build slides --masks masks --out tokens/4k --resolution 4096 --patch 256 --patching uniform
  python -m launch rescore runs/small/*/ --at tokens/4k --out runs/small_at_4k

Each run gets a folder in --out with a record.json for the tables of `python -m analysis`. The experiment's name ends
with _at_4096px (or is --name), `resolution` is the resolution scored at, times per image are null, the rest is the
run's own. Runs scored before are skipped. Runs that did not finish are left out with a note.

exit codes: 0 done, 1 some runs were left out, 64 nothing was scored, as an argument is wrong
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories")
    parser.add_argument("--at", metavar="DIR", type=Path, required=True, help="token files to score at")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the new records")
    parser.add_argument(
        "--name", metavar="EXPERIMENT", help="experiment of the new records (default: the run's with _at_NNNNpx)"
    )
    parser.add_argument("--tokens", metavar="DIR", help="the runs' own token files, where they were moved")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    parser.add_argument("--force", action="store_true", help="score again what has been scored")


def run(args: argparse.Namespace) -> int:
    """Check everything first, then score, write, and print one line for each run."""
    if find_ranks().world > 1:
        raise ConfigError("rescore runs as one process; start it without torchrun, mpiexec or srun -n")
    if args.name is not None and not _NAME.fullmatch(args.name):
        raise ConfigError(f"--name {args.name!r}: a name of letters, digits, _ . and -, not a path")
    tasks: list[_Rescoring] = []
    left_out: list[UnfinishedError] = []
    for run_dir in args.runs:
        try:
            tasks.append(_plan(run_dir, args))
        except UnfinishedError as error:
            left_out.append(error)
    if not tasks:
        raise left_out[0]
    for each in left_out:
        print(f"left out: {each}", file=sys.stderr)
    return max([_one(task, args) for task in tasks] + [FAILED if left_out else DONE])


@dataclass(frozen=True)
class _Rescoring:
    """A checked run: its folder, settings, record and files, the files to score at, the folder of the new record."""

    run_dir: Path
    config: Config
    record: dict[str, Any]
    own: TokenFiles
    other: TokenFiles
    folder: Path


def _plan(run_dir: Path, args: argparse.Namespace) -> _Rescoring:
    config, record = read_run(run_dir, args.tokens)
    own = own_files(config, record)
    other = other_files(config, own.split["test"], args.at)
    folder = args.out / (args.name or f"{config.experiment}_at_{other.config.resolution}px") / record["run_id"]
    if folder.resolve() == run_dir.resolve() or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder}: is a run itself; choose another --out")
    return _Rescoring(run_dir, config, record, own, other, folder)


def _one(task: _Rescoring, args: argparse.Namespace) -> int:
    from data_prep.token_files.token_file import StoreError

    # Score, unless that is done.
    run_dir, config, record, folder = task.run_dir, task.config, task.record, task.folder
    if not args.force and _is_there(folder, record, task.other):
        print(f"already scored: {folder / 'record.json'} (--force scores it again)", file=sys.stderr)
        return DONE
    device = pick_device(args.device, find_ranks())
    try:
        found = rescore(config, load_model(config, run_dir, device), task.own, task.other, device)
    except StoreError as error:
        raise ConfigError(str(error)) from None
    new = rescored_record(record, found, folder.parent.name, task.other)
    mine = sum(found.own.values()) / len(found.own)
    # Write the record, with what tables tell rows apart by.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kept in ("config.yaml", "env.json"):
            if (run_dir / kept).is_file():
                write_atomic(folder / kept, (run_dir / kept).read_bytes())
        write_record(folder, new)
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    if abs(mine - record["dice"]) > TOLERANCE:
        what = f"its own record has dice {record['dice']:.4f}, these weights {mine:.4f}"
        print(f"warning: {run_dir}: {what}", file=sys.stderr)
    print(
        f"{folder / 'record.json'}: dice {new['dice']:.4f} at {task.other.config.resolution:,} px, {mine:.4f} at its "
        f"own {config.data.resolution:,} px, {len(found.own)} test slides"
    )
    return DONE


def _is_there(folder: Path, record: dict[str, Any], other: TokenFiles) -> bool:
    """Whether this run has been scored there already.

    Raises:
        ConfigError: The record there is of another run, or of other pixels.
    """
    there = read_record(folder)
    if there is None:
        return False
    wanted = (record["config_sha256"], record["started_at"], other.config.resolution)
    if (there.get("config_sha256"), there.get("started_at"), there.get("resolution")) != wanted:
        why = "is of another run or resolution; give another --name or --out, or --force"
        raise ConfigError(f"{folder / 'record.json'}: {why}")
    return True
