"""One training step of an experiment as rank 0 of any number of gpus, on fake tensors, and its counts.

It is the trainer's own step (`launch.train.stepper`); only the batch is made up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from data_prep.tree.quadtree import budget_tree
from data_prep.tree.uniform import uniform_leaves
from launch.config.config import Config
from launch.config.data import DataConfig
from launch.data.augment import leaves_in_square
from launch.data.batches import padded_length, part_side
from launch.data.token_files import TokenFiles
from launch.engines.base import Engine
from launch.engines.deepspeed import import_deepspeed
from launch.engines.fsdp import shard_size
from launch.engines.ranks import Ranks
from launch.plan.ledger import Arithmetic, Collective, Ledger
from launch.plan.world import pretend
from launch.train.checks import check_world
from launch.train.classification import Classification
from launch.train.segmentation import Segmentation
from launch.train.stepper import Stepper, largest_over_ranks, sum_over_ranks
from launch.train.trainer import build_model

_FINEST_CELLS = 512  # side of the grid under made-up trees; no leaf is smaller than one of its cells
_PLACES = 16  # places of parts across the frame, from which the usual one is taken
# The first step makes the optimiser's moments; ZeRO-3 follows its trace from the third on.
_WARM_UPS = {"ddp": 1, "fsdp": 1, "deepspeed": 2}


class _Unlabelled(Classification):
    """The loss of a classification for made-up batches: there are no files to take labels from."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.parts = max(1, len(config.data.sizes))


