"""`python -m launch render`, which writes the scripts of jobs/, and `where`, `ended` and `prep`, which they call."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.system.command_line import DONE, FAILED, Command
from launch.experiments.load import load

_PREP = (
    "Runs `python -m data_prep build` with the experiment's settings; other options go to it, such as --fov DIR or "
    "--jobs N."
)


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", default="generic-cuda", help="name of jobs/sites/NAME.yaml, or a .yaml file")
    parser.add_argument("--out", type=Path, help="folder of the scripts (default: jobs, for the default site only)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a script is not as rendered")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--ranks", type=int, default=1, help="processes that will train")
    parser.add_argument("--scaling", choices=("strong", "weak"), help="one point of a study; prints its settings too")
    parser.add_argument("--of", type=int, help="with --scaling: ranks of the largest point")


def _add_ended(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--log", type=Path, help="what the job printed")
    parser.add_argument("--reason", default="", help="why it ended, if known")


def _add_prep(parser: argparse.ArgumentParser) -> None:
    parser.description = _PREP
    parser.add_argument("experiment", metavar="EXPERIMENT")
    parser.add_argument("--slides", default=os.environ.get("SLIDES", "data/paip/slides"), help="folder (or $SLIDES)")
    parser.add_argument("--masks", default=os.environ.get("MASKS"), help="folder (or $MASKS)")
    parser.set_defaults(more=())


def _render(args: argparse.Namespace) -> int:
    from launch.config.config import ConfigError
    from launch.config.sites import load_site
    from launch.jobs.render import DEFAULT_SITE, FOLDER, differences, write_all

    site = load_site(args.site)
    if args.out is None and site.name != DEFAULT_SITE:
        raise ConfigError(f"render --site {site.name} needs --out FOLDER: jobs/ holds the scripts of {DEFAULT_SITE}")
    folder = args.out or FOLDER
    if not args.check:
        print(f"{len(write_all(site, folder))} scripts in {folder}")
        return DONE
    found = differences(site, folder)
    for line in found:
        print(f"error: {line} (python -m launch render writes it)", file=sys.stderr)
    return FAILED if found else DONE


def _where(args: argparse.Namespace) -> int:
    from launch.jobs.body_steps import where
    from launch.jobs.scaling_study import scaling_point

    overrides = args.overrides
    if args.scaling:
        overrides = scaling_point(args.experiment, overrides, args.scaling, args.ranks, args.of or args.ranks)
    print(where(load(args.experiment, overrides), args.ranks))
    if args.scaling:
        print("\n".join(overrides))
    return DONE


def _ended(args: argparse.Namespace) -> int:
    from launch.jobs.body_steps import record_end

    record = record_end(args.run_dir, args.job, args.state, args.code, args.log, args.reason)
    if record is not None:
        print(f"{record['status']}: {record['reason']} -> {args.run_dir / 'record.json'}", file=sys.stderr)
    return DONE


def _prep(args: argparse.Namespace) -> int:
    from launch.jobs.body_steps import prep_arguments

    words = prep_arguments(args.experiment, args.slides, args.masks, args.more)
    # Another process, since data_prep finds out at its own start whether it is one of several MPI ranks.
    os.execv(sys.executable, [sys.executable, "-m", "data_prep", *words])


COMMANDS = {
    "render": Command("write jobs/*.sh from the job table and a site's facts", _add_render, _render),
    "where": Command("print the run directory of an experiment, once its settings are checked", _add_where, _where),
    "ended": Command("write into a run's record how its job ended (jobs/body.sh does)", _add_ended, _ended),
    "prep": Command("make the token files that an experiment reads", _add_prep, _prep),
}
