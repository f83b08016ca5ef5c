"""One start of a training run on one rank: prepare, train, write the record, end with the right exit code.

Importing it must not import torch: settings and folders are checked before torch is loaded.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_prep.system.files import write_atomic
from launch.config.config import Config, ConfigError
from launch.data.pictures import Files, open_files
from launch.engines import ranks as places
from launch.engines.ranks import EXIT_AGAIN, EXIT_CONFIG, EXIT_CRASH, EXIT_OK, Ranks
from launch.records.loggers import check_sinks
from launch.records.record import (
    environment,
    git_commit,
    memory_summary,
    new_record,
    now,
    read_record,
    to_json,
    write_record,
)
from launch.records.run_dir import OpenedRun, open_run
from launch.train.signals import StopFlag
from launch.train.watchdog import Watchdog

if TYPE_CHECKING:
    import torch

    from launch.train.trainer import Outcome, Trainer


OPTIMISERS = {"adamw": "AdamW", "adam": "Adam", "asam": "ASAM (Adam)"}


def check_world(config: Config, world: int) -> None:
    """Does the global batch fit the ranks, and does the model mean the same on several?

    Raises:
        ConfigError: It does not; the line shows the arithmetic.
    """
    for name, value in (("shard", config.engine.shard or 1), ("sequence", config.engine.sequence)):
        if world % value:
            raise ConfigError(f"engine.{name}={value} does not divide the {world} ranks")
    batch, parts = config.train.batch, config.train.accumulate
    world //= config.engine.sequence
    if batch % (world * parts):
        below = batch - batch % (world * parts)
        near = " or ".join(str(n) for n in (below, below + world * parts) if n)
        raise ConfigError(
            f"train.batch={batch} cannot be shared: {batch} / ({world} ranks x {parts} accumulate) = "
            f"{batch / (world * parts):g} images per forward pass; use train.batch={near}"
        )
    if world > 1 and getattr(config.model, "norm", "") == "batch":
        raise ConfigError("model.norm=batch keeps other statistics on each rank; use instance or none, or one rank")


def check_model(config: Config) -> None:
    """Can the model be built with these settings? Looks at shapes only, no memory is taken.

    Raises:
        ConfigError: It cannot; the line is the model's own.
    """
    import torch

    from launch.train.trainer import build_model

    try:
        with torch.device("meta"):
            model = build_model(config)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from None
    in_sequence = getattr(model, "decoder_kind", "") == "raster" or getattr(model, "layout", "") == "sequence"
    if in_sequence and config.data.patching == "apf" and getattr(model, "uniform", False):
        raise ConfigError(
            f"data.length={config.data.length} is (resolution / patch)^2, which a model that takes the sequence as a "
            "picture reads as uniform patching: choose a smaller square, or model.decoder=geometric (layout=geometric)"
        )
    for side in config.eval.sizes:  # found out now, not at the end of the training
        try:
            with torch.no_grad():
                model.eval()(torch.empty(1, config.data.channels, side, side, device="meta"))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"eval.sizes: model.name={config.model.name} at {side} px: {reason}") from None
    if config.train.init_from is not None:
        from launch.train.weights import check_weights

        check_weights(model, config.train.init_from)


def train(config: Config) -> int:
    """Run or resume a training run; ends the process itself once the ranks are joined.

    Returns:
        0 for a finished run that needed no ranks; otherwise it does not return.

    Raises:
        ConfigError, RankError: Something asked for is wrong; exit code 64.
    """
    ranks = places.find_ranks()
    places.end_with_launcher(ranks)
    check_world(config, ranks.world)
    check_sinks(config.log.sinks)
    files = open_files(config.data)
    run_dir = config.run_dir(ranks.world)
    if ranks.world == 1 and not config.force and _finished(run_dir, config):
        return EXIT_OK
    check_model(config)
    if ranks.rank == 0 and config.train.init_from is not None:
        _tell_other_settings(config)
    threads = places.share_threads(ranks, config.engine.threads)
    device = places.pick_device(config.engine.device, ranks)
    # Longer than the watchdog's patience: it should speak first, since it knows where everyone is.
    places.start(ranks, device, max(1800.0, 300.0 + (config.log.hang_seconds or 0.0)))
    opened = open_together(config, files, ranks, run_dir)
    if opened.finished:
        if ranks.rank == 0:
            _tell_finished(run_dir)
        places.finish(EXIT_OK)
    return places.finish(Start(config, files, ranks, run_dir, device, opened, threads).run())


def _tell_other_settings(config: Config) -> None:
    from launch.train.weights import other_settings

    if others := other_settings(config):
        what = "its model was trained with other settings (there -> here)"
        print(f"note: train.init_from={config.train.init_from}: {what}: {'; '.join(others)}", file=sys.stderr)


def _finished(run_dir: Path, config: Config) -> bool:
    """Is there nothing to do? A quick look for single processes, before torch is loaded."""
    finished = _is_finished(run_dir, config)
    if finished:
        _tell_finished(run_dir)
    return finished


def _is_finished(run_dir: Path, config: Config) -> bool:
    record = read_record(run_dir)
    return record is not None and record["status"] == "ok" and record.get("config_sha256") == config.sha256()


def _tell_finished(run_dir: Path) -> None:
    print(f"already finished: {run_dir / 'record.json'} (force=true trains anew)", file=sys.stderr)


def open_together(config: Config, files: Files, ranks: Ranks, run_dir: Path) -> OpenedRun:
    """Rank 0 checks the files and opens the run directory; all ranks get its answer or its error."""
    import torch.distributed as dist

    answer: list[Any] = [None]
    hosts: list[Any] = [None] * ranks.world
    device = places.pick_device(config.engine.device, ranks)
    dist.all_gather_object(hosts, (os.uname().nodename, places.device_name(device)))
    if ranks.rank == 0:
        try:
            # The data first: a run that cannot start leaves no folder behind.
            if config.force or not _is_finished(run_dir, config):
                files.check()
            opened = open_run(run_dir, config)
            if not opened.finished:
                if not (run_dir / "env.json").exists():
                    names, devices = zip(*hosts, strict=True)
                    found_here = environment(list(names), list(devices), ranks.launcher)
                    write_atomic(run_dir / "env.json", to_json(found_here))
            answer = [opened]
        except ConfigError as error:
            answer = [str(error)]
        except OSError as error:
            answer = [f"run_root={config.run_root}: {run_dir}: {error.strerror or error}"]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        if ranks.rank == 0:
            print(f"error: {answer[0]}", file=sys.stderr)
        places.finish(EXIT_CONFIG)
    found: OpenedRun = answer[0]
    return found


class Start:
    """One start: holds what the record needs, whatever happens."""

    def __init__(
        self,
        config: Config,
        files: Files,
        ranks: Ranks,
        run_dir: Path,
        device: torch.device,
        opened: OpenedRun,
        threads: int,
    ) -> None:
        self.config, self.files, self.ranks, self.run_dir, self.device = config, files, ranks, run_dir, device
        self.logs = Path(opened.logs)
        self.starts = opened.starts
        self.started_at = now()
        self.trainer: Trainer | None = None
        self._say(
            f"{config.experiment}: {ranks.world} rank{'s' * (ranks.world > 1)} ({ranks.launcher}), {device.type}, "
            f"{threads} thread{'s' * (threads > 1)} each, {config.engine.name}, {config.train.precision} -> {run_dir}"
        )

    def run(self) -> int:
        """Train and write the record; an error on this rank ends the process.

        Returns:
            The exit code, once all ranks have come to the end.
        """
        stop = StopFlag(self.run_dir / "STOP" if self.ranks.rank == 0 else None)
        stop.install()
        watchdog = Watchdog(self.config.log.hang_seconds, self.logs, self.ranks.rank, self._hangs)
        try:
            from launch.train.trainer import Trainer

            watchdog.start()
            self.trainer = Trainer(
                self.config, self.files, self.ranks, self.device, self.run_dir, stop, self._say, self.logs
            )
            # Every forward pass, in training and in evaluation, is a sign of life.
            self.trainer.engine.module.register_forward_pre_hook(lambda *_: watchdog.beat())
            outcome = self.trainer.run()
            record = self._record(outcome)
            if self.ranks.rank == 0:
                write_record(self.run_dir, record)
            self.trainer.close()
            watchdog.stop()
        except ConfigError as error:  # found on every rank, once the model or the engine was there
            self._fail(error, EXIT_CONFIG)
        except BaseException as error:  # whatever it was, the record says so
            self._fail(error)
        self._say(_summary(record))
        return EXIT_AGAIN if outcome.stopped_by else EXIT_OK

    def _say(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError), (self.logs / "rank-0.log").open("a") as log:  # a full disk: go on
                log.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def _fail(self, error: BaseException, code: int = EXIT_CRASH) -> NoReturn:
        """Write what happened and end at once: the other ranks wait in a collective and cannot be asked."""
        try:
            self._write_failure(error)
        except BaseException as second:  # a full disk must not keep this rank, and so all others, alive
            print(f"error: {error} (and no record could be written: {second})", file=sys.stderr)
        finally:
            places.leave(code)

    def _hangs(self, where: str) -> None:
        """The watchdog's thread found that nothing happens any more."""
        self._fail(TimeoutError(f"{where}; stacks of all threads in {self.logs}"))

    def _write_failure(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        record = self._base(_status_of(error), f"rank {self.ranks.rank}: {reason}")
        first = write_record(self.run_dir, record, first_wins=True)
        with contextlib.suppress(OSError):  # on a full disk the record is worth more than the traceback
            tail = "".join(traceback.format_exception(error))[-8000:]
            (self.logs / f"error-rank-{self.ranks.rank}.txt").write_text(tail)
            if record["status"] == "oom":
                (self.logs / f"memory-rank-{self.ranks.rank}.txt").write_text(memory_summary(self.device))
        if first:
            print(f"error: {reason} (rank {self.ranks.rank}; traceback in {self.logs})", file=sys.stderr)

    # -- record ---------------------------------------------------------------------------------------------------

    def _base(self, status: str, reason: str | None) -> dict[str, Any]:
        """All that is known without asking another rank."""
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
            "device_name": places.device_name(self.device),
            "engine": config.engine.name,
            "precision": config.train.precision,
            "attention_backend": _attention_backend(config, self.device),
            "seed": config.train.seed,
            "n_train": len(self.files.split["train"]),
            "n_test": len(self.files.split["test"]),
            "data": data.dir,
            "split_sha256": self.files.split_sha256,
            "config_sha256": config.sha256(),
            "optimiser": OPTIMISERS[config.train.optimiser],
            "task": config.model.task,
            "global_batch": config.train.batch,
            "samples_per_image": config.samples_per_image,
            "commit": git_commit(),
            "started_at": self.started_at,
            "finished_at": now(),
            "starts": self.starts,
            "preprocessing_seconds": self.files.preprocessing_seconds(),
        }
        trainer = self.trainer
        if trainer is not None:
            rate = trainer.clock.images_per_s
            peak, source = trainer.peak_memory_gib()
            known |= {
                "parameters": trainer.parameters,
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

    def _record(self, outcome: Outcome) -> dict[str, Any]:
        """The record of a start that ended in order; every rank must call it."""
        import torch
        import torch.distributed as dist

        stopped = outcome.stopped_by
        reason = f"{stopped}: checkpointed at step {self.trainer.step}" if stopped and self.trainer else None
        record = self._base("preempted" if stopped else "ok", reason)
        peak = torch.tensor(record["peak_memory_gib"], dtype=torch.float64)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        record["peak_memory_gib"] = float(peak)
        if outcome.test is not None:
            record |= {**outcome.test.record(), "floors": outcome.floors}
        return new_record(**record)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _status_of(error: BaseException) -> str:
    """oom, timeout or failed; torch has types of its own for neither of the first two on the CPU."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return "oom"
    return "timeout" if isinstance(error, TimeoutError) or "timed out" in text else "failed"


def _attention_backend(config: Config, device: torch.device) -> str | None:
    """The kernels that attention ran on, or, before any ran, those torch may choose from; null without attention."""
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


def _summary(record: dict[str, Any]) -> str:
    """One line for people."""
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
