"""Exact pixel Dice of a model on a split, slides shared over ranks, each counted once; also saves small pictures.

Knows engines only by `forward`; counts are integers, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_prep.system.files import write_atomic
from data_prep.system.progress import Progress
from data_prep.tokens.ceiling import ceiling, pixel_dice_from_cells
from data_prep.tokens.token_set import TokenSet
from hpc_models.segmentation.sliding_window import sliding_window
from hpc_models.training import metrics
from launch.config.config import Config
from launch.data.batches import collate, padded_length, parts_of, take, token_sample
from launch.data.token_files import Raster, TokenFiles
from launch.engines.base import Engine
from launch.train.classification import Forward
from launch.train.prediction_pictures import class_gray, paint, picture_side, save_png


@dataclass(frozen=True)
class Scores:
    """Counts of a split after all ranks have added theirs.

    Attributes:
        names: Slides.
        counts: (slides, K, 3) int64: intersection, prediction, truth in frame pixels.
        ceilings: Best Dice each slide's tree can reach, mean over classes.
        tokens: Valid tokens of each slide.
    """

    names: list[str]
    counts: torch.Tensor
    ceilings: list[float]
    tokens: list[int]

    def per_slide(self) -> dict[str, float]:
        """Dice of each slide, mean over classes."""
        return dict(zip(self.names, metrics.dice_per_slide(self.counts).tolist(), strict=True))

    def headline(self) -> float:
        """What model selection looks at: the mean Dice."""
        return self.mean()

    def numbers(self) -> dict[str, float | None]:
        """What metrics.jsonl keeps."""
        return {"dice": self.mean(), "dice_pooled": self.pooled()}

    def record(self) -> dict[str, Any]:
        """What the record keeps."""
        return {
            "dice": self.mean(),
            "dice_pooled": self.pooled(),
            "dice_per_slide": self.per_slide(),
            "dice_ceiling": sum(self.ceilings) / len(self.ceilings),
            "tokens_per_image": sum(self.tokens) / len(self.tokens),
        }

    def mean(self) -> float:
        """Mean of the slides' Dice."""
        return float(metrics.dice_per_slide(self.counts).mean())

    def pooled(self) -> float:
        """Dice of all slides as one picture, mean over classes."""
        return float(metrics.dice_pooled(self.counts))


@torch.no_grad()
def evaluate(
    engine: Engine,
    config: Config,
    files: TokenFiles,
    part: str,
    device: torch.device,
    pictures: Path | None = None,
    label: str = "eval",
) -> Scores:
    """Dice of the engine's model on one split; every rank must call it.

    Args:
        engine: The wrapped model; left in training mode.
        config: The run's configuration.
        files: Its token files.
        part: train, val or test.
        device: This rank's device.
        pictures: Folder for small pictures and counts of each slide; None saves nothing.
        label: Name on the progress bar.
    """
    names = files.split[part]
    rank, world = engine.data_rank, engine.data_world
    counts = torch.zeros(len(names), config.data.classes, 3, dtype=torch.int64)
    extra = torch.zeros(len(names), 2, dtype=torch.float64)
    engine.module.eval()
    with Progress(len(names), label, "slides", rank=dist.get_rank()) as bar:
        for first in range(0, len(names), world):
            # With parameters spread over ranks all of them must run the model together: in the last round a rank
            # without a slide of its own repeats the last one and throws the answer away.
            index = min(first + rank, len(names) - 1)
            mine = first + rank < len(names) and engine.first_of_share
            folder = pictures if mine else None
            result = _slide(engine, config, files, names[index], device, folder)
            if mine:
                counts[index] = torch.from_numpy(result[0])
                extra[index] = torch.tensor(result[1:], dtype=torch.float64)
            bar.update(min(world, len(names) - first))
    engine.module.train()
    dist.all_reduce(counts)
    dist.all_reduce(extra)
    return Scores(list(names), counts, extra[:, 0].tolist(), [int(n) for n in extra[:, 1].tolist()])


def _slide(
    engine: Engine, config: Config, files: TokenFiles, name: str, device: torch.device, folder: Path | None
) -> tuple[NDArray[np.int64], float, int]:
    """Counts (K, 3), ceiling and tokens of one slide."""
    tokens = files.load(name)
    assert tokens.mask_counts is not None
    truth = files.truth_pixels(name, tokens)
    if config.data.kind == "tiles":
        raster = files.load_raster(name)
        # Ranks that share parameters must run the model equally often, whatever their slides hold.
        logits = raster_logits(engine.forward, config, raster, device, everywhere=engine.data_world > 1)
        predicted = (logits > 0).permute(1, 2, 0).cpu().numpy()
        counts = raster_counts(predicted, raster)
        if folder is not None:
            _save(folder, name, counts, _raster_pictures(raster, predicted, config.eval.pictures_px))
    else:
        predicted = token_logits(engine.forward, config, tokens, device).numpy() > 0
        counts = np.stack(pixel_dice_from_cells(predicted, tokens.mask_counts, tokens.content_counts), axis=-1)
        counts[:, 2] = truth  # what lies in no token is missed
        if folder is not None:
            _save(folder, name, counts, _token_pictures(tokens, predicted, config.eval.pictures_px))
    best = ceiling(tokens.mask_counts, tokens.content_counts, truth.tolist())
    return counts, float(np.mean(best)), len(tokens.tokens)


