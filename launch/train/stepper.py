"""One optimiser step on this rank: the loss part by part, the optimiser, and the average of the weights.

The trainer gives it batches from files, the planner tensors without numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from hpc_models.blocks.checkpointing import frozen_statistics
from hpc_models.training.asam import neighbourhood
from launch import engines
from launch.config.config import Config
from launch.data.batches import Batch
from launch.engines.base import Engine, EngineSetup, Forward
from launch.engines.ranks import Ranks
from launch.records.flops import Speed
from launch.train.ema import Average
from launch.train.optim import make_optimizer
from launch.train.task import Task


class Stepper:
    """Makes the steps of one run on one rank; for a model on meta, rank 0 passes its weights."""

    parameters: int  # weights of the whole model
    micro: int  # images per forward pass of this rank
    engine: Engine  # the wrapped model and its optimiser
    average: Average | None  # running average of its weights
    speed: Speed  # counts FLOPs; its owner says where steps begin and end

    def __init__(
        self,
        config: Config,
        task: Task,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.config, self.task, self.ranks, self.device = config, task, ranks, device
        train = config.train
        if config.engine.sequence > 1:
            from launch.engines.sequence_parallel import spread_sequences

            spread_sequences(model, config.engine.sequence)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.micro = train.batch // (ranks.world // config.engine.sequence) // train.accumulate
        setup = EngineSetup(
            device=device,
            precision=train.precision,
            make_optimizer=lambda module: make_optimizer(module, train),
            parts=train.accumulate * task.parts,
            micro=self.micro,
            max_norm=train.clip,
            local=ranks.local,
            local_world=ranks.local_world,
        )
        self.engine = engines.build(model, config.engine, setup, weights)
        self.average = None if train.ema_decay is None else Average(self.engine.module, train.ema_decay)
        self.speed = Speed(None)

    def run(self, piece: Callable[[int], Batch], step: int, rate: float) -> tuple[torch.Tensor, float]:
        """One optimiser step on the global batch, after `step` steps and at learning rate `rate`.

        Args:
            piece: Gives part 0, 1, ... of this rank's share of the batch, on the device.

        Returns:
            This rank's share of the loss, and the gradient norm over all ranks. If the norm is not finite, the step is
            lost.
        """
        # Dropout must not depend on restarts, so the generator's state is a function of the step.
        torch.manual_seed(self._seed(step))
        total = self._gradients(piece)
        if self.config.train.optimiser == "asam":
            # The second pass sees the same batch and dropout, but does not update the batch statistics.
            with neighbourhood(self.engine.module.parameters(), self.config.train.rho):
                with frozen_statistics(self.engine.module):
                    torch.manual_seed(self._seed(step))
                    self._gradients(piece)
        norm = self.engine.step(rate, self.config.train.clip)
        if self.average is not None and math.isfinite(norm):
            self.average.update(step + 1)
        return total, norm

    def _gradients(self, piece: Callable[[int], Batch]) -> torch.Tensor:
        """Back-propagate this rank's share of a step, part by part; returns its share of the loss."""
        total = torch.zeros((), device=self.device)
        accumulate, parts = self.config.train.accumulate, self.task.parts
        share = self.micro * accumulate
        for number in range(accumulate):
            losses = self.task.losses(self.engine.forward, piece(number), self._teacher())
            for part in range(parts):
                last = number == accumulate - 1 and part == parts - 1
                with self.engine.micro_step(last=last):
                    with self.speed.forward():
                        loss = next(losses).sum() / (share * parts)
                    self.engine.backward(loss)
                total += loss.detach()
        return total

    def _teacher(self) -> Forward | None:
        """The averaged model as a function, if it teaches."""
        if self.average is None or not self.config.train.distill:
            return None
        return self.average.teacher(self.speed.no_backward()(self.engine.forward))

    def _seed(self, step: int) -> int:
        text = f"{self.config.train.seed}/{step}/{self.ranks.rank}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def largest_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest of each number over all ranks, in one reduction."""
    agreed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [float(value) for value in agreed]


def sum_over_ranks(value: float) -> float:
    """The sum of one number over all ranks."""
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed)