@dataclass(frozen=True)
class Counts:
    """What one step does on one rank."""

    gpus: int
    engine: str  # what holds the model: ddp, fsdp, hsdp or zero0 .. zero3
    parameters: int  # of the bare model
    images: int  # of the global batch
    micro: int  # images per forward pass of this rank
    tokens: int | None  # per image, without padding; None for pictures
    peak_bytes: int  # largest live memory of torch's tensors during the step
    memory: dict[str, int]  # the peak by kind
    collectives: list[Collective]  # in order
    work: dict[str, Arithmetic]  # by precision
    matrix_operations: dict[tuple[str, int, int], int]  # see `Ledger`
    operations: int  # see `Ledger`
    seconds: float  # that counting took

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate; recomputed activations count as often as they are computed."""
        return sum(work.flops for work in self.work.values())


def engine_label(config: Config, world: int, local_world: int) -> str:
    """The engine in the words of `--engine`."""
    engine = config.engine
    if engine.name == "deepspeed":
        return f"zero{engine.zero}"
    if engine.name == "fsdp" and shard_size(engine, world, local_world) < world:
        return "hsdp"
    return engine.name


def made_up_batch(config: Config, images: int) -> dict[str, torch.Tensor]:
    """A training batch of the shapes that the data section says; its leaves lie as in a real tree.

    Call it inside `pretend`: floating point tensors are then fake, integers and flags are real.
    """
    data = config.data
    batch: dict[str, torch.Tensor] = {}
    if data.kind == "images":
        h, w = data.image_hw or (data.resolution, data.resolution)
        batch["image"] = torch.empty(images, data.channels, h, w)
    elif data.kind == "tiles" and data.labels is not None:
        batch["image"] = torch.empty(images, 3, data.crop_px, data.crop_px)
    else:
        batch |= _tokens(config, images)
    if data.labels is not None:
        batch["label"] = torch.zeros(images, dtype=torch.int64)
    return batch


def _tokens(config: Config, images: int) -> dict[str, torch.Tensor]:
    data = config.data
    if data.kind == "tiles":
        length, side = 1, data.crop_px
        xy, size = np.zeros((1, 2), np.int64), np.full(1, side, np.int64)
    else:
        length, side = data.length, data.patch
        xy, size = made_up_leaves(data, length)
    if data.kind == "tokens" and data.part < 1:
        kept = _usual_part(xy, size, data.resolution, part_side(data.part, data.resolution))
        xy, size = xy[kept], size[kept]
        length = padded_length(len(size), length)
    rows = len(size)
    pad = length - rows
    places = torch.from_numpy(np.pad(xy, ((0, pad), (0, 0))))
    batch = {
        "tokens": torch.empty(images, length, side, side, 3),
        "leaf_xy": places.repeat(images, 1, 1),
        "leaf_size": torch.from_numpy(np.pad(size, (0, pad))).repeat(images, 1),
        "valid": (torch.arange(length) < rows).repeat(images, 1),
    }
    if data.labels is None:
        batch["content_counts"] = torch.empty(images, length, side, side)
        batch["mask_counts"] = torch.empty(images, length, side, side, data.classes)
    return batch


def _usual_part(
    xy: np.ndarray[Any, Any], size: np.ndarray[Any, Any], resolution: int, side_px: int
) -> np.ndarray[Any, Any]:
    """The leaves (N,) bool of the part whose number of leaves is nearest to the mean over the frame."""
    places = np.linspace(0, resolution - side_px, _PLACES).astype(np.int64)
    frame = (resolution, resolution)
    parts = [leaves_in_square(xy, size, frame, np.array([x, y]), side_px) for y in places for x in places]
    counts = np.array([part.sum() for part in parts])
    return parts[int(np.argmin(np.abs(counts - counts.mean())))]


def made_up_leaves(data: DataConfig, length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """At most `length` leaves of a slide with one round, detailed region.

    Returns:
        Top left corners (N, 2) and sides (N,) int64 in frame pixels, in Morton order.
    """
    if data.patching == "uniform":
        leaves = uniform_leaves(data.resolution, data.patch)
    else:
        cells = min(data.resolution // data.patch, _FINEST_CELLS)
        y, x = np.indices((cells, cells))
        ring = np.abs(np.hypot(x - cells / 2, y - cells / 2) / cells - 0.3)
        counts = np.maximum(1, (64 * (1 - ring)).astype(np.int64))
        leaves = budget_tree(counts, data.resolution // cells, length)
    return leaves.xy.astype(np.int64), leaves.size.astype(np.int64)


def make_stepper(config: Config, world: int, local_world: int) -> Stepper:
    """What makes the steps of a training, as rank 0 of `world`; call it inside `pretend`."""
    classifies = config.model.task == "classification"
    task = _Unlabelled(config) if classifies else Segmentation(config, cast(TokenFiles, None))
    ranks = Ranks(0, world, 0, local_world, -(-world // local_world), "alone", "")
    return Stepper(config, task, build_model(config), ranks, torch.device("cpu"))


def count(config: Config, world: int, local_world: int, whole_batch: bool = True) -> Counts:
    """Count a step of a run that has settled, on `world` gpus with `local_world` on a node.

    With `whole_batch` all of the rank's batch lies in the counted memory, as on CPUs. Gpus hold one part of it at a
    time.

    Raises:
        ConfigError: The batch, the model or the engine does not fit that many gpus.
    """
    started = time.perf_counter()
    check_world(config, world)
    if config.engine.name == "deepspeed":
        import_deepspeed()  # before there is a world, which it would remember
    with pretend(world):
        # Make the trainer's step and a batch for it.
        stepper = make_stepper(config, world, local_world)
        micro, module = stepper.micro, stepper.engine.module
        batch = made_up_batch(config, micro * (config.train.accumulate if whole_batch else 1))

        def piece(number: int) -> dict[str, torch.Tensor]:
            return {k: v[number * micro % len(v) :][:micro] for k, v in batch.items()}

        # Say what memory is for; the rest is activations.
        ledger = Ledger()
        ledger.hold([*module.parameters(), *module.buffers()], "parameters")
        hold = partial(_hold_extras, ledger, stepper)
        hold()
        _tell_kinds(ledger, stepper.engine, hold)
        # Make steps until they settle; the last one counts.
        with ledger:
            ledger.hold(batch, "activations")
            for step in range(_WARM_UPS[config.engine.name] + 1):
                hold()
                ledger.start_counting()
                mark = ledger.events()
                # As the trainer does: the ranks agree on signal, time and checkpoint, step, and share the loss.
                largest_over_ranks([0.0, 0.0, 0.0])
                loss, _ = stepper.run(piece, step, config.train.lr)
                sum_over_ranks(float(loss))
        peak, memory = ledger.peak(mark)
        tokens = int(batch["valid"][0].sum()) if "valid" in batch else None
    return Counts(
        gpus=world,
        engine=engine_label(config, world, local_world),
        parameters=stepper.parameters,
        images=config.train.batch,
        micro=micro,
        tokens=tokens,
        peak_bytes=peak,
        memory=memory,
        collectives=ledger.collectives,
        work=ledger.work,
        matrix_operations=ledger.matrix_operations,
        operations=ledger.operations,
        seconds=time.perf_counter() - started,
    )


def _tell_kinds(ledger: Ledger, engine: Engine, hold: Callable[[], None]) -> None:
    """Make an engine say what memory is for while it lives: gradients, and the buckets of a backward pass."""
    backward, step = engine.backward, engine.step

    def told_backward(loss: torch.Tensor) -> None:
        hold()
        backward(loss)

    def told_step(rate: float, max_norm: float) -> float:
        ledger.hold([p.grad for p in engine.module.parameters() if p.grad is not None], "gradients")
        hold()
        return step(rate, max_norm)

    vars(engine).update(backward=told_backward, step=told_step)


def _hold_extras(ledger: Ledger, stepper: Stepper) -> None:
    """Say what memory is for that the model does not own."""
    engine = stepper.engine
    ledger.hold(getattr(getattr(engine, "_ddp", None), "bucket", None), "gradients")
    if stepper.average is not None:
        ledger.hold(stepper.average.weights, "optimizer")
    optimizer = getattr(engine, "optimizer", None) or _hold_zero(ledger, engine)
    ledger.hold([list(state.values()) for state in optimizer.state.values()], "optimizer")


def _hold_zero(ledger: Ledger, engine: Engine) -> Any:
    """The same for DeepSpeed's buckets, shards and fp32 copies; returns the optimiser inside."""
    zero = engine._engine.optimizer  # type: ignore[attr-defined]
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        ledger.hold(bucket.buffer, "gradients")
    for name in ("grad_partitions_flat_buffer", "averaged_gradients"):
        ledger.hold(getattr(zero, name, None), "gradients")
    own = list(engine.module.parameters())
    ledger.hold([p.ds_tensor for p in own if hasattr(p, "ds_tensor")], "parameters")
    inner = getattr(zero, "optimizer", zero)
    copies = [p for group in inner.param_groups for p in group["params"]]
    if not {id(p) for p in copies} & {id(p) for p in own}:
        ledger.hold(copies, "optimizer")
    return inner
