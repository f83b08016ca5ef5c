"""`python -m launch`: list experiments, show one, train one. Importing it must not import torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from data_prep.system.ctrl_c import leave_at_once
from launch.commands import study
from launch.commands.jobs import add_job_commands
from launch.config.config import Config, ConfigError
from launch.engines.ranks import EXIT_CONFIG, EXIT_CRASH, EXIT_OK, RankError, find_ranks
from launch.experiments.load import describe, load
from launch.plan.bench import add_bench_command
from launch.plan.command import add_plan_command
from launch.plan.inventory import add_models_command
from launch.predict.export_weights import add_export_command
from launch.preflight.nodes import add_preflight_command
from launch.score.receptive_field import add_erf_command
from launch.score.rescore import add_rescore_command

_EPILOG = """\
examples:
  python -m launch experiments                          # the groups
  python -m launch experiments open data                # what is in one, or any word of a name or description
  python -m launch show demo_apf train.lr=5e-4          # every key, its value and what it means
  python -m launch train demo_apf                       # one process
  torchrun --standalone --nproc-per-node 2 -m launch train demo_apf engine.name=fsdp
  mpiexec -n 2 python -m launch train demo_apf engine.name=fsdp
  srun --ntasks-per-node=8 python -m launch train demo_apf engine.name=fsdp

A run lives in RUN_ROOT/EXPERIMENT/RUN_ID. The same command again resumes it, or returns at once when it is finished.
exit codes: 0 done, 64 bad settings, 75 stopped by a signal after a checkpoint (run me again), else crash
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Train named experiments on token files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing = commands.add_parser("experiments", help="list the named experiments")
    listing.add_argument("word", metavar="WORD", nargs="*", help="a group, or part of a name or description")
    for name, text in (
        ("show", "print an experiment's settings as YAML, each with its meaning"),
        ("train", "train, or resume, an experiment"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("experiment", metavar="EXPERIMENT", help="a name from `python -m launch experiments`")
        command.add_argument(
            "overrides", metavar="key=value", nargs="*", help="settings to change, e.g. train.max_seconds=60"
        )
    comparison = commands.add_parser("study", help=study.HELP)
    study.add_command(comparison)
    comparison.set_defaults(run=study.run)
    add_bench_command(commands)
    add_job_commands(commands)
    add_plan_command(commands)
    add_preflight_command(commands)
    add_export_command(commands)
    add_models_command(commands)
    add_erf_command(commands)
    add_rescore_command(commands)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse ends a list of settings at the first option; those behind it are settings too."""
    parser = _parser()
    asked, more = parser.parse_known_args(arguments)
    if getattr(asked, "open_ended", False):
        asked.more = more
    elif more and (not hasattr(asked, "overrides") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    elif more:
        asked.overrides += more
    return asked


def _train(config: Config) -> int:
    from launch.train.run import train

    return train(config)


def _first_rank() -> bool:
    """All ranks find the same fault before they are joined; one line is enough."""
    try:
        return find_ranks().rank == 0
    except (RankError, KeyError, ValueError):
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        asked = _parse(arguments)
    except SystemExit as end:  # argparse ends with 2 for a wrong command line; ours is 64
        return EXIT_CONFIG if end.code == 2 else int(end.code or 0)
    try:
        code = _run(asked)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CRASH
    except (ConfigError, RankError) as error:
        if _first_rank():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _run(asked: argparse.Namespace) -> int:
    if asked.command == "experiments":
        print("\n".join(describe(" ".join(asked.word))))
        return EXIT_OK
    if hasattr(asked, "run"):
        return int(asked.run(asked))
    config = load(asked.experiment, asked.overrides)
    if asked.command == "show":
        print(config.to_yaml(comments=True), end="")
        return EXIT_OK
    return _train(config)


if __name__ == "__main__":
    # Until training takes its signals over there is nothing to save: Ctrl-C ends the start without a traceback.
    signal.signal(signal.SIGINT, leave_at_once)
    sys.exit(main())
