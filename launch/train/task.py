"""What a run is trained for: its batches, its loss and its scores, behind one protocol that the trainer knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from launch.config.config import Config
from launch.data.batches import Batch
from launch.data.pictures import Files
from launch.data.token_files import TokenFiles
from launch.engines.base import Engine, Forward


class TestScores(Protocol):
    """Scores of a split, the same on every rank."""

    def headline(self) -> float:
        """The number that model selection looks at; larger is better."""

    def numbers(self) -> dict[str, float | None]:
        """What metrics.jsonl keeps, by name without the split."""

    def record(self) -> dict[str, Any]:
        """What the record keeps of the test split."""


class Task(Protocol):
    """What the trainer asks.

    Attributes:
        key: Name of the headline number.
        parts: Losses per batch; each is back-propagated by itself, and the step's loss is their mean.
    """

    key: str
    parts: int

    def batch(self, picks: list[tuple[int, int]]) -> Batch:
        """The augmented CPU batch of (image index, global sample index) pairs."""

    def losses(self, forward: Forward, batch: Batch, teacher: Forward | None) -> Iterator[torch.Tensor]:
        """`parts` times the loss of each image, (B,)."""

    def evaluate(
        self, engine: Engine, part: str, device: torch.device, pictures: Path | None = None, label: str = "eval"
    ) -> TestScores:
        """Scores of a split; every rank must call it."""

    def floors(self) -> dict[str, float]:
        """What needs no model; every rank must call it."""


def make_task(config: Config, files: Files) -> Task:
    """The task that a configuration's model was made for.

    Raises:
        ConfigError: Labels are missing or do not fit.
    """
    if config.model.task == "classification":
        from launch.train.classification import Classification

        return Classification(config, files)
    from launch.train.segmentation import Segmentation

    assert isinstance(files, TokenFiles)
    return Segmentation(config, files)
