"""Trivial baselines: Dice of everything, of nothing, and of one gray threshold (Otsu) on the same files.

Threshold and bright or dark side are chosen on the training slides, then applied to the test slides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_prep.tokens.ceiling import pixel_dice_from_cells
from data_prep.tokens.token_set import TokenSet
from hpc_models.training import metrics
from launch.data.token_files import TokenFiles


def gray(tokens: TokenSet) -> NDArray[np.uint8]:
    """Luma (N, p, p) of every cell, rounded."""
    weights = np.array([0.299, 0.587, 0.114])
    luma: NDArray[np.uint8] = np.floor(tokens.tokens @ weights + 0.5).astype(np.uint8)
    return luma


def otsu_threshold(histogram: NDArray[np.int64]) -> int:
    """Otsu's threshold t of a histogram (256,): the largest variance between pixels < t and pixels >= t.

    Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    weights = histogram.astype(np.float64)
    below = np.cumsum(weights)[:-1]
    above = weights.sum() - below
    sums = np.cumsum(weights * np.arange(256))[:-1]
    total = float((weights * np.arange(256)).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = below * above * (sums / below - (total - sums) / above) ** 2
    return int(np.nanargmax(np.where((below > 0) & (above > 0), spread, -1.0))) + 1


def trivial_baselines(files: TokenFiles) -> dict[str, float]:
    """Mean Dice over the test slides of three predictions that need no model; every rank must call it.

    The names are all_foreground, all_background and otsu. Otsu predicts the same pixels for every class.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    train, test = (files.split[part] for part in ("train", "test"))
    # One gray histogram over the training slides of all ranks.
    histogram = torch.zeros(256, dtype=torch.int64)
    for name in train[rank::world]:
        tokens = files.load(name)
        counted = np.bincount(gray(tokens).ravel(), weights=tokens.content_counts.ravel(), minlength=256)
        histogram += torch.from_numpy(counted.astype(np.int64))
    dist.all_reduce(histogram)
    threshold = otsu_threshold(histogram.numpy())
    bright = _mean_dice(files, train, lambda t: gray(t) >= threshold)
    dark = _mean_dice(files, train, lambda t: gray(t) < threshold)
    return {
        "all_foreground": _mean_dice(files, test, None),
        "all_background": _mean_dice(files, test, lambda t: np.zeros(t.content_counts.shape, bool)),
        "otsu": _mean_dice(files, test, lambda t: (gray(t) >= threshold) == (bright >= dark)),
    }


def _mean_dice(files: TokenFiles, names: list[str], predict: Callable[[TokenSet], NDArray[np.bool_]] | None) -> float:
    """Mean Dice of what `predict` says of the cells; None is everything, with the leaves that were dropped."""
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(len(names), files.config.classes, 3, dtype=torch.int64)
    for index in range(rank, len(names), world):
        tokens = files.load(names[index])
        assert tokens.mask_counts is not None
        truth = files.truth_pixels(names[index], tokens)
        if predict is None:
            both, predicted = truth, np.full_like(truth, files.content_pixels(names[index], tokens))
        else:
            on = np.broadcast_to(predict(tokens)[..., None], tokens.mask_counts.shape)
            both, predicted, _ = pixel_dice_from_cells(on, tokens.mask_counts, tokens.content_counts)
        counts[index] = torch.from_numpy(np.stack((both, predicted, truth), axis=-1))
    dist.all_reduce(counts)
    return float(metrics.dice_per_slide(counts).mean())
