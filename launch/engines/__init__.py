"""How one single-device model trains on many ranks: `ddp`, `fsdp` and `deepspeed` behind one protocol.

Others use `build`, `base.Engine`, `ranks.find_ranks` and `sequence_parallel.spread_sequences`.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from launch.config.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launch.config.config import EngineConfig
    from launch.engines.base import Engine, EngineSetup


def check_saved(name: str, notes: dict[str, Any]) -> None:
    """Check that engine `name` can read a checkpoint with these notes; ddp and fsdp read each other's.

    Raises:
        ConfigError: It cannot; the line names both engines and the other way.
    """
    saved = str(notes["engine"])
    if "deepspeed" in (saved, name) and saved != name:
        raise ConfigError(
            f"a checkpoint of engine.name={saved} cannot be loaded with engine.name={name}; "
            "take its weights along by export-weights and train.init_from"
        )


def build(
    model: nn.Module, config: EngineConfig, setup: EngineSetup, weights: dict[str, torch.Tensor] | None = None
) -> Engine:
    """Wrap `model` with the engine that `config.name` names; for a model on meta, rank 0 passes its weights.

    The process group must have been started.

    Raises:
        ConfigError: Something is missing on this machine, or does not fit the number of ranks.
    """
    from launch.engines.base import EngineError, compiled_units

    if config.compile:
        if setup.device.type == "cpu" and shutil.which("g++") is None:
            raise ConfigError("engine.compile=true needs a C++ compiler on CPUs; g++ is not on PATH")
        for block in compiled_units(model):
            block.compile()
    try:
        if config.name == "deepspeed":
            from launch.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(model, config, setup)
        if config.name == "fsdp":
            from launch.engines.fsdp import FSDPEngine

            return FSDPEngine(model, config, setup, weights)
        from launch.engines.ddp import DDPEngine

        return DDPEngine(model, config, setup)
    except EngineError as error:
        raise ConfigError(str(error)) from None
