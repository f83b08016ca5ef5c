"""Runs as jobs: each gets its run directory with job.sh and submission.json, which later commands go by.

No process of ours lives on: status and a second submission read those folders and ask the scheduler. Must not import
torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import write_atomic
from launch.config import ConfigError
from launch.images import open_files
from launch.jobs_table import JOBS, Job
from launch.record import now, read_record, to_json
from launch.render import DEFAULT_SITE, render
from launch.run import check_world
from launch.scheduler import ROOT, live_jobs, sbatch
from launch.sites import Site, load_site
from launch.sweep import Member

SUBMISSION = "submission.json"
# Of a run whose job has ended: what its record says, or missing when it left none.
STATES = ("pending", "running", "ok", "oom", "failed", "timeout", "preempted", "missing")


@dataclass(frozen=True)
class Options:
    """How jobs are submitted, besides what the site says.

    Attributes:
        account: sbatch -A.
        hours: Of each job; None: what the job table says, or 12.
        slides: Folder of slides, for the preparation of token files that are not there yet.
        masks: Folder of their masks.
        sbatch: More options of sbatch.
    """

    account: str | None = None
    hours: float | None = None
    slides: str | None = None
    masks: str | None = None
    sbatch: tuple[str, ...] = ()


@dataclass
class Plan:
    """What will be submitted: scripts by run directory, and the preparation jobs before them by data folder."""

    site: Site
    options: Options
    members: list[Member]
    scripts: dict[Path, str] = field(default_factory=dict)
    prep: dict[str, str] = field(default_factory=dict)


def _hours(member: Member, options: Options) -> float:
    job = JOBS.get(member.experiment.removesuffix("_uniform"))
    return options.hours or (job.hours if job else 12.0)


def _script(job: Job, site: Site, folder: Path) -> str:
    # Without a scheduler the script runs under bash, where its directives are comments.
    return render(job, site if site.slurm else load_site(DEFAULT_SITE), f"{folder.absolute()}/slurm/%j.out")


def make_plan(members: Sequence[Member], site: Site, options: Options) -> Plan:
    """Check every member and make its script; nothing is written or submitted.

    Raises:
        ConfigError: One member cannot run, is there already, or has no data and nothing to make it from; a site that
            needs an account got none.
    """
    if site.slurm is not None and site.slurm.account_required and not options.account:
        raise ConfigError(f"{site.name} needs an account: --account PROJECT{site.slurm.account_suffix}")
    plan = Plan(site, options, list(members))
    _refuse_duplicates(plan.members)
    for member in plan.members:
        check_world(member.config, member.gpus)
        if site.slurm is None and member.gpus > site.hardware.gpus_per_node:
            raise ConfigError(f"{member.gpus} ranks: {site.name} runs at most {site.hardware.gpus_per_node}")
        try:
            open_files(member.config.data)
        except ConfigError:
            if options.slides is None or member.config.data.kind == "images":
                raise
            plan.prep.setdefault(member.config.data.dir, _prep_script(member, site, options))
        job = Job(
            member.experiment, f"{member.run_dir.name}, submitted by `python -m launch submit`.", member.gpus,
            _hours(member, options), "train", member.experiment, member.experiment, member.overrides,
        )  # fmt: skip
        plan.scripts[member.run_dir] = _script(job, site, member.run_dir)
    return plan


def _prep_folder(member: Member) -> Path:
    return Path(member.config.run_root) / "prep" / Path(member.config.data.dir).name


def _prep_script(member: Member, site: Site, options: Options) -> str:
    words = ["--slides", str(options.slides), *(["--masks", options.masks] if options.masks else [])]
    data = [word for word in member.overrides if word.startswith("data.")]
    job = Job(
        f"prep_{Path(member.config.data.dir).name}", f"Token files for {member.experiment}.",
        site.hardware.gpus_per_node, 12.0, "prep", member.experiment, member.experiment, (*words, *data),
    )  # fmt: skip
    return _script(job, site, _prep_folder(member))


def _refuse_duplicates(members: Sequence[Member]) -> None:
    there = {member.run_dir: submission for member in members if (submission := read_submission(member.run_dir))}
    live = live_jobs([str(submission["job"]) for submission in there.values()])
    for member in members:
        record = read_record(member.run_dir)
        if record is not None and record["status"] == "ok" and not member.config.force:
            raise ConfigError(f"{member.run_dir} is finished; exclude it, or set force=true to train anew")
        submission = there.get(member.run_dir)
        if submission and str(submission["job"]) in live:
            state = live[str(submission["job"])].lower()
            raise ConfigError(f"{member.run_dir} is job {submission['job']} already ({state}); exclude it or scancel")


def submit(plan: Plan) -> list[str]:
    """Write the run directories and submit, preparation first; one line per job.

    Raises:
        ConfigError: sbatch refuses a job; those before it are submitted.
    """
    lines: list[str] = []
    prepared: dict[str, str] = {}
    for member in plan.members:
        wait_for = ""
        data = member.config.data.dir
        if data in plan.prep:
            if data not in prepared:
                folder = _prep_folder(member)
                prepared[data] = _start(folder, plan.prep[data], plan, "", member.gpus)
                lines.append(f"{prepared[data]:>9}  prep {data}")
            wait_for = prepared[data]
        number = _start(member.run_dir, plan.scripts[member.run_dir], plan, wait_for, member.gpus)
        about = {
            "schema_version": 1, "experiment": member.experiment, "overrides": list(member.overrides),
            "gpus": member.gpus, "site": plan.site.name, "job": number, "after": wait_for or None,
            "sbatch": _options(plan, wait_for), "submitted_at": now(), "earlier": [],
        }  # fmt: skip
        write_atomic(member.run_dir / SUBMISSION, to_json(about))
        lines.append(f"{number:>9}  {member.run_dir}")
    return lines


def _options(plan: Plan, wait_for: str) -> list[str]:
    options = [f"--account={plan.options.account}"] if plan.options.account else []
    if wait_for:
        options += [f"--dependency=afterok:{wait_for}", "--kill-on-invalid-dep=yes"]
    return [*options, *plan.options.sbatch]


def _start(folder: Path, script: str, plan: Plan, wait_for: str, gpus: int) -> str:
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    path = folder / "job.sh"
    write_atomic(path, script.encode())
    path.chmod(0o755)
    if plan.site.slurm is not None:
        return sbatch(path.absolute(), _options(plan, wait_for))
    return _run_here(path, gpus)


def _run_here(script: Path, gpus: int) -> str:
    """Without a scheduler: run it now, and wait. Its exit code is in its record; the others go on."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | {"RANKS": str(gpus)}
    done = subprocess.run(["bash", str(script.absolute())], cwd=ROOT, env=env, check=False)
    return "done" if done.returncode == 0 else f"exit {done.returncode}"


