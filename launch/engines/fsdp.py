"""FSDP2 (`fully_shard`): parameters, gradients and optimiser sharded over ranks.

With a shard group smaller than the world it is HSDP: sharded within a group, replicated between groups. Beyond one node
the group is a node by default, since a gather by all ranks pays for every hop.

FSDP2 cuts the first axis of a parameter and pads it to a multiple of the group: a table of positions (1, L, D) would be
gathered 8 or 2048 times as large. So a parameter is cut along the first axis that the group divides, if there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from launch.config.config import EngineConfig
from launch.engines.base import Batch, EngineError, EngineSetup, TorchEngine, units_of


def shard_size(config: EngineConfig, world: int, local_world: int) -> int:
    """Ranks of a shard group: as configured, else one node's ranks beyond one node, else all."""
    if config.shard is not None:
        return min(config.shard, world)
    return local_world if local_world < world and world % local_world == 0 else world


class FSDPEngine(TorchEngine):
    """Sharded model; bf16 by a mixed precision policy, parameters kept and gradients reduced in fp32.

    The model's `fsdp_units()`, if it has them, are sharded one by one, so that one at a time is gathered; then the
    model itself. A model on meta gets `weights`, its state dict on rank 0. `config.reshard` frees gathered parameters
    between forward and backward (less memory, one more gather).
    """

    def __init__(
        self, model: nn.Module, config: EngineConfig, setup: EngineSetup, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__(config.sequence)
        # The groups of ranks.
        device, world = setup.device, dist.get_world_size()
        shard = shard_size(config, world, setup.local_world or world)
        if shard == world:
            mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))
        # The precision.
        inner = root = MixedPrecisionPolicy()
        if setup.precision == "bf16":
            inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            # Only the root sets an output dtype: on a unit it would feed fp32 into bf16 layers.
            root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        # Shard unit by unit, then fill a model on meta.
        on_meta = any(p.is_meta for p in model.parameters())
        if not on_meta:
            model = model.to(device)
        sharded = partial(
            fully_shard,
            mesh=mesh,
            reshard_after_forward=config.reshard,
            shard_placement_fn=partial(shard_axis, ranks=shard),
        )
        for unit in units_of(model):
            sharded(unit, mp_policy=inner)
        sharded(model, mp_policy=root)
        if on_meta:
            fill_from_first_rank(model, device, weights)
        # The warning is about views changed in place, which nobody does to logits.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.module = model  # the same object: fully_shard changes its class
        self.optimizer = setup.make_optimizer(model)

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        logits: torch.Tensor = self.module(batch)
        return logits.float()

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """See `Engine`."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        yield


def shard_axis(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """The first axis that `ranks` divides; None where there is none, and FSDP2 pads the first one."""
    return next((Shard(axis) for axis, size in enumerate(parameter.shape) if size % ranks == 0), None)


def fill_from_first_rank(model: nn.Module, device: torch.device, weights: dict[str, torch.Tensor] | None) -> None:
    """Give a sharded model on meta its memory, then rank 0's weights.

    Raises:
        EngineError: The state dict lacks a buffer of the model, which would stay unset.
    """
    unsaved = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    if unsaved:
        raise EngineError(f"engine.meta_init: buffer {sorted(unsaved)[0]} is not in the state dict")
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights if dist.get_rank() == 0 else {}, options=options)  # type: ignore[arg-type]
