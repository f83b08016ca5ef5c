"""Asks SLURM, where there is one, to submit a script, and which jobs live."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.config.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


# Variables that would make jobs/body.sh do another run than the script says.
_CHOICES = ("EXPERIMENT", "PATCHING", "MODE", "RANKS")
_OF_SLURM_ITSELF = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")


def script_environment() -> dict[str, str]:
    """The environment for a submitted script: without choices of runs, and without variables of a job around us."""
    kept = {key: value for key, value in os.environ.items() if key not in _CHOICES}
    return {key: value for key, value in kept.items() if not key.startswith("SLURM_") or key in _OF_SLURM_ITSELF}


def has_slurm() -> bool:
    """Is there a sbatch to submit with?"""
    return shutil.which("sbatch") is not None


def slurm_answers() -> bool:
    """Is there a SLURM that answers? Its programs may be installed where no cluster is."""
    if not has_slurm():
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def sbatch(script: Path, options: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """Submit a script with its words from the repository's folder; returns the job's number.

    Raises:
        ConfigError: sbatch refuses it, in its own words.
    """
    command = ["sbatch", "--parsable", *options, str(script), *words]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=script_environment(), capture_output=True, text=True, timeout=300, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{script}: cannot be submitted: {error}") from None
    if done.returncode:
        raise ConfigError(f"{script}: sbatch refuses it: {'; '.join(done.stderr.split(chr(10))).strip('; ')}")
    return done.stdout.strip().split(";")[0]  # JOB, or JOB;CLUSTER


def live_jobs(numbers: Sequence[str]) -> dict[str, str]:
    """State (PENDING, RUNNING, ...) of our jobs that have not ended; an array goes by its first number.

    Raises:
        ConfigError: squeue does not answer, so nothing is known.
    """
    numbers = [number for number in numbers if number.isdigit()]  # others were done without a scheduler
    if not numbers or not has_slurm():
        return {}
    command = ["squeue", "--me", "--noheader", "--format=%F %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"squeue does not answer, so nothing is known of {len(numbers)} jobs: {error}") from None
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        number, _, state = line.strip().partition(" ")
        if number in numbers and (number not in found or state == "RUNNING"):
            found[number] = state
    return found
