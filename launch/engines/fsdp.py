"""FSDP2 (`fully_shard`): parameters, gradients and optimiser sharded over ranks; knows nothing of data or schedules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from launch.engines.base import Batch, grad_norm_and_clip


class FSDPEngine:
    """Sharded model; bf16 by a mixed precision policy, parameters kept and gradients reduced in fp32.

    Args:
        model: The bare model. Its `fsdp_units()`, when it has them, are sharded one by one (so that only one unit is
            gathered at a time), then the model itself as the root of what is left.
        device: This rank's device.
        precision: fp32 or bf16.
        reshard: Free gathered parameters between forward and backward (less memory, one more gather).
    """

    name = "fsdp"

    def __init__(self, model: nn.Module, device: torch.device, precision: str, reshard: bool) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        inner = root = MixedPrecisionPolicy()
        if precision == "bf16":
            inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            # The output dtype belongs to the root only: on every unit it would feed fp32 into bf16 layers.
            root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        model = model.to(device)
        units: list[nn.Module] = model.fsdp_units() if hasattr(model, "fsdp_units") else []  # type: ignore[operator]
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=inner, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, mp_policy=root, reshard_after_forward=reshard)
        # Models may end in a view; nobody here changes logits in place, which is all that the warning is about.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.module = model  # the same object: fully_shard changes its class

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        logits: torch.Tensor = self.module(batch)
        return logits.float()

    @contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        yield

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self._syncing(last)

    def clip(self, max_norm: float) -> float:
        """See `Engine`."""
        return grad_norm_and_clip(self.module, max_norm)
