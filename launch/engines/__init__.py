"""How one single-device model trains on many ranks: `ddp` and `fsdp` behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launch.config import EngineConfig
    from launch.engines.base import Engine


def build(model: nn.Module, config: EngineConfig, *, device: torch.device, precision: str) -> Engine:
    """Wrap `model` with the engine that `config.name` names; the process group must have been started."""
    if config.name == "fsdp":
        from launch.engines.fsdp import FSDPEngine

        return FSDPEngine(model, device, precision, config.reshard)
    from launch.engines.ddp import DDPEngine

    return DDPEngine(model, device, precision)