# -- later, in another shell ----------------------------------------------------------------------------------------


def read_submission(run_dir: Path) -> dict[str, Any] | None:
    """submission.json of a run directory, or None."""
    try:
        found = json.loads((run_dir / SUBMISSION).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "job" in found else None


def submitted_runs(root: Path) -> list[Path]:
    """All run directories under `root` that were submitted: ROOT/EXPERIMENT/RUN, and those of scaling studies."""
    found = [*root.glob(f"*/*/{SUBMISSION}"), *root.glob(f"scaling-*/*/*/{SUBMISSION}")]
    return sorted(path.parent for path in found)


def states(root: Path) -> list[tuple[Path, str, str]]:
    """(run directory, state, reason) of every submitted run under `root`; states are those of `STATES`."""
    runs = {run: submission for run in submitted_runs(root) if (submission := read_submission(run))}
    live = live_jobs([str(submission["job"]) for submission in runs.values()])
    rows = []
    for run, submission in runs.items():
        number = str(submission["job"])
        record = read_record(run)
        if number in live:
            state, reason = ("pending" if live[number] == "PENDING" else "running"), f"job {number}"
        elif record is None:
            state, reason = "missing", f"job {number} is gone and left no record"
        else:
            state, reason = str(record["status"]), str(record["reason"] or "")
        rows.append((run, state, reason))
    return rows


def submit_again(root: Path, wanted: Sequence[str]) -> list[str]:
    """Submit the runs under `root` that are in one of the `wanted` states once more, as they were; one line per job.

    Raises:
        ConfigError: Not a state, or sbatch refuses.
    """
    unknown = sorted(set(wanted) - set(STATES[2:]))
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: not a state of an ended run; valid: {', '.join(STATES[2:])}")
    lines = []
    for run, state, _ in states(root):
        if state not in wanted:
            continue
        submission = read_submission(run) or {}
        script = (run / "job.sh").absolute()
        if load_site(submission["site"]).slurm is None:
            number = _run_here(script, int(submission["gpus"]))
        else:  # what it waited for has ended
            number = sbatch(script, [word for word in submission["sbatch"] if not word.startswith("--dependency")])
        submission["earlier"] = [*submission["earlier"], submission["job"]]
        submission |= {"job": number, "submitted_at": now()}
        write_atomic(run / SUBMISSION, to_json(submission))
        lines.append(f"{number:>9}  {run}")
    return lines
