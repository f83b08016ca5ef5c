"""Submits runs as jobs: each run directory gets job.sh and submission.json.

No process of ours stays: `status` and a second submission read these files and ask the scheduler.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from data_prep.system.files import write_atomic
from data_prep.token_files.token_file import StoreError, token_names
from launch.config.config import ConfigError
from launch.config.sites import Site, load_site
from launch.data.pictures import open_files
from launch.data.token_files import check_variants
from launch.jobs.body_steps import prep_arguments
from launch.jobs.render import DEFAULT_SITE, limited_hours, render, shape
from launch.jobs.slurm import ROOT, live_jobs, sbatch, script_environment
from launch.jobs.sweep import Member
from launch.jobs.table import JOBS, Job
from launch.records.record import now, read_record, to_json
from launch.records.run_dir import forced_at
from launch.train.checks import check_model, check_world

SUBMISSION = "submission.json"
# Without a scheduler these, or `exit N`, stand in place of a job's number.
DONE, NOT_RUN = "done", "not run"
# States of a run. When its job has ended, the record says which; `missing`: there is no record.
STATES = ("pending", "running", "ok", "oom", "failed", "timeout", "preempted", "missing")


@dataclass(frozen=True)
class SubmitOptions:
    """How jobs are submitted, besides what the site says.

    Attributes:
        account: sbatch -A.
        hours: Time limit of each job; None: as the job table says, or 12.
        slides: Folder of slides, to make missing token files from.
        masks: Folder of the slides' masks.
        mask_kind: Which mask counts where a slide has both, whole and viable tumour (PAIP).
        fov: Folder of the fields of view, for experiments with data.fov=true.
        sbatch: More options of sbatch.
    """

    account: str | None = None
    hours: float | None = None
    slides: str | None = None
    masks: str | None = None
    mask_kind: str | None = None
    fov: str | None = None
    sbatch: tuple[str, ...] = ()


@dataclass
class SubmitPlan:
    """What will be submitted: scripts by run directory, and the preparation jobs before them by data folder.

    `files` has, by data folder, the run that asked for it first, and for which token files.
    """

    site: Site
    options: SubmitOptions
    members: list[Member]
    scripts: dict[Path, str] = field(default_factory=dict)
    prep: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[Path, list[str]]] = field(default_factory=dict)


def _hours(member: Member, options: SubmitOptions) -> float:
    job = JOBS.get(member.experiment.removesuffix("_uniform"))
    return options.hours or (job.hours if job else 12.0)


def _script(job: Job, site: Site, folder: Path) -> str:
    # Without a scheduler the script runs under bash, where its directives are comments.
    return render(job, site if site.slurm else load_site(DEFAULT_SITE), f"{folder.absolute()}/slurm/%j.out")


def make_plan(members: Sequence[Member], site: Site, options: SubmitOptions) -> SubmitPlan:
    """Check every member and make its script; nothing is written or submitted.

    Raises:
        ConfigError: A member cannot run, is there already, or has no data and no slides; or the account is missing.
    """
    # Do the options go together?
    if site.slurm is not None and site.slurm.account_required and not options.account:
        raise ConfigError(f"{site.name} needs an account: --account PROJECT{site.slurm.account_suffix}")
    for option, folder in (("--slides", options.slides), ("--masks", options.masks), ("--fov", options.fov)):
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{option} {folder}: no such folder")
    if options.mask_kind is not None and options.masks is None:
        raise ConfigError(f"--mask-kind {options.mask_kind}: only with --masks")
    if options.fov is not None and options.slides is None:
        raise ConfigError(f"--fov {options.fov}: only with --slides")
    if options.fov is not None and not any(member.config.data.fov for member in members):
        raise ConfigError(f"--fov {options.fov}: none of these runs has data.fov=true")
    # Each member: can it run, has it data, and its script.
    plan = SubmitPlan(site, options, list(members))
    _refuse_duplicates(plan.members)
    for member in plan.members:
        check_world(member.config, member.gpus)
        if site.slurm is None and member.gpus > site.hardware.gpus_per_node:
            raise ConfigError(f"{member.gpus} ranks: {site.name} runs at most {site.hardware.gpus_per_node}")
        if options.slides is not None and _unprepared(member, Path(options.slides)):
            check_variants(member.config.data, ())  # the job prepares data.dir alone
            _plan_prep(plan, member)
        else:
            open_files(member.config.data)
        name, text = member.experiment, f"{member.run_dir.name}, submitted by `python -m launch submit`."
        job = Job(name, text, member.gpus, _hours(member, options), uniform=name, overrides=member.overrides)
        plan.scripts[member.run_dir] = _script(job, site, member.run_dir)
    _check_models(plan.members)
    return plan


def _check_models(members: Sequence[Member]) -> None:
    """Refuse models now that every rank would refuse after its wait in the queue.

    Without torch, as on some login nodes, nothing is checked. Weights to start from are left to the ranks, since
    another job may still be making them.
    """
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return
    seen = set()
    for member in members:
        train = member.config.train.model_copy(update={"init_from": None})
        config = member.config.model_copy(update={"train": train})
        shapes = config.model_dump_json(include={"model": True, "data": True, "eval": {"sizes"}})
        if shapes in seen:
            continue
        seen.add(shapes)
        try:
            check_model(config)
        except ImportError:  # the ranks have another version of torch
            return
        except ConfigError as error:
            raise ConfigError(f"{member.run_dir}: {error}") from None


def _unprepared(member: Member, slides: Path) -> bool:
    """Does a file of the slides' folder lack its token file? Files that are no slides only cost a look."""
    data = member.config.data
    if data.kind == "images":
        return False
    try:
        there = set(token_names(Path(data.dir)))
    except StoreError as error:
        raise ConfigError(f"data.dir={data.dir}: {error}") from None
    return bool({path.stem for path in slides.iterdir() if not path.name.startswith(".")} - there)


