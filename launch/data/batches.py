"""Which images belong to which step, and their batches, made ahead of time.

A batch is a dict of CPU tensors as `hpc_models` documents it: tokens (B, L, p, p, 3) float32, leaf_xy, leaf_size,
valid, mask_counts (B, L, p, p, K) and content_counts (B, L, p, p) float32. A crop is one token that covers its whole
square.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.tokens.token_set import TokenSet
from launch.config.config import Config
from launch.data.augment import DIHEDRAL, jitter, leaves_in_square, turn_pixels, turn_tokens
from launch.data.token_files import Raster, TokenFiles

Batch = dict[str, torch.Tensor]
Sample = dict[str, NDArray[Any]]

_TRIES = 8  # draws of a part or crop until one has content, as fields of view are round
_STEP = 32  # parts of trees are padded to multiples of this, so that few shapes are compiled


def take(tokens: TokenSet, kept: NDArray[Any]) -> TokenSet:
    """The rows `kept` of a token set, given as (N,) bool or as indices."""
    return replace(
        tokens,
        tokens=tokens.tokens[kept],
        leaf_xy=tokens.leaf_xy[kept],
        leaf_size=tokens.leaf_size[kept],
        content_counts=tokens.content_counts[kept],
        mask_counts=None if tokens.mask_counts is None else tokens.mask_counts[kept],
    )


def part_side(share: float, size_px: int) -> int:
    """Side in pixels of a part with `share` of the side of a frame."""
    return max(1, round(share * size_px))


def part_of(tokens: TokenSet, share: float, rng: np.random.Generator, foreground: float = 0.0) -> TokenSet:
    """The leaves with content in a random square with `share` of the frame's side; all leaves where none are found.

    A step then costs about share^2 of a whole frame, so the same time has more steps.

    Args:
        tokens: The token set.
        share: Side of the square as a share of the frame's.
        rng: Generator of its place.
        foreground: Chance that the square is centred on a random cell with foreground (of any class), if there is one,
            and moved into the content. Small leaves have as many cells as large ones, so detail is drawn more often.
    """
    # Draw the corner, perhaps around a cell with foreground.
    side_px = part_side(share, tokens.size_px)
    room = np.maximum(0, np.array(tokens.content_wh) - side_px)
    corner = rng.integers(room + 1)
    leaf = None
    if foreground and rng.random() < foreground and (found := _foreground_cell(tokens, rng)) is not None:
        leaf, centre = found
        corner = np.clip(centre - side_px // 2, 0, room)
    # Draw again while there is no content.
    kept = _in_part(tokens, corner, side_px)
    for _ in range(_TRIES - 1):
        if leaf is not None or kept.any():
            break
        kept = _in_part(tokens, rng.integers(room + 1), side_px)
    if leaf is not None:
        kept[leaf] = True  # a moved square can miss a leaf that is larger than itself
    return take(tokens, kept) if kept.any() else tokens  # no leaf: the build dropped some


def _foreground_cell(tokens: TokenSet, rng: np.random.Generator) -> tuple[int, NDArray[np.int64]] | None:
    """The leaf and the middle (x, y) in frame pixels of a random cell with foreground; None without one."""
    assert tokens.mask_counts is not None
    cells = tokens.foreground_cells
    if not len(cells):
        return None
    side = tokens.mask_counts.shape[1]
    leaf, cell = divmod(int(cells[rng.integers(len(cells))]), side * side)
    middle = (2 * np.array([cell % side, cell // side]) + 1) * int(tokens.leaf_size[leaf]) // (2 * side)
    return leaf, tokens.leaf_xy[leaf] + middle


def parts_of(tokens: TokenSet, share: float, overlap: float) -> list[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Overlapping parts as `part_of` draws them; together they hold every leaf with content.

    Their number depends on `share` and `overlap` alone, so that ranks run the model equally often. `overlap` in [0, 1)
    is the least share of a part's side that neighbours have in common.

    Returns:
        Per part its rows (n,), and the weight (n,) of what is predicted there: the distance of a leaf's middle to the
            part's border, since a leaf near the border is seen from one side only. A part without content gets the
            nearest leaf with content, or all rows where no leaf has any.
    """
    side_px = part_side(share, tokens.size_px)
    number = 1 + math.ceil((tokens.size_px - side_px) / max(1, side_px * (1 - overlap)))
    middle = tokens.leaf_xy + tokens.leaf_size[:, None] // 2
    content = np.flatnonzero(tokens.has_content)
    x_starts, y_starts = (np.linspace(0, max(0, length - side_px), number).round() for length in tokens.content_wh)
    parts = []
    for corner in (np.array([x, y], np.int64) for y in y_starts for x in x_starts):
        rows = np.flatnonzero(_in_part(tokens, corner, side_px))
        if not len(rows):
            far = np.abs(middle[content] - corner - side_px // 2).max(axis=1, initial=0)
            rows = content[[np.argmin(far)]] if len(content) else np.arange(len(tokens))
        inward = np.minimum(middle[rows] - corner, corner + side_px - middle[rows]).clip(min=1).prod(axis=1)
        parts.append((rows, inward.astype(np.float32)))
    return parts


def _in_part(tokens: TokenSet, corner: NDArray[Any], side_px: int) -> NDArray[np.bool_]:
    inside = leaves_in_square(tokens.leaf_xy, tokens.leaf_size, tokens.content_wh, corner, side_px)
    kept: NDArray[np.bool_] = inside & tokens.has_content
    return kept


def padded_length(rows: int, length: int) -> int:
    """Length of a batch of parts with at most `rows` leaves, when whole trees have up to `length`."""
    return min(length, -(-rows // _STEP) * _STEP)


def token_sample(
    tokens: TokenSet, length: int, rng: np.random.Generator | None, flips: bool, strength: float
) -> Sample:
    """One slide as arrays padded to `length` tokens; padding is zero and not valid.

    Args:
        tokens: The token set.
        length: L.
        rng: Generator of the augmentation; None for evaluation, which changes nothing.
        flips: Draw one of the eight flips and turns of the frame.
        strength: Strength of the colour jitter.

    Raises:
        ValueError: More tokens than `length`.
    """
    rows = len(tokens.tokens)
    if rows > length:
        raise ValueError(f"{rows} tokens do not fit into data.length={length}")
    xy: NDArray[Any] = tokens.leaf_xy
    size: NDArray[Any] = tokens.leaf_size
    per_token: Sample = {"tokens": tokens.tokens, "content_counts": tokens.content_counts}
    if tokens.mask_counts is not None:  # a whole-slide label needs no mask
        per_token["mask_counts"] = tokens.mask_counts
    if rng is not None and flips:
        xy, size, per_token = turn_tokens(xy, size, per_token, tokens.size_px, int(rng.integers(DIHEDRAL)))
    per_token["tokens"] = jitter(per_token["tokens"], rng or np.random.default_rng(), strength if rng else 0.0)
    sample: Sample = {name: _pad(values, length, np.float32) for name, values in per_token.items()}
    sample["leaf_xy"] = _pad(xy, length, np.int64)
    sample["leaf_size"] = _pad(size, length, np.int64)
    sample["valid"] = np.arange(length) < rows
    return sample


def _pad(values: NDArray[Any], length: int, dtype: Any) -> NDArray[Any]:
    out = np.zeros((length, *values.shape[1:]), dtype)
    out[: len(values)] = values
    return out


def crop_sample(
    raster: Raster, side: int, rng: np.random.Generator, flips: bool, strength: float, foreground: float
) -> Sample:
    """A random square of `side` frame pixels as a sequence of one token.

    Args:
        raster: Pictures of the slide.
        side: Side of the crop.
        rng: Generator of place and augmentation.
        flips: Draw one of the eight flips and turns.
        strength: Strength of the colour jitter.
        foreground: Chance that the crop is centred on a random foreground pixel (of any class), if there is one.
    """
    # Draw a place with content, perhaps around a foreground pixel.
    size_px = raster.image.shape[0]
    content_w, content_h = raster.reach_wh
    for _ in range(_TRIES):
        x = int(rng.integers(max(0, content_w - side) + 1))
        y = int(rng.integers(max(0, content_h - side) + 1))
        if raster.content[y : y + side, x : x + side].any():
            break
    if rng.random() < foreground:
        pixels = raster.foreground_pixels
        if len(pixels):
            cy, cx = divmod(int(pixels[rng.integers(len(pixels))]), size_px)
            x, y = (min(max(0, c - side // 2), size_px - side) for c in (cx, cy))
    # Cut and augment.
    window = (slice(y, y + side), slice(x, x + side))
    code = int(rng.integers(DIHEDRAL)) if flips else 0
    image, masks, content = (
        np.ascontiguousarray(turn_pixels(a[window], code, 0, 1)) for a in (raster.image, raster.masks, raster.content)
    )
    return {
        "tokens": jitter(image, rng, strength)[None],
        "leaf_xy": np.array([[x, y]], np.int64),
        "leaf_size": np.array([side], np.int64),
        "valid": np.array([True]),
        "mask_counts": masks[None].astype(np.float32),
        "content_counts": content[None].astype(np.float32),
    }


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of equal shapes into a batch of CPU tensors."""
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def training_batch(config: Config, files: TokenFiles, picks: list[tuple[int, int]]) -> Batch:
    """The augmented batch of some (image index, global sample index) pairs.

    It depends on the pairs and the seed alone, so it is the same on any rank and after every restart.
    """
    data, samples = config.data, []
    parts: list[tuple[TokenSet, np.random.Generator]] = []
    for index, sample_index in picks:
        name = files.split["train"][index]
        rng = np.random.default_rng([config.train.seed, 2, sample_index])
        if data.kind == "tiles":
            raster = files.load_raster(name)
            samples.append(crop_sample(raster, data.crop_px, rng, data.flips, data.jitter, data.foreground_crops))
        else:
            tokens = files.draw(name, rng)
            parts.append((tokens if data.part == 1 else part_of(tokens, data.part, rng, data.foreground_crops), rng))
    length = data.length
    if data.part < 1 and parts:
        length = padded_length(max(len(tokens) for tokens, _ in parts), length)
    samples += [token_sample(tokens, length, rng, data.flips, data.jitter) for tokens, rng in parts]
    return collate(samples)


class Sampler:
    """An endless stream of epochs, each a seeded permutation of the images, cut into global batches.

    Step t takes positions t * batch .. (t + 1) * batch - 1 of the stream, and every rank a contiguous slice of them. So
    a resumed run needs only its step, and any number of ranks sees the same images.
    """

    def __init__(self, images: int, batch: int, seed: int) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        # Two are kept: a batch may span two epochs, and prefetching never goes back further.
        self._kept = lru_cache(2)(self.order)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of epoch `epoch`, (images,) int64."""
        return np.random.default_rng([self.seed, 1, epoch]).permutation(self.images)

    def at(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """Pairs (image index, global sample index) that `rank` of `world` trains on in step `step`.

        The global sample index counts samples since the start of training and seeds their augmentation.
        """
        share = self.batch // world
        first = step * self.batch + rank * share
        return [(int(self._kept(g // self.images)[g % self.images]), g) for g in range(first, first + share)]


class Prefetch:
    """Calls `make(step)` from step `first` on in one background thread and gives the results out in order.

    `make` is a pure function. `depth` results are made ahead; with 0 `make` runs on demand, in the caller's thread.
    """

    def __init__(self, make: Callable[[int], Any], first: int, depth: int) -> None:
        self._make, self._steps = make, count(first)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if depth else None
        self._ahead = deque(self._submit(self._pool) for _ in range(depth) if self._pool is not None)

    def _submit(self, pool: ThreadPoolExecutor) -> Future[Any]:
        return pool.submit(self._make, next(self._steps))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The result of the next step; raises what `make` raised."""
        if self._pool is None:
            return self._make(next(self._steps))
        self._ahead.append(self._submit(self._pool))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop the thread; a result under way is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
