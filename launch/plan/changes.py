"""The cheapest change of settings with which an experiment would fit: candidates are counted, not guessed.

Must not import engines or models; it changes configurations only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.config import Config, ConfigError, apply_overrides
from launch.plan.cost import cost, fits
from launch.plan.step import Counts
from launch.sites import Site


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


def cheapest_change(
    config: Config, site: Site, world: int, count: Callable[[Config], Counts], limit_s: float
) -> tuple[Change | None, int]:
    """The fewest changes that make it fit; among as many, those with the fastest step.

    Args:
        config: What does not fit.
        site: Where.
        world: Number of gpus.
        count: Counts a step.
        limit_s: Stop looking after this time.

    Returns:
        The change, or None when none was found; and how many were tried.
    """
    end = time.perf_counter() + limit_s
    local_world = min(world, site.hardware.gpus_per_node)
    best: tuple[float, Change] | None = None
    tried = 0
    changes = combinations(single_changes(config, world, local_world))
    for _, together in itertools.groupby(changes, key=lambda change: change[0]):
        for _, overrides in together:
            if time.perf_counter() > end:
                return (None if best is None else best[1]), tried
            try:
                counts = count(apply_overrides(config, overrides))
            except ConfigError:
                continue
            tried += 1
            seconds = cost(counts, site).step_s
            if fits(counts, site) and (best is None or seconds < best[0]):
                best = seconds, Change(overrides, counts)
        if best is not None:
            break
    return (None if best is None else best[1]), tried

