"""`python -m launch each`: one command for each of many items, as SLURM jobs or as processes here (submitit).

It is for work on one item: looks at slides, evaluation of runs, CPU benchmarks. Training goes through `submit`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.config import ConfigError
from launch.jobs.slurm import live_jobs, slurm_answers

_POLL_S = 1.0
# Looks for the answer of a job that squeue no longer lists: it may be a moment late.
_LOOKS = 5


@dataclass(frozen=True)
class ItemOutcome:
    """How the command of one item ended: its exit code, or None when its job ended without a word."""

    item: str
    code: int | None
    tail: str


def fill(command: str, item: str) -> list[str]:
    """The words of the command for one item.

    Raises:
        ConfigError: The command cannot be split into words, or names no item.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{command!r}: {error}") from None
    if not any("{}" in word or "{stem}" in word for word in words):
        raise ConfigError(f"{command!r} has neither {{}} nor {{stem}}: where does the item go?")
    return [word.replace("{}", item).replace("{stem}", Path(item).stem) for word in words]


def run_commands(items: Sequence[str], commands: Sequence[list[str]]) -> list[ItemOutcome]:
    """What a job does: run commands one after the other. A failed one does not stop the rest."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # `python` is the one that submitted
    found = []
    for item, words in zip(items, commands, strict=True):
        try:
            done = subprocess.run(
                words, env={**os.environ, "PATH": path}, capture_output=True, text=True, errors="replace", check=False
            )
            code, text = done.returncode, done.stdout + done.stderr
        except OSError as error:
            code, text = 127, f"{words[0]}: {error.strerror or error}"
        print(text, end="", flush=True)
        found.append(ItemOutcome(item, code, text.strip()[-500:]))
    return found


def executor(folder: Path, jobs: int, minutes: int, cpus: int, account: str | None, partition: str | None) -> Any:
    """submitit's executor: SLURM where one answers, else processes of this machine.

    Raises:
        ConfigError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("launch each needs submitit: install the extra `slurm`") from None
    # submitit would choose SLURM wherever there is a srun, even if no cluster answers.
    made = submitit.AutoExecutor(folder=folder / "%j", cluster="slurm" if slurm_answers() else "local")
    made.update_parameters(timeout_min=minutes, cpus_per_task=cpus, slurm_array_parallelism=jobs, slurm_job_name="each")
    if partition:
        made.update_parameters(slurm_partition=partition)
    if account:
        made.update_parameters(slurm_additional_parameters={"account": account})
    return made


def map_items(made: Any, command: str, items: Sequence[str], jobs: int) -> list[ItemOutcome]:
    """Run the command for every item in at most `jobs` jobs; outcomes in the order of the items."""
    words = [fill(command, item) for item in items]
    parts = [range(i, len(items), jobs) for i in range(min(jobs, len(items)))]
    submitted = made.map_array(
        run_commands, [[items[i] for i in part] for part in parts], [[words[i] for i in part] for part in parts]
    )
    found: dict[int, ItemOutcome] = {}
    for part, answer in zip(parts, _answers(submitted), strict=True):
        for place, index in enumerate(part):
            found[index] = (
                answer[place] if answer else ItemOutcome(items[index], None, "its job ended without an answer")
            )
    return [found[index] for index in range(len(items))]


def _answers(submitted: Sequence[Any]) -> list[list[ItemOutcome] | None]:
    """What each job returned; None for a job that was cancelled or lost its node.

    Without accounting submitit would wait for such a job for ever, so we ask squeue.
    """
    answers: list[list[ItemOutcome] | None] = []
    for job in submitted:
        looks = 0
        while not job.paths.result_pickle.exists() and looks < _LOOKS:
            looks = looks + 1 if not _alive(job) else 0
            time.sleep(_POLL_S)
        try:
            answers.append(job.result() if job.paths.result_pickle.exists() else None)
        except Exception as error:
            print(f"job {job.job_id}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            answers.append(None)
    return answers


def _alive(job: Any) -> bool:
    process = getattr(job, "_process", None)  # of submitit's local executor
    if process is not None:
        return bool(process.poll() is None)
    number = str(job.job_id).partition("_")[0]
    return number in live_jobs([number])
