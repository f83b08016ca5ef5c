"""What a run is trained for: its batches, its loss and its scores, behind one protocol that the trainer knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from hpc_models.training.losses import bce_dice
from launch.config.config import Config
from launch.data.batches import Batch, training_batch
from launch.data.pictures import Files
from launch.data.token_files import TokenFiles
from launch.engines.base import Engine
from launch.train.classification import Classification, Forward
from launch.train.segmentation_scores import Scores, evaluate
from launch.train.trivial_baselines import floors


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


class Segmentation:
    """Exact pixel Dice of token sets, or of crops by sliding window."""

    key = "dice"
    parts = 1

    def __init__(self, config: Config, files: TokenFiles) -> None:
        self.config, self.files = config, files

    def batch(self, picks: list[tuple[int, int]]) -> Batch:
        """See `Task`."""
        return training_batch(self.config, self.files, picks)

    def losses(self, forward: Forward, batch: Batch, teacher: Forward | None) -> Iterator[torch.Tensor]:
        """See `Task`; there is no teacher."""
        assert teacher is None
        yield bce_dice(forward(batch), batch["mask_counts"], batch["content_counts"])

    def evaluate(
        self, engine: Engine, part: str, device: torch.device, pictures: Path | None = None, label: str = "eval"
    ) -> Scores:
        """See `Task`."""
        return evaluate(engine, self.config, self.files, part, device, pictures, label)

    def floors(self) -> dict[str, float]:
        """See `Task`."""
        return floors(self.files)


def make_task(config: Config, files: Files) -> Task:
    """The task that a configuration's model was made for.

    Raises:
        ConfigError: Labels are missing or do not fit.
    """
    if config.model.task == "classification":
        return Classification(config, files)
    assert isinstance(files, TokenFiles)
    return Segmentation(config, files)
