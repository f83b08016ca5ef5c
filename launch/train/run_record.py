"""The record of one start of a training, and the line that sums it up for people."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.config import Config
from launch.data.pictures import Files
from launch.engines.ranks import Ranks, device_name
from launch.records.record import git_commit, new_record, now

if TYPE_CHECKING:
    import torch

    from launch.train.trainer import Outcome, Trainer

_OPTIMISERS = {"adamw": "AdamW", "adam": "Adam", "asam": "ASAM (Adam)"}


@dataclass
class RunFacts:
    """What the record of a start is made from; `starts` counts all starts, `trainer` is None until it exists."""

    config: Config
    files: Files
    ranks: Ranks
    run_dir: Path
    device: torch.device
    starts: int
    started_at: str = field(default_factory=now)
    trainer: Trainer | None = None

    def record(self, status: str, reason: str | None) -> dict[str, Any]:
        """The record from what this rank knows; no other rank is asked."""
        # What the settings and the machine say.
        config, data, ranks = self.config, self.config.data, self.ranks
        known: dict[str, Any] = {
            "run_id": self.run_dir.name,
            "experiment": config.experiment,
            "status": status,
            "reason": reason,
            "model": config.model.name,
            "decoder": config.model.decoder_name,
            "patching": data.patching,
            "resolution": data.resolution,
            "patch": data.patch,
            "length": data.length,
            "gpus": ranks.world,
            "nodes": ranks.nodes,
            "device": self.device.type,
            "device_name": device_name(self.device),
            "engine": config.engine.name,
            "precision": config.train.precision,
            "attention_backend": _attention_backend(config, self.device),
            "seed": config.train.seed,
            "n_train": len(self.files.split["train"]),
            "n_test": len(self.files.split["test"]),
            "data": data.dir,
            "split_sha256": self.files.split_sha256,
            "config_sha256": config.sha256(),
            "optimiser": _OPTIMISERS[config.train.optimiser],
            "task": config.model.task,
            "global_batch": config.train.batch,
            "samples_per_image": config.samples_per_image,
            "commit": git_commit(),
            "started_at": self.started_at,
            "finished_at": now(),
            "starts": self.starts,
            "preprocessing_seconds": self.files.preprocessing_seconds(),
        }
        # What the training has measured so far.
        trainer = self.trainer
        if trainer is not None:
            rate = trainer.clock.images_per_s
            peak, source = trainer.peak_memory_gib()
            known |= {
                "parameters": trainer.stepper.parameters,
                "steps": trainer.step,
                "epochs": trainer.epochs,
                "train_seconds": trainer.clock.train_seconds,
                "timed_steps": trainer.clock.timed_steps,
                "images_per_s": rate,
                "seconds_per_image": None if rate is None else 1 / rate,
                "peak_memory_gib": peak,
                "memory_source": source,
                "loss_final": _finite(trainer.loss),
                "score_val": trainer.val_score,
                "mfu": trainer.mfu(),
                "train_tflop": trainer.train_tflop,
                "dice_val": trainer.val_score if config.model.task == "segmentation" else None,
            }
        return new_record(**known)

    def final_record(self, outcome: Outcome) -> dict[str, Any]:
        """The record of a start that ended in order; every rank must call it."""
        import torch
        import torch.distributed as dist

        stopped = outcome.stopped_by
        reason = f"{stopped}: checkpointed at step {self.trainer.step}" if stopped and self.trainer else None
        record = self.record("preempted" if stopped else "ok", reason)
        peak = torch.tensor(record["peak_memory_gib"], dtype=torch.float64)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        record["peak_memory_gib"] = float(peak)
        if outcome.test is not None:
            record |= {**outcome.test.record(), "floors": outcome.baselines}
        return new_record(**record)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def status_of(error: BaseException) -> str:
    """`oom`, `timeout` or `failed`, told by the text: torch has no own error types for them on the CPU."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return "oom"
    return "timeout" if isinstance(error, TimeoutError) or "timed out" in text else "failed"


def _attention_backend(config: Config, device: torch.device) -> str | None:
    """The attention kernels that ran, or those that torch may choose from; None without attention."""
    if not config.model.has_attention:
        return None
    import torch

    from hpc_models.blocks import sdpa

    if sdpa.used():
        return ", ".join(sdpa.used())
    if device.type != "cuda":
        return "sdpa (cpu)"
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    allowed = [kind for kind in kinds if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()]
    return f"sdpa ({', '.join(allowed)})"


def summary(record: dict[str, Any]) -> str:
    """The record in one line for people."""
    done = f"{record['steps']} steps in {record['train_seconds']:.0f} s of training"
    if record["status"] != "ok":
        return f"{record['status']} after {done}: {record['reason']}; the same command goes on from there"
    if record["task"] == "classification":
        area = "" if record["auc"] is None else f"auc {record['auc']:.4f}, "
        shown = ", ".join(f"{name} {value:.3f}" for name, value in record["floors"].items())
        sides = "".join(f", {v:.4f} at {side} px" for side, v in (record["accuracy_by_size"] or {}).items())
        return f"{area}accuracy {record['accuracy']:.4f}{sides} on {record['n_test']} test items ({shown}), {done}"
    bounds = {"ceiling": record["dice_ceiling"], **record["floors"]}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in bounds.items())
    return f"dice {record['dice']:.4f} on {record['n_test']} test slides ({shown}), {done}"
