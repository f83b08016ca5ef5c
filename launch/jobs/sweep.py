"""The runs of a sweep: experiments x patchings x GPU counts x varied settings x seeds, as checked members."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config.config import Config, ConfigError
from launch.experiments.load import all_experiments, load
from launch.jobs.scaling_study import Mode, scaling_point
from launch.jobs.table import JOBS


@dataclass(frozen=True)
class Axes:
    """What a sweep varies.

    Attributes:
        gpus: Ranks; (): as many as the job table says for each experiment, or one.
        patching: apf, uniform or both.
        repeat: Runs of each, with seeds from `train.seed` on.
        vary: Settings and their values.
        zipped: Walk through the values of `vary` together, instead of every combination.
        exclude: Leave out members that match all pairs of one rule.
        scaling: strong or weak: every member becomes a point of a scaling study.
    """

    gpus: tuple[int, ...] = ()
    patching: tuple[str, ...] = ("apf",)
    repeat: int = 1
    vary: tuple[tuple[str, tuple[str, ...]], ...] = ()
    zipped: bool = False
    exclude: tuple[tuple[tuple[str, str], ...], ...] = ()
    scaling: Mode | None = None


@dataclass(frozen=True)
class Member:
    """One run: what `python -m launch train` gets, on how many ranks, and where it will live."""

    experiment: str
    gpus: int
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.config.run_dir(self.gpus)


def uniform_of(experiment: str) -> str:
    """The experiment with equal patches that goes with one of adaptive patches.

    Raises:
        ConfigError: There is none.
    """
    name = next((job.uniform for job in JOBS.values() if job.experiment == experiment), "") or f"{experiment}_uniform"
    if name not in all_experiments():
        raise ConfigError(f"--patching uniform: {experiment} has no uniform variant")
    return name


def _combinations(axes: Axes) -> list[tuple[tuple[str, str], ...]]:
    named = [[(key, value) for value in values] for key, values in axes.vary]
    if not named:
        return [()]
    if not axes.zipped:
        return list(itertools.product(*named))
    if len({len(values) for values in named}) > 1:
        lengths = ", ".join(f"{key} has {len(values)}" for key, values in axes.vary)
        raise ConfigError(f"--zip needs as many values of every setting: {lengths}")
    return list(zip(*named, strict=True))


def _label(pairs: Sequence[tuple[str, str]]) -> str:
    """Varied settings as part of a folder's name."""
    words = [f"{key.rpartition('.')[2]}-{Path(value).name or value}" for key, value in pairs]
    return "".join(f"_{re.sub(r'[^A-Za-z0-9.+-]', '-', word)}" for word in words)


def members(experiments: Sequence[str], axes: Axes, overrides: Sequence[str] = ()) -> list[Member]:
    """All runs of a sweep; `overrides` are settings of all members.

    Raises:
        ConfigError: An unknown name or key, a value that does not fit, two members in one folder, or none at all.
    """
    found: list[Member] = []
    unused = set(axes.exclude)
    for name, patching in itertools.product(experiments, axes.patching):
        load(name)  # an unknown name is the first fault to tell
        chosen = uniform_of(name) if patching == "uniform" else name
        counts = axes.gpus or (JOBS[name].gpus if name in JOBS else 1,)
        for gpus, pairs in itertools.product(counts, _combinations(axes)):
            words = [*overrides, *(f"{key}={value}" for key, value in pairs)]
            if axes.scaling:
                words = scaling_point(chosen, words, axes.scaling, gpus, max(counts))
            first = load(chosen, words)
            # A member per seed, unless a rule leaves it out.
            for seed in range(first.train.seed, first.train.seed + axes.repeat):
                facts = {"experiment": name, "patching": patching, "gpus": str(gpus), "train.seed": str(seed)}
                facts |= dict(pairs)
                rules = [rule for rule in axes.exclude if all(facts.get(key) == value for key, value in rule)]
                unused.difference_update(rules)
                if not rules:
                    found.append(_member(chosen, gpus, [*words, f"train.seed={seed}"], pairs))
    for rule in unused:
        raise ConfigError(
            f"--exclude {','.join(f'{key}={value}' for key, value in rule)} leaves nothing out; it takes experiment, "
            "patching, gpus, train.seed and varied settings, with values as --vary has them"
        )
    if not found:
        raise ConfigError("the sweep has no members: --exclude leaves nothing")
    _no_twins(found)
    return found


def _member(experiment: str, gpus: int, words: list[str], pairs: Sequence[tuple[str, str]]) -> Member:
    config = load(experiment, words)
    if pairs:
        words = [*words, f"run_id={config.run_name(gpus)}{_label(pairs)}"]
        config = load(experiment, words)
    return Member(experiment, gpus, tuple(words), config)


def _no_twins(found: Sequence[Member]) -> None:
    seen: dict[Path, Member] = {}
    for member in found:
        twin = seen.setdefault(member.run_dir, member)
        if twin is not member:
            raise ConfigError(
                f"two members of the sweep would share {member.run_dir}; leave run_id out, and name each value once"
            )
