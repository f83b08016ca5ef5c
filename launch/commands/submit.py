"""`python -m launch submit` and `status`: their options."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_prep.system.command_line import DONE, FAILED, Command
from launch.config.config import ConfigError

_SUBMIT = """\
Submit runs as jobs and return. The sweep is every combination of experiments, patchings, GPU counts, varied settings
and repetitions. `submit scaling [EXPERIMENT...] --mode strong --gpus 1,2,4` makes each run a point of a scaling study.
Without a scheduler (--site local) the runs run here, one after the other.
"""
_EXAMPLES = """\
examples:
  python -m launch submit paip_16k --site frontier --account PROJ --gpus 128,256,512 --patching apf,uniform --repeat 3
  python -m launch submit paip_1k --vary train.lr=1e-3,1e-4 --exclude gpus=8,train.lr=1e-3 --gpus 8,16 --dry-run
  python -m launch submit paip_16k --slides data/paip/slides --masks data/paip/masks --mask-kind viable  # files first
  python -m launch submit scaling --mode weak --gpus 1,2,4,8 --site generic-cuda
  python -m launch status
  python -m launch submit --only failed,missing
"""


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _SUBMIT, _EXAMPLES
    add = parser.add_argument
    add("overrides", metavar="EXPERIMENT | key=value", nargs="*", help="experiments, and settings of all runs")
    add("--site", help="jobs/sites/NAME.yaml (default: generic-cuda where SLURM answers, else local)")
    add("--account", help="sbatch -A")
    add("--gpus", type=_numbers, default=(), metavar="N[,N...]", help="ranks (default: the job's own)")
    add("--patching", type=_patchings, default=("apf",), metavar="apf,uniform")
    add("--repeat", type=int, default=1, metavar="N", help="runs of each, with N seeds")
    add("--vary", type=_axis, action="append", default=[], metavar="key=a,b,c", help="vary a setting")
    add("--zip", action="store_true", help="walk through the values of all --vary together")
    add(
        "--exclude",
        type=_rule,
        action="append",
        default=[],
        metavar="key=value[,...]",
        help="leave out what matches all: experiment, patching, gpus, train.seed, varied settings",
    )
    add("--mode", choices=("strong", "weak"), help="with `scaling`: what stays the same")
    add("--slides", help="make token files that are missing from this folder first")
    add("--masks", help="with --slides: folder of the masks")
    add("--mask-kind", choices=("viable", "whole", "both"), help="with --masks: of whole and viable tumour (PAIP)")
    add("--fov", help="with --slides: folder of the fields of view, for data.fov=true")
    add("--hours", type=float, help="time limit of each job")
    add("--sbatch", action="append", default=[], metavar="X", help="more for sbatch: --sbatch=-qdebug")
    add("--dry-run", action="store_true", help="show what would be submitted")
    add("--only", type=_words, metavar="STATE[,...]", help="submit runs in these states once more")
    add("--runs", type=Path, default=Path("runs"), help="with --only: folder of the runs (run_root)")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of the runs (run_root)")


# Options that --only does not take.
_OF_NEW_RUNS = "site gpus patching repeat vary zip exclude mode slides masks mask_kind fov".split()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(word) for word in _words(text))
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: different numbers of at least 1, e.g. 8,128")
    return found


def _patchings(text: str) -> tuple[str, ...]:
    found = _words(text)
    if not found or set(found) - {"apf", "uniform"} or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r}: apf, uniform or apf,uniform")
    return found


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, value


def _axis(text: str) -> tuple[str, tuple[str, ...]]:
    key, value = _pair(text)
    return key, _words(value)


def _rule(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(_pair(word) for word in _words(text))


def _submit(args: argparse.Namespace) -> int:
    from launch.jobs.submit import submit_again

    names = [word for word in args.overrides if "=" not in word]
    if args.only is None:
        return _submit_new(args, names)
    unasked = argparse.ArgumentParser()
    _add_submit(unasked)
    changed = (name for name in _OF_NEW_RUNS if getattr(args, name) != unasked.get_default(name))
    given = next(itertools.chain(args.overrides, (f"--{name.replace('_', '-')}" for name in changed)), None)
    if given:
        raise ConfigError(f"--only submits runs as they were; leave {given} out, or --only")
    more = [f"--account={args.account}"] if args.account else []
    more += [f"--time={math.ceil(args.hours * 60)}"] if args.hours else []
    lines = submit_again(args.runs, args.only, [*more, *args.sbatch], args.dry_run)
    first = next(lines, None)
    if first is None:
        print(f"nothing under {args.runs} is {' or '.join(args.only)}")
        return DONE
    return _tell(itertools.chain([first], lines))


def _submit_new(args: argparse.Namespace, names: list[str]) -> int:
    from launch.config.sites import load_site
    from launch.jobs.render import DEFAULT_SITE
    from launch.jobs.slurm import has_slurm, slurm_answers
    from launch.jobs.submit import SubmitOptions, describe, make_plan, submit
    from launch.jobs.sweep import Axes, members
    from launch.jobs.table import JOBS

    study = names[:1] == ["scaling"]
    if study != (args.mode is not None):
        raise ConfigError("a scaling study is: submit scaling [EXPERIMENT...] --mode strong|weak --gpus 1,2,4")
    names = (names[1:] or [JOBS["scaling"].experiment]) if study else names
    if not names:
        raise ConfigError("submit needs an experiment (python -m launch experiments), or --only failed,missing")
    site = load_site(args.site or (DEFAULT_SITE if slurm_answers() else "local"))
    if site.slurm is not None and not has_slurm() and not args.dry_run:
        raise ConfigError(f"site {site.name} has SLURM, but there is no sbatch here; use --dry-run, or --site local")
    axes = Axes(args.gpus, args.patching, args.repeat, tuple(args.vary), args.zip, tuple(args.exclude), args.mode)
    found = members(names, axes, [word for word in args.overrides if "=" in word])
    hours = args.hours or (JOBS["scaling"].hours if study else None)  # a point of a study is some tens of steps
    options = SubmitOptions(args.account, hours, args.slides, args.masks, args.mask_kind, args.fov, tuple(args.sbatch))
    plan = make_plan(found, site, options)
    if args.dry_run:
        print("\n".join(describe(plan)))
        return DONE
    return _tell(submit(plan))


def _tell(lines: Iterable[tuple[str, str]]) -> int:
    """Print the lines as they come; exit code 1 when a run here failed."""
    from launch.jobs.submit import NOT_RUN

    code = DONE
    for job, what in lines:
        print(f"{job:>9}  {what}", flush=True)
        if job == NOT_RUN or job.startswith("exit "):
            code = FAILED
    return code


def _status(args: argparse.Namespace) -> int:
    from launch.jobs.submit import states

    rows = states(args.runs)
    if not rows:
        print(f"nothing was submitted under {args.runs}", file=sys.stderr)
        return DONE
    for run, state, reason in rows:
        print(f"{state:<10}{run}{'  ' + reason if reason else ''}")
    print(", ".join(f"{count} {state}" for state, count in Counter(state for _, state, _ in rows).items()))
    return DONE


COMMANDS = {
    "submit": Command("submit runs as jobs", _add_submit, _submit),
    "status": Command("how submitted runs are doing", _add_status, _status),
}
