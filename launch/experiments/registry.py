"""The table of named experiments that this room's files fill; must not import torch.

An experiment is a function that returns a full `Config`; its first line is its description.
"""

from __future__ import annotations

from collections.abc import Callable

from launch.config.config import Config

EXPERIMENTS: dict[str, Callable[[], Config]] = {}
_DESCRIPTIONS: dict[str, str] = {}


def register(name: str, make: Callable[[], Config], description: str) -> None:
    """Add an experiment.

    Args:
        name: What people type.
        make: Returns its full configuration.
        description: One line for the list.
    """
    if name in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} is registered twice")
    EXPERIMENTS[name] = make
    _DESCRIPTIONS[name] = description


def experiment(make: Callable[[], Config]) -> Callable[[], Config]:
    """Register a function under its own name; its first line is the description."""
    register(make.__name__, make, (make.__doc__ or "").strip().splitlines()[0])
    return make


def describe(name: str) -> str:
    """The one-line description of an experiment."""
    return _DESCRIPTIONS[name]
