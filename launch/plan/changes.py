"""The cheapest change of settings with which an experiment would fit: candidates are counted, not guessed.

Must not import engines or models; it changes configurations only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.config.config import Config, ConfigError, apply_overrides
from launch.config.sites import Site
from launch.plan.cost import GIB, cost, fits, memory_gib
from launch.plan.step import Counts


@dataclass(frozen=True)
class Change:
    """Settings with which it fits, and what it then costs."""

    overrides: tuple[str, ...]
    counts: Counts


def single_changes(config: Config, world: int, local_world: int) -> list[list[tuple[str, ...]]]:
    """Groups of changes that save memory; of each group at most one makes sense. The mildest come first."""
    groups: list[list[tuple[str, ...]]] = []
    engine = config.engine
    if world > 1 and engine.name == "ddp":
        groups.append([("engine.name=fsdp",), ("engine.name=fsdp", f"engine.shard={world}")])
    elif engine.name == "fsdp" and (engine.shard or local_world) < world:
        groups.append([(f"engine.shard={world}",)])
    elif engine.name == "deepspeed" and engine.zero < 3:
        groups.append([("engine.zero=3",)])
    images = config.train.batch // (world // engine.sequence) // config.train.accumulate
    smaller = [n for n in range(2, images + 1) if images % n == 0 and (n in (2, 4, 8) or n == images)]
    if smaller:
        groups.append([(f"train.accumulate={config.train.accumulate * n}",) for n in smaller])
    if config.train.precision == "fp32":
        groups.append([("train.precision=bf16",)])
    if getattr(config.model, "checkpointing", True) is False:
        groups.append([("model.checkpointing=true",)])
    return groups


def combinations(groups: list[list[tuple[str, ...]]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(1, a change) one by one, then (2, two together), ..."""
    for number in range(1, len(groups) + 1):
        for chosen in itertools.combinations(groups, number):
            for parts in itertools.product(*chosen):
                yield number, tuple(itertools.chain.from_iterable(parts))


def least_bytes(counts: Counts, overrides: tuple[str, ...], accumulate: int, local_world: int) -> float:
    """What the peak cannot fall below with these changes, so that hopeless ones need not be counted.

    Shards divide parameters, gradients and optimiser; a smaller micro batch divides the rest, bf16 halves it, and
    recomputation is taken to leave a twelfth of it, less than it ever does.
    """
    settings = dict(override.split("=", 1) for override in overrides)
    states = sum(counts.memory[kind] for kind in ("parameters", "gradients", "optimizer"))
    rest = float(counts.peak_bytes - states)
    if any(key.startswith("engine.") for key in settings):
        states = states // int(settings.get("engine.shard", counts.gpus if "engine.zero" in settings else local_world))
    rest /= int(settings.get("train.accumulate", accumulate)) / accumulate
    if "train.precision" in settings:
        rest /= 2
    if "model.checkpointing" in settings:
        rest /= 12
    return states + rest


@dataclass(frozen=True)
class Search:
    """What looking for a change found.

    Attributes:
        change: The cheapest one, None when none was found.
        tried: How many were counted.
        whole: All were counted, or could be left out.
    """

    change: Change | None
    tried: int
    whole: bool


def cheapest_change(
    config: Config, site: Site, counts: Counts, count: Callable[[Config], Counts], limit_s: float
) -> Search:
    """The fewest changes that make it fit; among as many, those with the fastest step.

    Args:
        config: What does not fit.
        site: Where.
        counts: Its counts.
        count: Counts a step of a changed configuration.
        limit_s: Stop looking after this time.
    """
    end = time.perf_counter() + limit_s
    local_world = min(counts.gpus, site.hardware.gpus_per_node)
    best: tuple[float, Change] | None = None
    tried, fitting = 0, set()
    changes = combinations(single_changes(config, counts.gpus, local_world))
    for _, together in itertools.groupby(changes, key=lambda change: change[0]):
        for _, overrides in together:
            keys = tuple(override.partition("=")[0] for override in overrides)
            least = least_bytes(counts, overrides, config.train.accumulate, local_world)
            if keys in fitting or least / GIB > memory_gib(site):
                continue  # a milder value of the same settings fits, or it is hopeless
            if time.perf_counter() > end:
                return Search(None if best is None else best[1], tried, False)
            try:
                changed = count(apply_overrides(config, overrides))
            except ConfigError:
                continue
            tried += 1
            seconds = cost(changed, site).step_s
            if fits(changed, site):
                fitting.add(keys)
                if best is None or seconds < best[0]:
                    best = seconds, Change(overrides, changed)
        if best is not None:
            break
    return Search(None if best is None else best[1], tried, True)
