"""The settings of a scaling study: what changes in an experiment between 1, 2, 4, ... ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from launch.config.config import ConfigError
from launch.experiments.load import load

Mode = Literal["strong", "weak"]
# Long enough for a steady rate after the first steps, which timing leaves out; short enough for 2048 GPUs.
STEPS = 30


def scaling_point(name: str, overrides: Sequence[str], mode: Mode, ranks: int, largest: int) -> list[str]:
    """The settings of one point of a study of the experiment `name`: the caller's overrides, then the study's own.

    Strong: the same global batch at every size, one image per rank of the largest point. Weak: one image per rank.

    Raises:
        ConfigError: The batch of a strong study cannot be shared by so many ranks.
    """
    config = load(name, overrides)
    batch = ranks if mode == "weak" else largest
    if batch % ranks:
        raise ConfigError(f"strong scaling: {ranks} ranks do not divide the {largest} of the largest point")
    steps = min(STEPS, config.train.max_steps or STEPS)
    own = f"""train.batch={batch} train.max_steps={steps} train.max_seconds=null eval.every_steps=null
    eval.every_seconds=null checkpoint.every_steps=null eval.pictures_px=0"""
    return [*overrides, *own.split(), f"run_root={config.run_root}/scaling-{mode}"]
