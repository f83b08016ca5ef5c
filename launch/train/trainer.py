"""The one training loop: steps, evaluation, checkpoints, stop and resume; knows engines only by their protocol."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data_prep.system.progress import Progress
from hpc_models import registry
from hpc_models.blocks.checkpointing import frozen_statistics
from hpc_models.settings import DataShape
from hpc_models.training.asam import neighbourhood
from launch import engines
from launch.config.config import Config
from launch.data.batches import Batch, Prefetch
from launch.data.pictures import Files
from launch.data.sampler import Sampler
from launch.engines.ranks import Ranks, device_name
from launch.engines.sequence_parallel import spread_sequences
from launch.records.clock import Clock
from launch.records.flops import Speed, peak_tflops
from launch.records.loggers import open_sinks
from launch.records.profiling import Profiler
from launch.records.record import Metrics, peak_resident_gib
from launch.train import checkpoint
from launch.train.background import BackgroundSaver
from launch.train.classification import Forward
from launch.train.ema import Average, share_statistics
from launch.train.optim import learning_rate, make_optimizer, progress_of
from launch.train.signals import StopFlag, signal_name
from launch.train.task import TestScores, make_task
from launch.train.weights import load_weights


class TrainingError(RuntimeError):
    """Training cannot go on; one line."""


class Outcome(NamedTuple):
    """How a start ended: `test` and `floors` are None when it was stopped before its end."""

    stopped_by: str
    test: TestScores | None
    floors: dict[str, float] | None


class Trainer:
    """One start of one run, on one rank.

    Args:
        config: The run's settings.
        files: Its token files or pictures, already checked.
        ranks: Place of this process.
        device: Device of this process.
        run_dir: The run directory, already made.
        stop: Flag that signals set.
        say: Prints one line; does nothing but on rank 0.
        logs: Folder of this start; None keeps no profile.
    """

    def __init__(
        self,
        config: Config,
        files: Files,
        ranks: Ranks,
        device: torch.device,
        run_dir: Path,
        stop: StopFlag,
        say: Callable[[str], None],
        logs: Path | None = None,
    ) -> None:
        self.config, self.files, self.ranks, self.device = config, files, ranks, device
        self.run_dir, self.stop, self.say = run_dir, stop, say
        train = config.train
        torch.manual_seed(train.seed)
        self.task = make_task(config, files)
        model, weights = self._new_model()
        self.parameters = sum(p.numel() for p in model.parameters())
        parts = train.accumulate * self.task.parts
        self.micro = train.batch // (ranks.world // config.engine.sequence) // train.accumulate
        self.engine = engines.build(
            model,
            config.engine,
            device=device,
            precision=train.precision,
            parts=parts,
            micro=self.micro,
            make_optimizer=lambda module: make_optimizer(module, train),
            max_norm=train.clip,
            local=ranks.local,
            local_world=ranks.local_world,
            weights=weights,
        )
        self.average = None if train.ema_decay is None else Average(self.engine.module, train.ema_decay)
        self.sampler = Sampler(len(files.split["train"]), train.batch, train.seed)
        self.clock = Clock()
        self.step = 0
        self.loss: float | None = None
        self.val_score: float | None = None
        self.best: tuple[float, int] | None = None  # best score on val, and the step it was measured at
        background = config.checkpoint.background
        wanted = device.type == "cuda" if background is None else background
        self._background = BackgroundSaver() if wanted and config.engine.name != "deepspeed" else None
        self._saved_step = -1
        self._saved_at_s = self._evaluated_at_s = 0.0
        self._evaluated_step = -1
        peak = config.log.peak_tflops or peak_tflops(device_name(device), train.precision)
        self.speed = Speed(peak, ranks.world, not config.engine.compile, self._sum_over_ranks)
        self._resume()
        self.profiler = Profiler(config.log.profile_steps, logs, ranks.rank)
        self.metrics: Metrics | None = None
        if ranks.rank == 0:
            sinks = open_sinks(config.log.sinks, run_dir, config.model_dump(mode="json"))
            scored = self._evaluated_step == self.step
            self.metrics = Metrics(run_dir / "metrics.jsonl", self.step, sinks, scored)

    def _new_model(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor] | None]:
        """The bare model with its starting weights; with meta_init only their description, and rank 0's weights."""
        config, weights = self.config, None
        whole = not config.engine.meta_init or self.ranks.rank == 0
        if whole:
            model = build_model(config)
            if config.train.init_from is not None:
                load_weights(model, config.train.init_from)
        if config.engine.meta_init:
            weights = model.state_dict() if whole else None
            with torch.device("meta"):
                model = build_model(config)
        if config.engine.sequence > 1:
            spread_sequences(model, config.engine.sequence)
        return model, weights

    # -- one run --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end or until a signal, then measure on the test slides."""
        stopped = self._fit()
        self._save()
        self._publish()
        if stopped:
            return Outcome(stopped, None, None)
        if self.config.eval.select == "best" and self.best is not None and self.best[1] != self.step:
            if self._load(self.run_dir / "checkpoints", self.best[1]) is None:
                raise TrainingError(f"the checkpoint of step {self.best[1]}, the best on val, is gone or damaged")
            self.say(f"scoring the test slides with the weights of step {self.best[1]}, the best on val")
        pictures = self.run_dir / "predictions" if self.config.eval.pictures_px else None
        test = self._scores("test", pictures)
        return Outcome("", test, self.task.floors())

    def _scores(self, part: str, pictures: Path | None = None) -> TestScores:
        """Score a split, with the averaged weights when there are some, and log it."""
        share_statistics(self.engine.module, self.average)
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        with averaged:
            scores = self.task.evaluate(self.engine, part, self.device, pictures, part)
        numbers = {f"{part}_{name}": value for name, value in scores.numbers().items()}
        self._log(**numbers, train_seconds=self.clock.train_seconds, train_tflop=self.train_tflop)
        return scores

    def _fit(self) -> str:
        """Steps until the end ("") or a signal (its name)."""
        train = self.config.train
        share = self.engine.data_rank, self.engine.data_world
        batches = Prefetch(
            lambda step: self.task.batch(self.sampler.at(step, *share)),
            self.step,
            self.config.data.prefetch,
        )
        by_time = train.max_seconds is not None
        total = int(train.max_seconds or 0) if by_time else train.max_steps
        done = int(self.clock.train_seconds) if by_time else self.step
        unit = "s" if by_time else "steps"
        try:
            with Progress(total, self.config.experiment, unit, rank=self.ranks.rank, initial=done) as bar:
                while True:
                    self.clock.begin()
                    stop_name, elapsed_s = self._agree()
                    progress = progress_of(train, self.step, elapsed_s)
                    if stop_name or progress >= 1:
                        return stop_name
                    self._work_between_steps(elapsed_s)
                    self._train_step(batches, learning_rate(train, progress))
                    self.profiler.step()
                    at = min(total or 0, int(self.clock.train_seconds)) if by_time else self.step
                    loss = "" if self.loss is None else f"loss {self.loss:.4f}"
                    bar.update(at - bar.done, f"step {self.step}, {loss}" if by_time else loss)
        finally:
            batches.close()
            self.profiler.close()

    def _agree(self) -> tuple[str, float]:
        """Name of the signal that any rank got ("" for none) and rank 0's training time, the same on every rank.

        One reduction carries both, and whether anyone is still writing a checkpoint: ranks that decided by their own
        clocks or flags would part ways and hang.
        """
        own = float(self.stop.look())
        writing = float(self._background is not None and self._background.writing)
        elapsed_s = self.clock.train_seconds if self.ranks.rank == 0 else 0.0
        values = torch.tensor([own, elapsed_s, writing], dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        if not values[2]:
            self._publish()
        number = int(values[0])
        return signal_name(number), float(values[1])

    def _work_between_steps(self, elapsed_s: float) -> None:
        """Checkpoint and evaluation when they are due; decided by step and the agreed time alone."""
        saving, measuring = self.config.checkpoint, self.config.eval
        due_time = saving.every_seconds is not None and elapsed_s - self._saved_at_s >= saving.every_seconds
        due_step = saving.every_steps is not None and self.step > 0 and self.step % saving.every_steps == 0
        if (due_step or due_time) and self.step != self._saved_step:
            self._saved_at_s = elapsed_s
            self._save()
            self.clock.begin()
        due_time = measuring.every_seconds is not None and elapsed_s - self._evaluated_at_s >= measuring.every_seconds
        due_step = measuring.every_steps is not None and self.step > 0 and self.step % measuring.every_steps == 0
        if (due_step or due_time) and self.files.split["val"] and self.step != self._evaluated_step:
            self._evaluated_at_s, self._evaluated_step = elapsed_s, self.step
            self.val_score = self._scores("val").headline()
            if saving.keep_best and (self.best is None or self.val_score > self.best[0]):
                self.best = (self.val_score, self.step)
                self._saved_step = -1  # a checkpoint of this step lacks the score
                self._save()
            self.clock.begin()

    # -- one step -------------------------------------------------------------------------------------------------

    def _train_step(self, batches: Prefetch, rate: float) -> None:
        """One optimiser step on the global batch; its loss is the mean over the images of all ranks."""
        train = self.config.train
        batch: Batch = next(batches)
        self.clock.waited()
        self.speed.begin(batch)
        # Dropout must not depend on how often a run was restarted: the generator's state is a function of the step.
        torch.manual_seed(self._seed_of_step())
        total = self._gradients(batch)
        if train.optimiser == "asam":
            # The second pass sees the same batch and the same dropout; its batch statistics are not counted again.
            with neighbourhood(self.engine.module.parameters(), train.rho), frozen_statistics(self.engine.module):
                torch.manual_seed(self._seed_of_step())
                self._gradients(batch)
        norm = self.engine.step(rate, train.clip)
        if not math.isfinite(norm):  # the same on every rank, at every step: no broken weights reach a checkpoint
            raise TrainingError(
                f"loss is {self._mean_over_ranks(total)}, its gradient {norm} in step {self.step + 1}; "
                "try a smaller train.lr"
            )
        self.step += 1
        self.speed.stepped()
        if self.average is not None:
            self.average.update(self.step)
        logged = self.step % train.log_every == 0 or self.step == train.max_steps
        if logged:
            self.loss = self._mean_over_ranks(total)
        spent = self.clock.end(self.config.images_per_step, typical=not self.speed.counting)
        if logged:
            self._log_step(*spent, rate, norm)
            if not math.isfinite(self.loss or 0.0):
                raise TrainingError(f"loss is {self.loss} at step {self.step}; try a smaller train.lr")

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Back-propagate this rank's share of a step, part by part; returns its share of the loss."""
        total = torch.zeros((), device=self.device)
        accumulate, parts = self.config.train.accumulate, self.task.parts
        micro = self.micro
        share = micro * accumulate
        for piece in range(accumulate):
            inputs = {k: v[piece * micro : (piece + 1) * micro].to(self.device) for k, v in batch.items()}
            losses = self.task.losses(self.engine.forward, inputs, self._teacher())
            for part in range(parts):
                last = piece == accumulate - 1 and part == parts - 1
                with self.engine.micro_step(last=last):
                    with self.speed.forward():
                        loss = next(losses).sum() / (share * parts)
                    self.engine.backward(loss)
                total += loss.detach()
        return total

    def _teacher(self) -> Forward | None:
        """The averaged model as a function, when it teaches."""
        if self.average is None or not self.config.train.distill:
            return None
        return self.average.teacher(self.speed.no_backward()(self.engine.forward))

    def _seed_of_step(self) -> int:
        text = f"{self.config.train.seed}/{self.step}/{self.ranks.rank}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _mean_over_ranks(self, value: torch.Tensor) -> float:
        return self._sum_over_ranks(float(value)) / self.ranks.world

    @staticmethod
    def _sum_over_ranks(value: float) -> float:
        summed = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(summed)
        return float(summed)

    # -- writing --------------------------------------------------------------------------------------------------

    def _log_step(self, seconds: float, waiting_percent: float, rate: float, norm: float) -> None:
        finite = self.loss is not None and math.isfinite(self.loss)
        self._log(
            epoch=self.epochs,
            train_seconds=self.clock.train_seconds,
            loss=self.loss if finite else None,
            lr=rate,
            grad_norm=norm if math.isfinite(norm) else None,
            images_per_s=self.config.images_per_step / seconds,
            **{"data_loading(%)": waiting_percent, "memory/max_active(GiB)": self.peak_memory_gib()[0]},
            **self.speed.end(seconds),
            train_tflop=self.train_tflop,
        )

    def _log(self, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(step=self.step, **values)

    @property
    def epochs(self) -> float:
        """Passes over the pixels of the training slides so far."""
        return self.step * self.config.images_per_step / self.sampler.images

    def peak_memory_gib(self) -> tuple[float, str]:
        """Largest memory of this rank so far and where the number is from."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30, "torch.cuda.max_memory_allocated"
        return peak_resident_gib(), "resident set of the process"

    @property
    def train_tflop(self) -> float | None:
        """FLOPs of all ranks' steps so far, in units of 10^12; see `Speed`. None before the first."""
        return self.speed.flops / 1e12 or None

    def mfu(self) -> float | None:
        """Model FLOPs utilisation over the timed steps; None when the gpu's peak is not known."""
        clock = self.clock
        return self.speed.mfu(clock.timed_seconds / clock.timed_steps) if clock.timed_steps else None

    def close(self) -> None:
        """Let go of files and of what the engine holds, once all ranks are done."""
        if self.metrics is not None:
            self.metrics.close()
        if self._background is not None:
            self._background.close()
        self.engine.destroy()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.step == self._saved_step:
            return
        notes = {"step": self.step, "clock": self.clock.notes(), "world": self.ranks.world, "loss": self.loss}
        notes["timed_on"] = self._timed_on()
        notes |= {"val_score": self.val_score, "best": self.best, "evaluated_at_s": self._evaluated_at_s}
        notes |= {"evaluated_step": self._evaluated_step, "flops": self.speed.flops}
        engine = self.config.engine
        notes |= {"engine": engine.name, "zero": engine.zero if engine.name == "deepspeed" else None}
        share_statistics(self.engine.module, self.average)
        state = self._state()
        native = self.engine.save if self.config.engine.name == "deepspeed" else None
        best = self.best[1] if self.best else None
        folder, keep = self.run_dir / "checkpoints", self.config.checkpoint.keep
        if self._background is not None:
            self._background.begin(checkpoint.Place(folder, self.step, keep, best), state, notes)
        else:
            checkpoint.save(folder, self.step, state, notes, keep, native, best)
        self._saved_step = self.step

    def _publish(self) -> None:
        """Give a checkpoint that was written in the background its name; waits for it."""
        if self._background is not None:
            self._background.publish()

    def _load(self, folder: Path, only: int | None = None) -> dict[str, Any] | None:
        """Weights, optimiser and average of a checkpoint, the newest or that of one step; returns its notes."""
        state = self._state()
        native = self.engine.load if self.config.engine.name == "deepspeed" else None
        check = partial(engines.check_saved, self.config.engine.name)
        notes = checkpoint.load_newest(folder, state, self.say, native, only, check)
        if notes is not None:
            self.engine.restore(state)
            if self.average is not None:
                self.average.weights.update(state["average"])
        return notes

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; loading fills it in place."""
        state = self.engine.state()
        return state if self.average is None else {**state, "average": dict(self.average.weights)}

    def _timed_on(self) -> list[Any]:
        """What the speed of a step depends on besides the settings."""
        return [self.ranks.world, self.ranks.nodes, device_name(self.device), torch.get_num_threads()]

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, when there is one."""
        folder = self.run_dir / "checkpoints"
        if self.ranks.rank == 0:
            checkpoint.clean(folder)
        notes = self._load(folder)
        if notes is None:
            self.engine.forget()
            return
        self.step = self._saved_step = int(notes["step"])
        self.clock = Clock(**notes["clock"])
        if notes.get("timed_on") != self._timed_on():  # the record's speed is that of the machine it names
            self.clock = Clock(train_seconds=self.clock.train_seconds)
        if "flops" in notes:
            self.speed.resume(notes["flops"], self.step)
        self.loss, self.val_score = notes["loss"], notes["val_score"]
        self.best = tuple(notes["best"]) if notes["best"] else None
        self._saved_at_s, self._evaluated_at_s = self.clock.train_seconds, notes["evaluated_at_s"]
        self._evaluated_step = notes.get("evaluated_step", -1)  # older checkpoints do not say
        self.say(f"resumed at step {self.step} ({self.clock.train_seconds:.1f} s of training, {notes['world']} ranks)")


def build_model(config: Config) -> torch.nn.Module:
    """The single-device model that a configuration names."""
    data = config.data
    shape = DataShape(
        size_px=data.crop_px if data.kind == "tiles" else data.resolution,
        patch=data.patch,
        length=data.length,
        classes=data.classes,
        in_channels=data.channels,
        image_hw=(data.crop_px,) * 2 if data.kind == "tiles" else data.image_hw or (data.resolution,) * 2,
    )
    return registry.make(config.model, shape)
