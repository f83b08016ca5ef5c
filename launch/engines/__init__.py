"""How one single-device model trains on many ranks: `ddp`, `fsdp` and `deepspeed` behind one protocol."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from launch.config.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launch.config.config import EngineConfig
    from launch.engines.base import Engine, MakeOptimizer


def shard_size(config: EngineConfig, world: int, local_world: int) -> int:
    """Ranks of a shard group: as asked for, else one node's ranks beyond one node, else all."""
    if config.shard is not None:
        return min(config.shard, world)
    return local_world if local_world < world and world % local_world == 0 else world


def check_saved(name: str, notes: dict[str, Any]) -> None:
    """Can engine `name` read a checkpoint with these notes? DeepSpeed's are its own; ddp and fsdp read each other's.

    Raises:
        ConfigError: It cannot; the line names both engines and the way that is left.
    """
    saved = str(notes["engine"])
    if "deepspeed" in (saved, name) and saved != name:
        raise ConfigError(
            f"a checkpoint of engine.name={saved} cannot be loaded with engine.name={name}; "
            "take its weights along by export-weights and train.init_from"
        )


def build(
    model: nn.Module,
    config: EngineConfig,
    *,
    device: torch.device,
    precision: str,
    make_optimizer: MakeOptimizer | None = None,
    parts: int = 1,
    micro: int = 1,
    max_norm: float = 0.0,
    local: int = 0,
    local_world: int | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Engine:
    """Wrap `model` with the engine that `config.name` names; the process group must have been started.

    Args:
        model: The bare model.
        config: The engine section.
        device: This rank's device.
        precision: fp32 or bf16.
        make_optimizer: Optimiser of the wrapped model; AdamW with its defaults when None.
        parts: Parts of a step (calls of `backward` per `step`).
        micro: Images per part on this rank.
        max_norm: Largest gradient norm, 0 for none.
        local: Index of this rank on its node.
        local_world: Ranks of this node; all when None.
        weights: Model on meta: its state dict on rank 0.

    Raises:
        ConfigError: Something is missing on this machine, or does not fit the number of ranks.
    """
    import torch
    import torch.distributed as dist

    from launch.engines.base import EngineError, compiled_units

    world = dist.get_world_size()
    make = make_optimizer or (lambda module: torch.optim.AdamW(module.parameters()))
    if config.compile:
        if device.type == "cpu" and shutil.which("g++") is None:
            raise ConfigError("engine.compile=true needs a C++ compiler on CPUs; g++ is not on PATH")
        for block in compiled_units(model):
            block.compile()
    try:
        if config.name == "deepspeed":
            from launch.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(
                model, device, precision, make, config.zero, parts, micro, max_norm, config.shard, config.offload, local
            )
        if config.name == "fsdp":
            from launch.engines.fsdp import FSDPEngine

            shard = shard_size(config, world, local_world or world)
            return FSDPEngine(model, device, precision, make, config.reshard, shard, config.sequence, weights)
        from launch.engines.ddp import DDPEngine

        return DDPEngine(model, device, precision, make, config.sequence)
    except EngineError as error:
        raise ConfigError(str(error)) from None