def _prep_folder(member: Member) -> Path:
    # Folders of two experiments may have the same last name.
    folder = member.config.data.dir
    name = re.sub(r"[^A-Za-z0-9.]+", "_", Path(folder).name)
    return Path(member.config.run_root) / "prep" / f"{name}_{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


def _plan_prep(plan: SubmitPlan, member: Member) -> None:
    """The job that makes the member's token files, once per folder."""
    options, folder = plan.options, member.config.data.dir
    words = ["--slides", str(options.slides), *(["--masks", options.masks] if options.masks else [])]
    more = ["--mask-kind", options.mask_kind] if options.mask_kind else []
    more += ["--fov", options.fov] if options.fov and member.config.data.fov else []
    more += [word for word in member.overrides if word.startswith("data.")]
    # Refuse now what the job would refuse.
    files = prep_arguments(member.experiment, str(options.slides), options.masks, more)
    first, others = plan.files.setdefault(folder, (member.run_dir, files))
    if others != files:
        raise ConfigError(
            f"{first} and {member.run_dir} want different token files in the same {folder}; "
            "give each its data.dir, e.g. --zip --vary data.length=256,512 --vary data.dir=tokens/256,tokens/512"
        )
    if folder not in plan.prep:
        name, text, gpus = member.experiment, f"Token files for {member.experiment}.", plan.site.hardware.gpus_per_node
        job = Job(f"prep_{Path(folder).name}", text, gpus, 12.0, "prep", name, name, (*words, *more))
        plan.prep[folder] = _script(job, plan.site, _prep_folder(member))


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


def describe(plan: SubmitPlan) -> Iterator[str]:
    """What would be submitted, one line per job, and a sum."""
    for data in plan.prep:
        yield f"     prep  {data}"
    for member in plan.members:
        place = shape(member.gpus, plan.site)
        hours = limited_hours(_hours(member, plan.options), place, plan.site.slurm)
        limit = f", {hours:g} h" if plan.site.slurm else ""
        yield f"{member.gpus:>4} gpus  {place.nodes} x {place.tasks_per_node}{limit}  {member.run_dir}"
    how = " ".join(["sbatch", *_options(plan, "")]) if plan.site.slurm else "here, one after the other"
    yield f"{len(plan.members)} runs on {plan.site.name} ({how}); a dry run, nothing was written"


def submit(plan: SubmitPlan) -> Iterator[tuple[str, str]]:
    """Write the run directories and submit, preparation first.

    Yields:
        As soon as it is known: number of a job and what it is. Without a scheduler each is over by then, and instead of
        the number stands done, exit N, or not run, when its preparation failed.

    Raises:
        ConfigError: sbatch refuses a job; those before it are submitted.
    """
    prepared: dict[str, str] = {}
    for member in plan.members:
        wait_for = ""
        data = member.config.data.dir
        if data in plan.prep:
            if data not in prepared:
                folder = _prep_folder(member)
                prepared[data] = _start(folder, plan.prep[data], plan, "", member.gpus)
                yield prepared[data], f"prep {data}"
            wait_for = prepared[data]
            if plan.site.slurm is None and wait_for != DONE:
                yield NOT_RUN, f"{member.run_dir}, since prep {data} failed"
                continue
        number = _start(member.run_dir, plan.scripts[member.run_dir], plan, wait_for, member.gpus)
        about = {
            "schema_version": 1,
            "experiment": member.experiment,
            "overrides": list(member.overrides),
            "gpus": member.gpus,
            "site": plan.site.name,
            "job": number,
            "after": wait_for or None,
            "prep": str(_prep_folder(member)) if wait_for else None,
            "sbatch": _options(plan, wait_for),
            "first_submitted_at": now(),
            "submitted_at": now(),
            "earlier": [],
        }
        write_atomic(member.run_dir / SUBMISSION, to_json(about))
        yield number, str(member.run_dir)


