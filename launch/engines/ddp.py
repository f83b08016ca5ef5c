"""DistributedDataParallel: the whole model on every rank.

With two ranks a resumed run repeats the uninterrupted one bit for bit. With more, gloo and nccl may add the first
step's gradients in another order: DDP rebuilds its buckets after the first step of a process.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launch.config.config import EngineConfig
from launch.engines.base import Batch, EngineSetup, TorchEngine


class DDPEngine(TorchEngine):
    """Replicated model; bf16 by autocast, parameters and reduction in fp32."""

    def __init__(self, model: nn.Module, config: EngineConfig, setup: EngineSetup) -> None:
        super().__init__(config.sequence)
        self.module = model.to(setup.device)
        self._device = setup.device
        self._bf16 = setup.precision == "bf16"
        # No buffers are shared: the trainer averages batch statistics, the others are constants.
        self._ddp = DistributedDataParallel(self.module, forward_sync_buffers=False, gradient_as_bucket_view=True)
        # 1 x 1 convolutions on the CPU make gradients with other strides but the same numbers.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.optimizer = setup.make_optimizer(self.module)

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """See `Engine`. Without gradients it calls the bare model, which sends nothing."""
        model: nn.Module = self._ddp if torch.is_grad_enabled() else self.module
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits: torch.Tensor = model(batch)
        return logits.float()

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        return contextlib.nullcontext() if last else self._ddp.no_sync()
