"""What a run is trained for: its batches, its loss and its scores, behind one protocol that the trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from data_prep.system.progress import Progress
from launch.data.batches import Batch
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


def score_items(
    engine: Engine, items: int, numbers: int, label: str, unit: str, row_of: Callable[[int, bool], torch.Tensor]
) -> torch.Tensor:
    """A row of numbers for each item, every item scored once whatever the number of ranks; all ranks must call it.

    Args:
        engine: The wrapped model; left in training mode.
        items: How many there are.
        numbers: Length of a row.
        label: Name on the progress bar.
        unit: What an item is.
        row_of: Gives the row (numbers,) of an item; told whether this rank's answer counts.

    Returns:
        (items, numbers) float64, the same on every rank.
    """
    rank, world = engine.data_rank, engine.data_world
    table = torch.zeros(items, numbers, dtype=torch.float64)
    engine.module.eval()
    with Progress(items, label, unit, rank=dist.get_rank()) as bar:
        for first in range(0, items, world):
            # With parameters spread over ranks all of them must run the model together: in the last round a rank
            # without an item of its own repeats the last one and throws the answer away.
            index = min(first + rank, items - 1)
            mine = first + rank < items and engine.first_of_share
            row = row_of(index, mine)
            if mine:
                table[index] = row
            bar.update(min(world, items - first))
    engine.module.train()
    dist.all_reduce(table)
    return table
