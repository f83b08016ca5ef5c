"""What a run is trained for: batches, loss and scores, behind one protocol for the trainer."""

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
        """The number that model selection compares; larger is better."""

    def numbers(self) -> dict[str, float | None]:
        """What metrics.jsonl keeps, by name without the split."""

    def record(self) -> dict[str, Any]:
        """What the record keeps of the test split."""


class Task(Protocol):
    """What the trainer asks of a task."""

    parts: int  # losses per batch; each is back-propagated by itself, and the step's loss is their mean

    def batch(self, picks: list[tuple[int, int]]) -> Batch:
        """The augmented CPU batch of (image index, global sample index) pairs."""

    def losses(self, forward: Forward, batch: Batch, teacher: Forward | None) -> Iterator[torch.Tensor]:
        """`parts` times the loss of each image, (B,); `teacher` is the averaged model, if it teaches."""

    def evaluate(
        self, engine: Engine, part: str, device: torch.device, pictures: Path | None = None, label: str = "eval"
    ) -> TestScores:
        """Scores of a split; every rank must call it. Pictures or tables of the answers go to `pictures`."""

    def trivial_baselines(self) -> dict[str, float]:
        """Scores that need no learning, by name; every rank must call it."""


def score_items(
    engine: Engine, items: int, numbers: int, label: str, unit: str, row_of: Callable[[int, bool], torch.Tensor]
) -> torch.Tensor:
    """A row of numbers for each item; each item is scored once on any number of ranks, and all ranks call it.

    Args:
        engine: The wrapped model; left in training mode.
        items: Number of items.
        numbers: Length of a row.
        label: Name on the progress bar.
        unit: What an item is.
        row_of: Gives the row (numbers,) of an item; its second argument says whether this rank's answer counts.

    Returns:
        (items, numbers) float64, the same on every rank.
    """
    rank, world = engine.data_rank, engine.data_world
    table = torch.zeros(items, numbers, dtype=torch.float64)
    engine.module.eval()
    with Progress(items, label, unit, rank=dist.get_rank()) as bar:
        for first in range(0, items, world):
            # Ranks that share parameters must run the model together. In the last round a rank without an item
            # repeats the last one and drops the answer.
            index = min(first + rank, items - 1)
            mine = first + rank < items and engine.first_of_share
            row = row_of(index, mine)
            if mine:
                table[index] = row
            bar.update(min(world, items - first))
    engine.module.train()
    dist.all_reduce(table)
    return table