def _options(plan: SubmitPlan, wait_for: str) -> list[str]:
    options = [f"--account={plan.options.account}"] if plan.options.account else []
    return [*options, *_after(wait_for), *plan.options.sbatch]


def _after(job: str) -> list[str]:
    return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] if job else []


def _start(folder: Path, script: str, plan: SubmitPlan, wait_for: str, gpus: int) -> str:
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "job.sh", script.encode())
    (folder / "job.sh").chmod(0o755)
    return _start_again(folder, _options(plan, wait_for), plan.site.slurm is not None, gpus)


def _start_again(folder: Path, options: Sequence[str], with_slurm: bool, gpus: int, words: Sequence[str] = ()) -> str:
    """Submit the script of a folder; without a scheduler, run it now and wait."""
    script = (folder / "job.sh").absolute()
    if with_slurm:
        return sbatch(script, options, words)
    env = script_environment() | {"RANKS": str(gpus)}
    done = subprocess.run(["bash", str(script), *words], cwd=ROOT, env=env, check=False)
    return DONE if done.returncode == 0 else f"exit {done.returncode}"


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


def submit_again(
    root: Path, wanted: Sequence[str], options: Sequence[str] = (), dry_run: bool = False
) -> Iterator[tuple[str, str]]:
    """Submit the runs under `root` that are in one of the `wanted` states once more, as they were.

    Nodes that the runs' preflights found bad are excluded. A `missing` run that waited for token files gets its
    preparation again, which skips what is there. `options` follow the first submission's options of sbatch.

    Yields:
        Job and what it is, as `submit` does; in a dry run the state instead of the job.

    Raises:
        ConfigError: Not a state, or sbatch refuses.
    """
    # Which runs, and without which nodes?
    unknown = sorted(set(wanted) - set(STATES[2:]))
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: not a state of an ended run; valid: {', '.join(STATES[2:])}")
    chosen = [(run, state) for run, state, _ in states(root) if state in wanted]
    bad = sorted({name for run, _ in chosen for name in bad_nodes(run)})
    if bad:
        yield "without", ",".join(bad)
    prepared: dict[str, str] = {}
    for run, state in chosen:
        if dry_run:
            yield state, str(run)
            continue
        # Options as the first time, without what the run waited for then.
        submission = read_submission(run) or {}
        words = [word for word in submission["sbatch"] if not word.startswith(_ONCE)]
        words += [*options, *([f"--exclude={','.join(bad)}"] if bad else [])]
        prep, wait_for, gpus = submission.get("prep"), "", int(submission["gpus"])
        with_slurm = str(submission["job"]).isdigit()
        # Token files first, where they may be missing.
        if prep and state == "missing":
            if prep not in prepared:
                prepared[prep] = _start_again(Path(prep), words, with_slurm, gpus)
                yield prepared[prep], f"prep {prep}"
            wait_for = prepared[prep]
            if not with_slurm and wait_for != DONE:
                yield NOT_RUN, f"{run}, since prep {prep} failed"
                continue
        # A run that already began anew (force=true) since its first submission has to go on.
        first = submission.get("first_submitted_at")
        begun = first and forced_at(run) >= datetime.fromisoformat(first).timestamp()
        settings = ["force=false"] if begun else []
        number = _start_again(run, [*words, *_after(wait_for)], with_slurm, gpus, settings)
        submission["earlier"] = [*submission["earlier"], submission["job"]]
        submission |= {"job": number, "after": wait_for or None, "submitted_at": now()}
        write_atomic(run / SUBMISSION, to_json(submission))
        yield number, str(run)


# Options of a submission that say what it waits for.
_ONCE = ("--dependency=afterok:", "--kill-on-invalid-dep")


def bad_nodes(run_dir: Path) -> list[str]:
    """Nodes that a preflight of this run found bad (RUN/slurm/*.bad_nodes, one name a line)."""
    return [name for path in sorted((run_dir / "slurm").glob("*.bad_nodes")) for name in path.read_text().split()]
