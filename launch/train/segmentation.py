"""Segmentation: batches, loss, and exact pixel Dice of a split over all ranks, with small pictures for the report.

Counts are integers, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_prep.system.files import write_atomic
from data_prep.tokens.ceiling import ceiling, pixel_dice_from_cells
from data_prep.tokens.token_set import TokenSet
from hpc_models.training import metrics
from hpc_models.training.losses import bce_dice
from launch.config.config import Config
from launch.data.batches import Batch, collate, padded_length, parts_of, take, token_sample, training_batch
from launch.data.token_files import Raster, TokenFiles
from launch.engines.base import Engine, Forward
from launch.train.task import score_items
from launch.train.trivial_baselines import trivial_baselines


@dataclass(frozen=True)
class Scores:
    """Counts of a split, from all ranks."""

    names: list[str]  # slides
    counts: torch.Tensor  # (slides, K, 3) int64: intersection, prediction, truth in frame pixels
    ceilings: list[float]  # best Dice that each slide's tree can reach, mean over classes
    tokens: list[int]  # valid tokens of each slide

    def per_slide(self) -> dict[str, float]:
        """Dice of each slide, mean over classes."""
        return dict(zip(self.names, metrics.dice_per_slide(self.counts).tolist(), strict=True))

    def headline(self) -> float:
        """What model selection compares: the mean of the slides' Dice."""
        return float(metrics.dice_per_slide(self.counts).mean())

    def numbers(self) -> dict[str, float | None]:
        """What metrics.jsonl keeps."""
        return {"dice": self.headline(), "dice_pooled": self.pooled()}

    def record(self) -> dict[str, Any]:
        """What the record keeps."""
        return {
            "dice": self.headline(),
            "dice_pooled": self.pooled(),
            "dice_per_slide": self.per_slide(),
            "dice_ceiling": sum(self.ceilings) / len(self.ceilings),
            "tokens_per_image": sum(self.tokens) / len(self.tokens),
        }

    def pooled(self) -> float:
        """Dice of all slides as one picture, mean over classes."""
        return float(metrics.dice_pooled(self.counts))


class Segmentation:
    """Exact pixel Dice of token sets, or of crops by sliding window."""

    parts = 1

    def __init__(self, config: Config, files: TokenFiles) -> None:
        self.config, self.files = config, files

    def batch(self, picks: list[tuple[int, int]]) -> Batch:
        """See `Task`."""
        return training_batch(self.config, self.files, picks)

    def losses(self, forward: Forward, batch: Batch, teacher: Forward | None) -> Iterator[torch.Tensor]:
        """See `Task`; there is no teacher."""
        assert teacher is None
        yield bce_dice(forward(batch), batch["mask_counts"], batch["content_counts"])

    @torch.no_grad()
    def evaluate(
        self, engine: Engine, part: str, device: torch.device, pictures: Path | None = None, label: str = "eval"
    ) -> Scores:
        """See `Task`; small pictures and the counts of each slide go to `pictures`."""
        names, classes = self.files.split[part], self.config.data.classes

        def row_of(index: int, mine: bool) -> torch.Tensor:
            counts, best, tokens = self._slide(engine, names[index], device, pictures if mine else None)
            return torch.tensor([best, tokens, *counts.ravel().tolist()], dtype=torch.float64)

        table = score_items(engine, len(names), 2 + 3 * classes, label, "slides", row_of)
        counts = table[:, 2:].long().view(-1, classes, 3)
        return Scores(list(names), counts, table[:, 0].tolist(), table[:, 1].long().tolist())

    def trivial_baselines(self) -> dict[str, float]:
        """See `Task`."""
        return trivial_baselines(self.files)

    def _slide(
        self, engine: Engine, name: str, device: torch.device, folder: Path | None
    ) -> tuple[NDArray[np.int64], float, int]:
        """Counts (K, 3), ceiling and tokens of one slide."""
        config, files = self.config, self.files
        tokens = files.load(name)
        assert tokens.mask_counts is not None
        truth = files.truth_pixels(name, tokens)
        if config.data.kind == "tiles":
            raster = files.load_raster(name)
            # Ranks that share parameters must run the model equally often, whatever their slides hold.
            logits = raster_logits(engine.forward, config, raster, device, everywhere=engine.data_world > 1)
            predicted = (logits > 0).permute(1, 2, 0).cpu().numpy()
            counts = raster_counts(predicted, raster)
            pictures = partial(_raster_pictures, raster)
        else:
            predicted = token_logits(engine.forward, config, tokens, device).numpy() > 0
            counts = np.stack(pixel_dice_from_cells(predicted, tokens.mask_counts, tokens.content_counts), axis=-1)
            counts[:, 2] = truth  # what lies in no token is missed
            pictures = partial(_token_pictures, tokens)
        if folder is not None:
            _save(folder, name, counts, pictures(predicted, config.eval.pictures_px))
        best = ceiling(tokens.mask_counts, tokens.content_counts, truth.tolist())
        return counts, float(np.mean(best)), len(tokens.tokens)