def token_logits(forward: Forward, config: Config, tokens: TokenSet, device: torch.device) -> torch.Tensor:
    """Logits per cell, (N, p, p, K), from the whole tree at once, or the mean of what overlapping parts say.

    A model that was trained on parts has not seen leaves of white padding, which would shift its norms.
    """
    data = config.data
    if data.part == 1:
        return _forward(forward, tokens, data.length, device).cpu()
    content = np.flatnonzero(tokens.has_content)
    parts = [(content if len(content) else np.arange(len(tokens)), np.ones(max(1, len(content)), np.float32))]
    if config.eval.part is not None:
        parts = parts_of(tokens, config.eval.part, data.overlap)
    total, weight = torch.zeros(()), torch.zeros(len(tokens), 1, 1, 1)
    for rows, weights in parts:
        logits = _forward(forward, take(tokens, rows), padded_length(len(rows), data.length), device).cpu()
        if not total.ndim:
            total = logits.new_zeros(len(tokens), *logits.shape[1:])
        share = torch.from_numpy(weights)[:, None, None, None]
        total[rows] += logits * share
        weight[rows] += share
    return total / weight.clamp(min=1)


def _forward(forward: Forward, tokens: TokenSet, length: int, device: torch.device) -> torch.Tensor:
    """(N, p, p, K) float32 logits of one token set."""
    batch = collate([token_sample(tokens, length, None, False, 0.0)])
    inputs = {k: v.to(device) for k, v in batch.items() if k not in ("mask_counts", "content_counts")}
    return forward(inputs)[0, : len(tokens)].float()


def raster_logits(
    forward: Forward, config: Config, raster: Raster, device: torch.device, everywhere: bool = False
) -> torch.Tensor:
    """Logits per pixel, (K, R, R), by sliding windows; those without content are left out unless `everywhere`."""
    image = torch.from_numpy(raster.image).to(device).permute(2, 0, 1).float() / 255
    data = config.data
    wanted = None if everywhere else torch.from_numpy(raster.content)
    return sliding_window(_AsModule(forward), image, data.window_px or data.crop_px, data.overlap, wanted=wanted)


class _AsModule(torch.nn.Module):
    """A function as the module that `sliding_window` calls, so that sharded models are called through their engine."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._call = forward

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._call(images)


def raster_counts(predicted: NDArray[np.bool_], raster: Raster) -> NDArray[np.int64]:
    """(K, 3) int64 intersection, prediction, truth of a full-size prediction (R, R, K), padding left out."""
    inside = predicted & raster.content[..., None]
    both = inside & raster.masks
    return np.stack([a.sum((0, 1), dtype=np.int64) for a in (both, inside, raster.masks)], axis=-1)


def _token_pictures(tokens: TokenSet, predicted: NDArray[Any], limit_px: int) -> dict[str, NDArray[Any]]:
    side = picture_side(tokens.size_px, limit_px)
    assert tokens.mask_counts is not None
    share = tokens.mask_counts / np.maximum(tokens.content_counts, 1)[..., None]
    scored = predicted & (tokens.content_counts > 0)[..., None]

    def small(values: NDArray[Any]) -> NDArray[np.float32]:
        picture = paint(values, tokens.leaf_xy, tokens.leaf_size, tokens.size_px, side)
        return _crop(picture, tokens.content_wh, tokens.size_px)

    return {"image": small(tokens.tokens), "truth": class_gray(small(share)), "pred": class_gray(small(scored))}


def _raster_pictures(raster: Raster, predicted: NDArray[Any], limit_px: int) -> dict[str, NDArray[Any]]:
    size_px = raster.image.shape[0]
    factor = size_px // picture_side(size_px, limit_px)

    def small(values: NDArray[Any]) -> NDArray[np.float32]:
        side = size_px // factor
        means = values.reshape(side, factor, side, factor, -1).mean((1, 3), dtype=np.float32)
        return _crop(means, raster.content_wh, size_px)

    return {
        "image": small(raster.image),
        "truth": class_gray(small(raster.masks)),
        "pred": class_gray(small(predicted & raster.content[..., None])),
    }


def _crop(picture: NDArray[Any], content_wh: tuple[int, int], size_px: int) -> NDArray[Any]:
    """The part of a picture of the frame that shows the slide."""
    w, h = (max(1, -(-side * picture.shape[0] // size_px)) for side in content_wh)
    return picture[:h, :w]


def _save(folder: Path, name: str, counts: NDArray[np.int64], pictures: dict[str, NDArray[Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in pictures.items():
        save_png(folder / f"{kind}_{name}.png", values)
    data = io.BytesIO()
    np.savez(data, counts=counts)
    write_atomic(folder / f"{name}.npz", data.getbuffer())
