"""The commands of `python -m launch` about jobs, from render to submit. Must not import torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.commands.submit import add_submit_commands
from launch.experiments.load import load
from launch.jobs.for_each import add_each_command

EXIT_OK, EXIT_BAD, EXIT_CONFIG = 0, 1, 64


def add_job_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add them to the parser; each sets `run`, a function of the parsed arguments that returns an exit code."""
    render = commands.add_parser("render", help="write jobs/*.sh from the job table and a site's facts")
    render.add_argument("--site", default="generic-cuda", help="name of jobs/sites/NAME.yaml, or a .yaml file")
    render.add_argument("--out", type=Path, help="folder of the scripts (default: jobs, for the default site only)")
    render.add_argument("--check", action="store_true", help="write nothing; exit 1 when a script is not as rendered")
    render.set_defaults(run=_render)

    where = commands.add_parser("where", help="print the run directory of an experiment, once its settings are checked")
    where.add_argument("experiment", metavar="EXPERIMENT")
    where.add_argument("overrides", metavar="key=value", nargs="*")
    where.add_argument("--ranks", type=int, default=1, help="processes that will train")
    where.add_argument("--scaling", choices=("strong", "weak"), help="one point of a study; prints its settings too")
    where.add_argument("--of", type=int, help="with --scaling: ranks of the largest point")
    where.set_defaults(run=_where)

    ended = commands.add_parser("ended", help="write into a run's record how its job ended (jobs/body.sh does)")
    ended.add_argument("run_dir", type=Path)
    ended.add_argument("--job", required=True)
    ended.add_argument("--state", required=True)
    ended.add_argument("--code", type=int, required=True)
    ended.add_argument("--log", type=Path, help="what the job printed")
    ended.add_argument("--reason", default="", help="why it ended, if known")
    ended.set_defaults(run=_ended)

    prep = commands.add_parser(
        "prep",
        help="make the token files that an experiment reads",
        allow_abbrev=False,
        description="Runs `python -m data_prep build` with the experiment's settings; other options go to it, such as "
        "--fov DIR or --jobs N.",
    )
    prep.add_argument("experiment", metavar="EXPERIMENT")
    prep.add_argument("--slides", default=os.environ.get("SLIDES", "data/paip/slides"), help="folder (or $SLIDES)")
    prep.add_argument("--masks", default=os.environ.get("MASKS"), help="folder (or $MASKS)")
    prep.set_defaults(run=_prep, open_ended=True)
    add_submit_commands(commands)
    add_each_command(commands)


def _render(asked: argparse.Namespace) -> int:
    from launch.config.config import ConfigError
    from launch.config.sites import load_site
    from launch.jobs.render import DEFAULT_SITE, FOLDER, differences, write_all

    site = load_site(asked.site)
    if asked.out is None and site.name != DEFAULT_SITE:
        raise ConfigError(f"render --site {site.name} needs --out FOLDER: jobs/ holds the scripts of {DEFAULT_SITE}")
    folder = asked.out or FOLDER
    if not asked.check:
        print(f"{len(write_all(site, folder))} scripts in {folder}")
        return EXIT_OK
    found = differences(site, folder)
    for line in found:
        print(f"error: {line} (python -m launch render writes it)", file=sys.stderr)
    return EXIT_BAD if found else EXIT_OK


def _where(asked: argparse.Namespace) -> int:
    from launch.jobs.body_steps import where
    from launch.jobs.scaling_study import scaling_point

    overrides = asked.overrides
    if asked.scaling:
        overrides = scaling_point(asked.experiment, overrides, asked.scaling, asked.ranks, asked.of or asked.ranks)
    print(where(load(asked.experiment, overrides), asked.ranks))
    if asked.scaling:
        print("\n".join(overrides))
    return EXIT_OK


def _ended(asked: argparse.Namespace) -> int:
    from launch.jobs.body_steps import record_end

    record = record_end(asked.run_dir, asked.job, asked.state, asked.code, asked.log, asked.reason)
    if record is not None:
        print(f"{record['status']}: {record['reason']} -> {asked.run_dir / 'record.json'}", file=sys.stderr)
    return EXIT_OK


def _prep(asked: argparse.Namespace) -> int:
    from launch.jobs.body_steps import prep_arguments

    words = prep_arguments(asked.experiment, asked.slides, asked.masks, asked.more)
    # Another process, since data_prep decides by its own start whether it is one of several MPI ranks.
    os.execv(sys.executable, [sys.executable, "-m", "data_prep", *words])
