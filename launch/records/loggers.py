"""Where metrics go besides metrics.jsonl: TensorBoard and W&B (offline)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from launch.config.config import ConfigError


class Sink(Protocol):
    """Takes the lines of metrics.jsonl as they are written."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Take one line; values that are no numbers are skipped."""

    def close(self) -> None:
        """Write out what is buffered."""


def check_sinks(names: Sequence[str]) -> None:
    """Check that the packages are installed.

    Raises:
        ConfigError: One is not; the line says how to get it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"log.sinks={name}: not installed; pip install {name}")


def open_sinks(names: Sequence[str], run_dir: Path, settings: dict[str, Any]) -> list[Sink]:
    """The sinks of one start, on rank 0 alone; files go to the run's folders `tensorboard` and `wandb`."""
    kinds: dict[str, type[_TensorBoard] | type[_Wandb]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    return [kinds[name](run_dir, settings) for name in names]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class _TensorBoard:
    def __init__(self, run_dir: Path, _settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb  # type: ignore[import-not-found]

        # Compute nodes have no internet; `wandb sync` sends the folder later.
        self._run: Any = wandb.init(
            mode="offline", dir=str(run_dir), project=str(settings["experiment"]), name=run_dir.name, config=settings
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(_numbers(values), step=step)

    def close(self) -> None:
        self._run.finish()
