"""`python -m launch each`: one command for each of many items."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.config.config import ConfigError
from launch.jobs.for_each import executor, fill, map_items
from launch.jobs.slurm import slurm_answers

HELP = "one command for each of many items, as SLURM jobs or here"
_DESCRIPTION = (
    "{} in the command becomes the item, {stem} its name without folder and suffix. Exit code 1 when "
    "some item failed. Example: python -m launch each 'python -m data_prep inspect {} --resolution 1024 --patch 16 "
    "--length 256 --out out/{stem}.png' slides/*.svs"
)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("command_text", metavar="COMMAND")
    parser.add_argument("items", metavar="ITEM", nargs="+")
    parser.add_argument("--jobs", type=int, help="jobs that share the items (default: SLURM 64, here one per core)")
    parser.add_argument("--minutes", type=int, default=60, help="time limit of a job")
    parser.add_argument("--cpus", type=int, default=1, help="cores of a job")
    parser.add_argument("--account", help="sbatch -A")
    parser.add_argument("--partition", help="sbatch -p")
    parser.add_argument("--folder", type=Path, default=Path("runs/each"), help="where jobs and their logs go")


def run(args: argparse.Namespace) -> int:
    """Run it: a line for every item that failed, then how many did."""
    fill(args.command_text, args.items[0])
    here = len(os.sched_getaffinity(0))
    if min(1 if args.jobs is None else args.jobs, args.minutes, args.cpus) < 1:
        raise ConfigError("--jobs, --minutes and --cpus must be at least 1")
    jobs = args.jobs or (64 if slurm_answers() else here)
    made = executor(args.folder, jobs, args.minutes, args.cpus, args.account, args.partition)
    outcomes = map_items(made, args.command_text, args.items, jobs)
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in failed:
        last = outcome.tail.splitlines()[-1] if outcome.tail else ""
        how = "lost" if outcome.code is None else f"exit {outcome.code}"
        print(f"error: {outcome.item}: {how}: {last}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} done; logs in {args.folder}")
    return 1 if failed else 0