def token_logits(forward: Forward, config: Config, tokens: TokenSet, device: torch.device) -> torch.Tensor:
    """Logits per cell, (N, p, p, K), from the whole tree at once or as the mean over overlapping parts.

    A model that was trained on parts has not seen leaves of white padding, which would shift its norms.
    """
    data = config.data
    if data.part == 1:
        return _forward(forward, tokens, data.length, device).cpu()
    # Leave out white padding; split what is left where eval.part asks for it.
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
    """Logits per pixel, (K, R, R), by sliding windows; windows without content are skipped unless `everywhere`."""
    from hpc_models.segmentation.sliding_window import sliding_window

    image = torch.from_numpy(raster.image).to(device).permute(2, 0, 1).float() / 255
    data = config.data
    wanted = None if everywhere else torch.from_numpy(raster.content)
    return sliding_window(_AsModule(forward), image, data.window_px or data.crop_px, data.overlap, wanted=wanted)


class _AsModule(torch.nn.Module):
    """A function as the module that `sliding_window` wants, so that the engine calls a sharded model."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._call = forward

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._call(images)


def raster_counts(predicted: NDArray[np.bool_], raster: Raster) -> NDArray[np.int64]:
    """(K, 3) int64 intersection, prediction and truth of a full-size prediction (R, R, K), without padding."""
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
    """Write pictures (h, w, 3) or (h, w) of values 0..255 as PNG, and the counts."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, values in pictures.items():
        data = io.BytesIO()
        Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8)).save(data, "PNG")
        write_atomic(folder / f"{kind}_{name}.png", data.getbuffer())
    data = io.BytesIO()
    np.savez(data, counts=counts)
    write_atomic(folder / f"{name}.npz", data.getbuffer())


def paint(
    values: NDArray[Any], leaf_xy: NDArray[Any], leaf_size: NDArray[Any], size_px: int, out_px: int
) -> NDArray[np.float32]:
    """Per-cell values as a picture of the frame of `out_px` pixels a side: the box mean of the full-size raster.

    Args:
        values: (N, p, p, C).
        leaf_xy: (N, 2) frame pixels.
        leaf_size: (N,) frame pixels.
        size_px: R.
        out_px: R divided by a power of two.

    Returns:
        (out_px, out_px, C) float32.
    """
    factor = size_px // out_px
    patch, channels = values.shape[1], values.shape[3]
    out = np.zeros((out_px, out_px, channels), np.float32)
    for side in np.unique(leaf_size):
        rows = np.flatnonzero(leaf_size == side)
        block = max(1, int(side) // factor)  # pixels of the picture that a leaf is wide
        part = values[rows].astype(np.float32)
        if block <= patch:
            cut = patch // block
            part = part.reshape(len(rows), block, cut, block, cut, channels).mean((2, 4))
        else:
            part = part.repeat(block // patch, axis=1).repeat(block // patch, axis=2)
        x, y = (leaf_xy[rows] // factor).T
        if side < factor:  # several leaves share one pixel, each with its share of the area
            np.add.at(out, (y, x), part[:, 0, 0] * (int(side) / factor) ** 2)
        else:
            span = np.arange(block)
            out[y[:, None, None] + span[:, None], x[:, None, None] + span] = part
    return out


def picture_side(size_px: int, limit_px: int) -> int:
    """Largest R / 2^k that is at most `limit_px`."""
    side = size_px
    while side > limit_px and side % 2 == 0:
        side //= 2
    return side


def class_gray(values: NDArray[Any]) -> NDArray[np.float32]:
    """(h, w, K) shares of foreground 0..1 as one gray picture 0..255; class k of K is as bright as k / K."""
    classes = values.shape[-1]
    levels = np.arange(1, classes + 1, dtype=np.float32) * (255 / classes)
    gray: NDArray[np.float32] = (values * levels).max(-1)
    return gray
