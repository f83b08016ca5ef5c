"""The one training loop: steps, evaluation, checkpoints, stop and resume; it knows engines only by their protocol."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data_prep.system.progress import Progress
from hpc_models import registry
from hpc_models.settings import DataShape
from launch import engines
from launch.config.config import CheckpointConfig, Config, EvalConfig
from launch.data.batches import Prefetch, Sampler
from launch.data.pictures import Files
from launch.data.token_files import TokenFiles
from launch.engines.ranks import Ranks, device_name
from launch.records.clock import Clock
from launch.records.flops import Speed, peak_tflops
from launch.records.record import Metrics, peak_resident_gib
from launch.train import checkpoint
from launch.train.ema import share_statistics
from launch.train.lifetime import StopFlag, signal_name
from launch.train.optim import learning_rate, progress_of
from launch.train.stepper import Stepper, largest_over_ranks, sum_over_ranks
from launch.train.task import Task, TestScores

if TYPE_CHECKING:
    from launch.records.loggers import Sink
    from launch.records.profiling import Profiler


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""


class Outcome(NamedTuple):
    """How a start ended: `test` and `baselines` are None when it was stopped."""

    stopped_by: str
    test: TestScores | None
    baselines: dict[str, float] | None


class Trainer:
    """One start of one run, on one rank; resumes from the newest checkpoint in `run_dir`, which exists.

    `say` prints one line on rank 0. `logs` is the folder of this start, for profiles; None keeps none.
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
        # Build what makes a step: the task, the model, the engine around it.
        torch.manual_seed(train.seed)
        self.task = make_task(config, files)
        model, weights = self._new_model()
        self.stepper = Stepper(config, self.task, model, ranks, device, weights)
        self.engine, self.average = self.stepper.engine, self.stepper.average
        peak = config.log.peak_tflops or peak_tflops(device_name(device), train.precision)
        self.speed = self.stepper.speed = Speed(peak, ranks.world, not config.engine.compile, sum_over_ranks)
        # Start at step 0, or where the newest checkpoint left the run.
        self.sampler = Sampler(len(files.split["train"]), train.batch, train.seed)
        self.clock = Clock()
        self.step = 0
        self.loss: float | None = None
        self.val_score: float | None = None
        self.best: tuple[float, int] | None = None  # best score on val, and its step
        background = config.checkpoint.background
        wanted = device.type == "cuda" if background is None else background
        self._background = checkpoint.BackgroundSaver() if wanted and config.engine.name != "deepspeed" else None
        self._saved_step = self._evaluated_step = -1
        self._saved_at_s = self._evaluated_at_s = 0.0
        self._resume()
        # Open the profile and the metrics file.
        self.profiler: Profiler | None = None
        if config.log.profile_steps is not None and logs is not None:
            from launch.records.profiling import Profiler

            self.profiler = Profiler(config.log.profile_steps, logs, ranks.rank)
        self.metrics = self._open_metrics() if ranks.rank == 0 else None

    def _open_metrics(self) -> Metrics:
        sinks: list[Sink] = []
        if self.config.log.sinks:
            from launch.records.loggers import open_sinks

            sinks = open_sinks(self.config.log.sinks, self.run_dir, self.config.model_dump(mode="json"))
        scored = self._evaluated_step == self.step
        return Metrics(self.run_dir / "metrics.jsonl", self.step, sinks, scored)

    def _new_model(self) -> tuple[torch.nn.Module, dict[str, torch.Tensor] | None]:
        """The bare model with its starting weights; with meta_init the model on meta, and rank 0's weights."""
        config, weights = self.config, None
        whole = not config.engine.meta_init or self.ranks.rank == 0
        if whole:
            model = build_model(config)
            if config.train.init_from is not None:
                from launch.train.weights import load_weights

                load_weights(model, config.train.init_from)
        if config.engine.meta_init:
            weights = model.state_dict() if whole else None
            with torch.device("meta"):
                model = build_model(config)
        return model, weights

    def run(self) -> Outcome:
        """Train to the end or until a signal, then score the test slides."""
        stopped = self._fit()
        self._save()
        self._publish()
        if stopped:
            return Outcome(stopped, None, None)
        if self.config.eval.select == "best" and self.best is not None and self.best[1] != self.step:
            if self._load(self.best[1]) is None:
                raise TrainingError(f"the checkpoint of step {self.best[1]}, the best on val, is gone or damaged")
            self.say(f"scoring the test slides with the weights of step {self.best[1]}, the best on val")
        pictures = self.run_dir / "predictions" if self.config.eval.pictures_px else None
        return Outcome("", self._scores("test", pictures), self.task.trivial_baselines())

    def _scores(self, part: str, pictures: Path | None = None) -> TestScores:
        """Score a split, with the averaged weights if there are any, and log the numbers."""
        share_statistics(self.engine.module, self.average)
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            scores = self.task.evaluate(self.engine, part, self.device, pictures, part)
        numbers = {f"{part}_{name}": value for name, value in scores.numbers().items()}
        self._log(**numbers, train_seconds=self.clock.train_seconds, train_tflop=self.train_tflop)
        return scores

    def _fit(self) -> str:
        """Make steps until the end (returns "") or until a signal (returns its name)."""
        train = self.config.train
        share = self.engine.data_rank, self.engine.data_world
        batches = Prefetch(
            lambda step: self.task.batch(self.sampler.at(step, *share)), self.step, self.config.data.prefetch
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
                    if self.profiler is not None:
                        self.profiler.step()
                    at = min(total or 0, int(self.clock.train_seconds)) if by_time else self.step
                    loss = "" if self.loss is None else f"loss {self.loss:.4f}"
                    bar.update(at - bar.done, f"step {self.step}, {loss}" if by_time else loss)
        finally:
            batches.close()
            if self.profiler is not None:
                self.profiler.close()

    def _agree(self) -> tuple[str, float]:
        """The signal that any rank got ("" for none) and rank 0's training time, the same on every rank.

        One reduction carries both, and whether any rank is still writing a checkpoint. Ranks that decided by their own
        clocks or flags would diverge and hang.
        """
        own = float(self.stop.look())
        writing = float(self._background is not None and self._background.writing)
        elapsed_s = self.clock.train_seconds if self.ranks.rank == 0 else 0.0
        number, elapsed_s, writing = largest_over_ranks([own, elapsed_s, writing])
        if not writing:
            self._publish()
        return signal_name(int(number)), elapsed_s

    def _work_between_steps(self, elapsed_s: float) -> None:
        """Checkpoint and evaluate when due; step and agreed time alone decide, so all ranks do the same."""
        saving, measuring = self.config.checkpoint, self.config.eval
        if self._due(saving, elapsed_s - self._saved_at_s) and self.step != self._saved_step:
            self._saved_at_s = elapsed_s
            self._save()
            self.clock.begin()
        due = self._due(measuring, elapsed_s - self._evaluated_at_s)
        if due and self.files.split["val"] and self.step != self._evaluated_step:
            self._evaluated_at_s, self._evaluated_step = elapsed_s, self.step
            self.val_score = self._scores("val").headline()
            if saving.keep_best and (self.best is None or self.val_score > self.best[0]):
                self.best = (self.val_score, self.step)
                self._saved_step = -1  # a checkpoint of this step lacks the score
                self._save()
            self.clock.begin()

    def _due(self, every: CheckpointConfig | EvalConfig, since_s: float) -> bool:
        due_time = every.every_seconds is not None and since_s >= every.every_seconds
        return due_time or (every.every_steps is not None and self.step > 0 and self.step % every.every_steps == 0)

    def _train_step(self, batches: Prefetch, rate: float) -> None:
        """One optimiser step on the global batch; its loss is the mean over the images of all ranks."""
        train, micro = self.config.train, self.stepper.micro
        batch = next(batches)
        self.clock.waited()
        self.speed.begin(batch)

        def piece(number: int) -> dict[str, torch.Tensor]:
            return {k: v[number * micro : (number + 1) * micro].to(self.device) for k, v in batch.items()}

        total, norm = self.stepper.run(piece, self.step, rate)
        if not math.isfinite(norm):  # checked at every step on every rank, so no checkpoint holds broken weights
            loss = sum_over_ranks(float(total)) / self.ranks.world
            raise TrainingError(f"loss is {loss}, its gradient {norm} in step {self.step + 1}; try a smaller train.lr")
        self.step += 1
        self.speed.stepped()
        logged = self.step % train.log_every == 0 or self.step == train.max_steps
        if logged:
            self.loss = sum_over_ranks(float(total)) / self.ranks.world
        spent = self.clock.end(self.config.images_per_step, typical=not self.speed.counting)
        if logged:
            self._log_step(*spent, rate, norm)
            if not math.isfinite(self.loss or 0.0):
                raise TrainingError(f"loss is {self.loss} at step {self.step}; try a smaller train.lr")

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
        """Largest memory of this rank so far, and who measured it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30, "torch.cuda.max_memory_allocated"
        return peak_resident_gib(), "resident set of the process"

    @property
    def train_tflop(self) -> float | None:
        """10^12 FLOPs of all ranks' steps so far (see `Speed`); None before the first step."""
        return self.speed.flops / 1e12 or None

    def mfu(self) -> float | None:
        """Model FLOPs utilisation over the timed steps; None when the gpu's peak is unknown."""
        clock = self.clock
        return self.speed.mfu(clock.timed_seconds / clock.timed_steps) if clock.timed_steps else None

    def close(self) -> None:
        """Close files and free the engine; call it when all ranks are done."""
        if self.metrics is not None:
            self.metrics.close()
        if self._background is not None:
            self._background.close()
        self.engine.destroy()

    def _save(self) -> None:
        if self.step == self._saved_step:
            return
        engine = self.config.engine
        notes = {"step": self.step, "clock": self.clock.notes(), "world": self.ranks.world, "loss": self.loss}
        notes |= {"timed_on": self._timed_on(), "flops": self.speed.flops, "val_score": self.val_score}
        notes |= {"best": self.best, "evaluated_at_s": self._evaluated_at_s, "evaluated_step": self._evaluated_step}
        notes |= {"engine": engine.name, "zero": engine.zero if engine.name == "deepspeed" else None}
        share_statistics(self.engine.module, self.average)
        state = self._state()
        native = self.engine.save if self.config.engine.name == "deepspeed" else None
        best = self.best[1] if self.best else None
        place = checkpoint.Place(self.run_dir / "checkpoints", self.step, self.config.checkpoint.keep, best)
        if self._background is not None:
            self._background.begin(place, state, notes)
        else:
            checkpoint.save(place, state, notes, native)
        self._saved_step = self.step

    def _publish(self) -> None:
        """Wait for the checkpoint that is written in the background, and give it its name."""
        if self._background is not None:
            self._background.publish()

    def _load(self, only: int | None = None) -> dict[str, Any] | None:
        """Load the newest checkpoint, or one step's, into engine and average; returns its notes."""
        state = self._state()
        native = self.engine.load if self.config.engine.name == "deepspeed" else None
        check = partial(engines.check_saved, self.config.engine.name)
        folder = self.run_dir / "checkpoints"
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
        """Go on from the newest sound checkpoint, if there is one."""
        if self.ranks.rank == 0:
            checkpoint.clean(self.run_dir / "checkpoints")
        notes = self._load()
        if notes is None:
            self.engine.forget()
            return
        self.step = self._saved_step = int(notes["step"])
        self.clock = Clock(**notes["clock"])
        if notes["timed_on"] != self._timed_on():  # another machine or world: measure the speed anew
            self.clock = Clock(train_seconds=self.clock.train_seconds)
        self.speed.resume(notes["flops"], self.step)
        self.loss, self.val_score = notes["loss"], notes["val_score"]
        self.best = tuple(notes["best"]) if notes["best"] else None
        self._saved_at_s, self._evaluated_at_s = self.clock.train_seconds, notes["evaluated_at_s"]
        self._evaluated_step = notes["evaluated_step"]
        self.say(f"resumed at step {self.step} ({self.clock.train_seconds:.1f} s of training, {notes['world']} ranks)")


def make_task(config: Config, files: Files) -> Task:
    """The task of a configuration's model.

    Raises:
        ConfigError: Labels are missing or do not fit.
    """
    if config.model.task == "classification":
        from launch.train.classification import Classification

        return Classification(config, files)
    from launch.train.segmentation import Segmentation

    assert isinstance(files, TokenFiles)
    return Segmentation(config, files)


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
