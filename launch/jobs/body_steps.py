"""What jobs/body.sh asks of Python: where a run will live, how a job ended, how token files are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_prep.build.options import SETTINGS, words_of
from launch.config.config import Config, ConfigError
from launch.data.pictures import open_files
from launch.engines.ranks import EXIT_CONFIG
from launch.experiments.load import load
from launch.records.record import new_record, now, read_record, write_record
from launch.train.checks import check_world


def where(config: Config, ranks: int) -> Path:
    """The run directory of a configuration, once everything is checked that needs no reading of data.

    Raises:
        ConfigError: The batch does not fit the ranks, or there is no data.
    """
    check_world(config, ranks)
    open_files(config.data)
    return config.run_dir(ranks)


# Why the scheduler ended a job: status of the run, and the words for it.
_ENDS = {
    "CANCELLED": ("preempted", "was cancelled (scancel)"),
    "TIMEOUT": ("timeout", "reached its time limit"),
    "NODE_FAIL": ("failed", "lost a node"),
}
_LOG_END_BYTES = 65536


def record_end(
    run_dir: Path, job: str, state: str, code: int, log: Path | None = None, reason: str = ""
) -> dict[str, Any] | None:
    """Complete or write the record of a job that did not end well by itself.

    A record of the ranks stays; if the scheduler ended the job, its words come before their reason. Ranks that were
    killed, or found bad settings, wrote no record: the new one says how the job ended.

    Args:
        run_dir: The run directory.
        job: Number of the job.
        state: RUNNING, CANCELLED, TIMEOUT, NODE_FAIL or REQUEUED, as `job_state` of jobs/body.sh finds it.
        code: Exit code of the training step.
        log: What the job printed, with the line of bad settings.
        reason: Why the job ended, if its script knows. The scheduler's own reason comes first.

    Returns:
        The record, or None when there is nothing to add.
    """
    if state == "REQUEUED":
        return None  # its next life goes on
    # Why did the job end?
    record = read_record(run_dir)
    status, words = _ENDS.get(state, ("failed", _words(code, state, log)))
    if reason and state not in _ENDS:
        words = f"ended before its training: {reason}"
    # Add that to the record, or write one.
    if record is not None:
        early = bool(reason) and state not in _ENDS  # the record is of an earlier life
        if record["status"] == "ok" or not (early or state in _ENDS):
            return None
        record["status"] = status if early else record["status"]
        record["reason"] = f"job {job} {words}; {record['reason']}"
    else:
        record = new_record(
            status=status,
            reason=f"job {job} {words}",
            run_id=run_dir.name,
            experiment=run_dir.parent.name,
            finished_at=now(),
            **_known(run_dir),
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_record(run_dir, record)
    return record


def _words(code: int, state: str, log: Path | None) -> str:
    """How a job ended, when neither the scheduler nor the ranks say it."""
    if code == EXIT_CONFIG and log is not None and (said := _last_error(log)):
        return f"refused its settings: {said}"
    place = f"; see {log}" if log is not None else "; see its log"
    return f"ended with exit code {code} and no record{'' if state == 'RUNNING' else f' in state {state}'}{place}"


def _last_error(log: Path) -> str:
    """The text of the last `error: ...` line near the end of a log, or ""."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_END_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:  # a pipe or a terminal
        return ""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _known(run_dir: Path) -> dict[str, Any]:
    """What config.yaml tells of a run that wrote no record itself; {} when there is no config.yaml."""
    try:
        config = Config.model_validate(yaml.safe_load((run_dir / "config.yaml").read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    data = config.data
    return {
        "model": config.model.name,
        "decoder": config.model.decoder_name,
        "patching": data.patching,
        "resolution": data.resolution,
        "patch": data.patch,
        "length": data.length,
        "engine": config.engine.name,
        "precision": config.train.precision,
        "seed": config.train.seed,
        "data": data.dir,
        "config_sha256": config.sha256(),
        "global_batch": config.train.batch,
        "task": config.model.task,
    }


def prep_arguments(name: str, slides: str, masks: str | None, more: list[str]) -> list[str]:
    """Arguments of `python -m data_prep` that make the token files of the experiment `name`.

    Args:
        name: Experiment.
        slides: Folder of slides.
        masks: Folder of masks, or None.
        more: Settings `key=value` of the experiment, and options of `data_prep build`.

    Raises:
        ConfigError: The experiment does not read token files, or the options do not go together.
    """
    settings = [word for word in more if "=" in word and not word.startswith("-")]
    data = load(name, settings).data
    if data.kind == "images":
        raise ConfigError(f"{name} reads pictures, not token files: nothing to prepare")
    asked: dict[str, Any] = {key: getattr(data, key) for key in ("resolution", "patch", "patching")}
    asked |= {"classes": data.classes if data.labels is None else 1}
    asked |= {"length": data.length if data.patching == "apf" else None}
    asked |= {key: getattr(data, key) for key in SETTINGS if key not in (*asked, "fov")}
    words = ["build", slides, "--out", data.dir, *words_of(asked, always=("patching", "classes"))]
    if masks:
        words += ["--masks", masks]
    has_view = any(word.split("=")[0] == "--fov" for word in more)
    if has_view != data.fov:
        cure = "leave it out, or set data.fov=true" if has_view else "add --fov DIR, or set data.fov=false"
        raise ConfigError(f"{name}: data.fov={str(data.fov).lower()}, with{'' if has_view else 'out'} --fov: {cure}")
    if has_view and not masks:
        raise ConfigError(f"{name}: --fov says where masks count: add --masks DIR")
    return words + [word for word in more if word not in settings]
