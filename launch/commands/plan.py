"""`python -m launch plan`: what a training step costs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from launch.commands.train import add_experiment
from launch.config.config import Config, ConfigError, apply_overrides
from launch.config.sites import Site, load_site
from launch.experiments.load import load

if TYPE_CHECKING:
    from launch.plan.report import PlanRow
    from launch.plan.step import Counts

HELP = "what a training step costs on any number of gpus: memory, collectives, FLOPs, seconds; needs no gpu"
_DESCRIPTION = """\
Runs one training step of an experiment as rank 0 of N gpus on tensors without numbers, in this process, and counts what
the step does. Adaptive images have data.length tokens, or as many as a tree of that length. With data.part, one part
with about the mean number of leaves stands for all. Memory counts tensors; the site's reserve stands for work space
inside kernels."""
ADVICE_S = 40.0  # after so long no further change is tried
ENGINES = ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    add_experiment(parser, "settings to change, as for train")
    parser.add_argument("--gpus", default="1", metavar="N[,N...]", help="several numbers print a table")
    parser.add_argument("--engine", choices=ENGINES, help="default: the experiment's own")
    parser.add_argument("--site", default="generic-cuda", help="name of jobs/sites/NAME.yaml, or a .yaml file")
    parser.add_argument(
        "--micro", type=int, metavar="IMAGES", help="images per gpu and forward pass; sets train.batch for each N"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--no-advice", action="store_true", help="do not look for a change that would fit")


def engine_overrides(name: str, world: int) -> list[str]:
    """`--engine` as settings."""
    if name.startswith("zero"):
        return ["engine.name=deepspeed", f"engine.zero={name[-1]}"]
    if name == "hsdp":
        return ["engine.name=fsdp", "engine.shard=null"]
    return [f"engine.name={name}", *([f"engine.shard={world}"] if name == "fsdp" else [])]


def gpu_counts(text: str) -> list[int]:
    """The value of `--gpus`.

    Raises:
        ConfigError: Not one or more numbers of at least 1.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--gpus={text!r} must be numbers like 1,8,2048")
    return numbers


def run(args: argparse.Namespace) -> int:
    """Count and print; 0 also when it does not fit, since that is an answer.

    Raises:
        ConfigError: Bad arguments or settings; exit code 64.
    """
    site, numbers = load_site(args.site), gpu_counts(args.gpus)
    if args.micro is not None and args.micro < 1:
        raise ConfigError(f"--micro={args.micro} must be at least 1")
    # The weights that a run starts from cost nothing, and need not be there yet.
    base = apply_overrides(load(args.experiment, args.overrides), ["train.init_from=null"])
    from launch.plan import report
    from launch.train.checks import check_model

    # Count one step for each number of gpus.
    rows: list[PlanRow] = []
    with _quiet():
        check_model(base)
        for world in numbers:
            if not args.json and len(numbers) > 1 and sys.stderr.isatty():
                print(f"counting {world} gpus ...", file=sys.stderr)
            rows.append(_row(base, site, world, args, advise=not any(row.advised for row in rows)))
    if all(row.counts is None for row in rows):
        raise ConfigError(rows[0].error)
    if args.json:
        print(json.dumps(report.as_json(base, site, rows), indent=1))
        return 0
    print(report.table(rows, site))
    counted = [row for row in rows if row.counts is not None]
    if len(counted) == 1:
        print(report.page(counted[0], site))
    for row in counted:
        print(report.verdict(row, site))
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's and torch's words on the pretended ranks, and on one thread, as nothing is computed."""
    import torch

    level, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logging.disable(level)
        torch.set_num_threads(threads)


def _row(base: Config, site: Site, world: int, args: argparse.Namespace, advise: bool) -> PlanRow:
    from launch.plan.cost import fits
    from launch.plan.report import PlanRow
    from launch.plan.step import count

    local_world = min(world, site.hardware.gpus_per_node)

    def counted(config: Config) -> Counts:
        return count(config, world, local_world, whole_batch=site.hardware.kind == "cpu")

    try:
        config = apply_overrides(base, engine_overrides(args.engine, world)) if args.engine else base
        if args.micro is not None:
            shares = max(1, world // config.engine.sequence) * config.train.accumulate
            config = apply_overrides(config, [f"train.batch={args.micro * shares}"])
        counts = counted(config)
    except ConfigError as error:
        return PlanRow(world, None, str(error))
    if fits(counts, site) or args.no_advice or not advise:
        return PlanRow(world, counts)
    return PlanRow(world, counts, "", True, _cheapest_change(config, site, world, counted))


def saving_changes(config: Config, world: int) -> list[str]:
    """Settings that save memory, each tried by itself."""
    engine, accumulate = config.engine, config.train.accumulate
    found = []
    if engine.name == "ddp" and world > 1:
        found.append("engine.name=fsdp")
    if engine.name == "fsdp" and engine.shard != world:
        found.append(f"engine.shard={world}")
    if engine.name == "deepspeed" and engine.zero < 3:
        found.append("engine.zero=3")
    images = config.train.batch // (world // engine.sequence) // accumulate
    found += [f"train.accumulate={accumulate * n}" for n in sorted({2, 4, 8, images} - {1}) if images % n == 0]
    if config.train.precision == "fp32":
        found.append("train.precision=bf16")
    if getattr(config.model, "checkpointing", True) is False:
        found.append("model.checkpointing=true")
    return found


def _cheapest_change(
    config: Config, site: Site, world: int, counted: Callable[[Config], Counts]
) -> tuple[str, Counts] | None:
    """The change with which it fits and has the fastest step, and its counts; of those tried in `ADVICE_S`."""
    from launch.plan.cost import cost, fits

    fitting, end_s = [], time.monotonic() + ADVICE_S
    for change in saving_changes(config, world):
        if time.monotonic() > end_s:
            break
        with suppress(ConfigError):
            counts = counted(apply_overrides(config, [change]))
            if fits(counts, site):
                fitting.append((change, counts))
    return min(fitting, key=lambda found: cost(found[1], site).step_s, default=None)
