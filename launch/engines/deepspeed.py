"""DeepSpeed: ZeRO stages 0 to 3 behind the same protocol, on ranks that are there, without its launcher.

No compiler is needed: the extension that DeepSpeed builds on CPUs (collectives of its inference) is switched off, and
the optimiser is torch's. Only `offload` builds DeepSpeed's CPU Adam.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.config.config import EngineConfig
from launch.engines.base import Batch, EngineError, EngineSetup
from launch.engines.ranks import on_first_rank

TAG = "zero"
UNIVERSAL = "universal"


def import_deepspeed() -> Any:
    """The package, with its self-built CPU extension switched off.

    Raises:
        EngineError: Not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError:
        raise EngineError(
            "engine.name=deepspeed: not installed; pip install deepspeed==0.19.8 torch==2.13.0 (extra: deepspeed)"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("ERROR")
    return deepspeed


class DeepSpeedEngine:
    """ZeRO: stage 0 replicates all, 1 shards the optimiser, 2 also the gradients, 3 also the parameters.

    With bf16, parameters and arithmetic are bf16, and the optimiser has an fp32 copy. `shard` at stage 3 is a secondary
    shard group (hpZ), which gathers within a node. `offload` keeps the optimiser in host memory.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, setup: EngineSetup) -> None:
        deepspeed = import_deepspeed()
        self.data_rank, self.data_world, self.first_of_share = dist.get_rank(), dist.get_world_size(), True
        self._stage, self._max_norm = config.zero, setup.max_norm
        self._dtype = torch.bfloat16 if setup.precision == "bf16" else None
        # DeepSpeed's settings.
        zero: dict[str, Any] = {"stage": config.zero}
        if config.zero == 3 and config.shard is not None:
            zero["zero_hpz_partition_size"] = config.shard
        settings: dict[str, Any] = {
            "train_batch_size": setup.micro * setup.parts * self.data_world,
            "train_micro_batch_size_per_gpu": setup.micro,
            "gradient_accumulation_steps": setup.parts,
            "gradient_clipping": setup.max_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": setup.precision == "bf16"},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }
        # The optimiser: torch's, or DeepSpeed's in host memory.
        optimizer = setup.make_optimizer(model)
        if config.offload:
            if shutil.which("g++") is None and shutil.which("c++") is None:
                raise EngineError("engine.offload builds DeepSpeed's CPU Adam: no C++ compiler on PATH")
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            zero["offload_optimizer"] = {"device": "cpu"}
            optimizer = DeepSpeedCPUAdam(optimizer.param_groups)
        # Without all five variables DeepSpeed asks MPI, which may not be there.
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(self.data_world), LOCAL_RANK=str(setup.local))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
            )
        self._engine, _, _, _ = deepspeed.initialize(
            model=model.to(setup.device), optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module = self._engine.module
        self._left = 0

    def forward(self, batch: Batch | torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        logits: torch.Tensor = self._engine(batch if self._dtype is None else _cast(batch, self._dtype))
        return logits.float()

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine`; DeepSpeed counts the parts itself."""
        self._left = 0 if last else 1
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`. The loss is already divided by the number of parts."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if self._left:
            self._engine.step()  # within a step this only counts

    def step(self, rate: float, max_norm: float) -> float:
        """See `Engine`; DeepSpeed clips by the constructor's norm."""
        assert max_norm == self._max_norm
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        own = self._plain_norm() if self._stage == 0 else None
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if own is None else own
        return math.nan if norm is None else float(norm)

    def _plain_norm(self) -> float:
        """The gradient norm at stage 0, which reports none; its gradients are whole on every rank."""
        wrapped = self._engine.optimizer
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not gradients:  # bf16: they are in the fp32 copy
            told = getattr(wrapped, "get_grads_for_norm", None)
            gradients = list(told()) if told is not None else []
        return float(torch.nn.utils.get_total_norm([g.float() for g in gradients]))

    def state(self) -> dict[str, Any]:
        """See `Engine`: DeepSpeed writes its own files."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Engine`."""

    def forget(self) -> None:
        """See `Engine`."""

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path, notes: dict[str, Any]) -> None:
        """See `Engine`. Another number of ranks reads DeepSpeed's universal format, which is made once.

        Raises:
            EngineError: Another ZeRO stage, or a number of ranks that DeepSpeed cannot convert to.
        """
        stage, world = notes["zero"], int(notes["world"])
        if stage != self._stage:
            raise EngineError(
                f"a checkpoint of engine.zero={stage} cannot be loaded with engine.zero={self._stage} "
                "(DeepSpeed does not change stages)"
            )
        # Read its own form, or the universal one.
        config = self._engine._config
        tag = TAG if world == self.data_world or self._stage == 0 else UNIVERSAL
        if tag == UNIVERSAL:
            self._convert(folder)
        config.load_universal_checkpoint = tag == UNIVERSAL
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._engine.optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if tag == UNIVERSAL:
            self._repair(settings, int(notes["step"]))
        config.load_universal_checkpoint = False
        if path is None:
            raise EngineError(f"{folder}: DeepSpeed could not read its checkpoint")

    def _repair(self, settings: list[dict[str, Any]], step: int) -> None:
        """Undo what loading the universal form does to a torch optimiser (seen in DeepSpeed 0.19.8).

        It gives all groups the first one's settings, so weight decay reaches norms and biases. It also gives all
        parameters one counter of steps, which then counts each step once per parameter.
        """
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        for group, own in zip(inner.param_groups, settings, strict=True):
            group.update(own)
        for moments in inner.state.values():
            moments["step"] = torch.tensor(float(step), device=moments["exp_avg"].device)  # fused kernels want it there

    def _convert(self, folder: Path) -> None:
        """Write the universal form beside the native one; rank 0 alone."""

        def work() -> None:
            target, temporary = folder / UNIVERSAL, folder / (UNIVERSAL + ".tmp")
            if target.exists():
                return
            shutil.rmtree(temporary, ignore_errors=True)  # of a start that was killed
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(folder / TAG), "--output_folder", str(temporary)]
            command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
            command += ["--inject_missing_state"] if self._stage < 3 else []
            kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
                raise EngineError(f"{folder}: DeepSpeed cannot convert it for {self.data_world} ranks ({last})")
            temporary.replace(target)

        on_first_rank(work)

    def destroy(self) -> None:
        """See `Engine`."""
        self._engine.destroy()


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return {k: _cast(v, dtype) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
