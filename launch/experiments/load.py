"""All named experiments, and `load(name, overrides)` that makes the settings of one.

Must not import torch: the list is shown on login nodes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from launch.config.config import Config, ConfigError, apply_overrides, suggest
from launch.config.model import MODELS
from launch.experiments.registry import EXPERIMENTS, describe

__all__ = ["EXPERIMENTS", "describe", "load"]

# Each file registers its experiments when it is imported; the list shows them in this order.
for _family in ("demo", "btcv", "classify_paip", "mammography", "open_data", "paip", "resolution"):
    importlib.import_module(f"launch.experiments.{_family}")


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment `name` with `section.key=value` overrides.

    Raises:
        ConfigError: Unknown experiment or key, or a bad value.
    """
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        if name in MODELS:
            raise ConfigError(f"{name} is a model: give an experiment and model.name={name}; experiments: {known}")
        raise ConfigError(f"unknown experiment {name!r}{suggest(name, EXPERIMENTS)}; valid: {known}")
    return apply_overrides(EXPERIMENTS[name](), overrides)
