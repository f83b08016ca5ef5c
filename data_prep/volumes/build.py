"""CT volumes to token files, one per slice, and predictions back to a volume with its Dice. Never imports torch.

A slice is a picture like any other: windowed to 8 bit, the same in red, green and blue, with its labels as mask. All
else is `build.slide`. A sidecar `<case>.volume.json` says which slices belong together and how they lie.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.build.log import Hashes, SlideOutcome, SlideTask
from data_prep.build.options import BuildOptions
from data_prep.build.slide import OpenedSlide, cut_slide, finish, valid_already, write_result
from data_prep.frame import make_frame
from data_prep.masks.masks import Mask
from data_prep.slides.base import Slide, SlideError
from data_prep.system.files import one_line, sha256_of, write_atomic
from data_prep.token_files.token_file import read_tokens, token_path
from data_prep.tokens.token_set import rebuild
from data_prep.volumes.read import (
    Volume,
    case_name,
    check_labels,
    load_labels,
    load_volume,
    picture_of,
    slice_count,
    volume_of,
)

ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""The 13 organs of BTCV, labels 1 to 13."""

WINDOW_HU = (-125.0, 275.0)  # soft tissue of the abdomen, what BTCV code commonly cuts at


@dataclass(frozen=True)
class VolumeOptions:
    """What a volume's slices are made of.

    Attributes:
        build: Parameters of the token files; `masks` stays None.
        axis: axial, coronal or sagittal.
        window_hu: Values shown as black and white.
        labels: Folder with labels of the same names, or None.
    """

    build: BuildOptions
    axis: str = "axial"
    window_hu: tuple[float, float] = WINDOW_HU
    labels: Path | None = None


class SliceSlide(Slide):
    """One slice as a slide in memory."""

    reader = "array"

    def __init__(self, path: Path, picture: NDArray[np.uint8], mpp: float | None) -> None:
        self.path, self.mpp = path, mpp
        self._rgb = np.repeat(picture[..., None], 3, 2)
        self.size_wh = (picture.shape[1], picture.shape[0])
        self.level_sizes_wh = [self.size_wh]

    def close(self) -> None:
        """Nothing to close."""

    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[np.uint8]:  # noqa: ARG002
        return self._rgb[y_px : y_px + h_px, x_px : x_px + w_px].copy()


class SliceMask(Mask):
    """The labels of one slice as a mask in memory; 255 is a class like any other."""

    _two_valued = False

    def __init__(self, path: Path, ids: NDArray[np.uint8]) -> None:
        self.path, self._labels = path, ids
        self.size_wh = (ids.shape[1], ids.shape[0])

    def close(self) -> None:
        """Nothing to close."""

    def _values(self, x_px: int, y_px: int, w_px: int, h_px: int) -> NDArray[Any]:
        return self._labels[y_px : y_px + h_px, x_px : x_px + w_px]


def windowed(values: NDArray[Any], window_hu: tuple[float, float]) -> NDArray[np.uint8]:
    """Values to 8 bit: `low` and below is 0, `high` and above 255, rounded in between."""
    low, high = window_hu
    return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def find_labels(path: Path, folder: Path) -> Path:
    """The labels of a volume: the file or series folder of the same name (BTCV: `label` instead of `img`).

    Raises:
        SlideError: There is none.
    """
    wanted = {case_name(path), case_name(path).replace("img", "label")}
    others = (entry for entry in folder.iterdir() if entry.resolve() != path.resolve())
    found = sorted(entry for entry in others if case_name(entry) in wanted)
    if not found:
        raise SlideError(f"{path}: no labels called {' or '.join(sorted(wanted))} in {folder}")
    return found[0]


def build_volume(
    path: Path,
    out: Path,
    options: VolumeOptions,
    *,
    rebuild_all: bool = False,
    tell: Callable[[SlideOutcome], None] | None = None,
) -> list[SlideOutcome]:
    """Token files of all slices of a volume, and its sidecar; complete and valid slices are skipped.

    Args:
        path: The volume.
        out: Folder of the token files; exists.
        options: Parameters.
        rebuild_all: Build also what is complete and valid.
        tell: Called with the outcome of every slice; None to tell nobody.

    Returns:
        Outcomes of the slices in order; one that failed if the volume itself cannot be read.
    """
    case = case_name(path) if options.axis == "axial" else f"{case_name(path)}_{options.axis}"
    try:
        volume = load_volume(path)
        label_path = find_labels(path, options.labels) if options.labels is not None else None
        labels = volume.labels if label_path is None else load_labels(label_path, volume, options.build.classes)
        if volume.labels is not None and label_path is None:
            check_labels(path, volume.labels, options.build.classes)
        sources = [_hash(each) for each in (path, label_path) if each is not None]
    except (ValueError, OSError) as error:
        outcome = SlideOutcome(case, str(path), "failed", one_line(error))
        if tell is not None:
            tell(outcome)
        return [outcome]
    names = [f"{case}_slice{index:03d}" for index in range(slice_count(volume, options.axis))]
    outcomes = []
    for index, name in enumerate(names):
        outcome = SlideOutcome(name, str(path), "failed")
        started_s = time.perf_counter()
        task = SlideTask(path.parent / name, out, options.build, rebuild=rebuild_all)
        how = f"{options.axis} {index} {options.window_hu}"
        digests = [hashlib.sha256(f"{source} {how}".encode()).hexdigest() for source in (sources[0], sources[-1])]
        try:
            hashes = digests[0], None if labels is None else digests[1]
            if not valid_already(task, hashes, outcome):
                _build_slice(task, _opened_slice(task, volume, labels, options, index), hashes, outcome)
        except (ValueError, OSError) as error:
            outcome.reason = one_line(error)
        outcome.seconds = round(time.perf_counter() - started_s, 4)
        outcomes.append(outcome)
        if tell is not None:
            tell(outcome)
    about = {
        "schema": 1,
        "case": case,
        "axis": options.axis,
        "window_hu": None if volume.windowed else options.window_hu,
        "slices": names,
        "shape": list(volume.voxels.shape),
        "spacing_mm": volume.spacing_mm,
        "affine": None if volume.affine is None else volume.affine.tolist(),
    }
    write_atomic(out / f"{case}.volume.json", json.dumps(about, indent=1).encode())
    return outcomes


def _hash(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _opened_slice(
    task: SlideTask, volume: Volume, labels: NDArray[np.uint8] | None, options: VolumeOptions, index: int
) -> OpenedSlide:
    """One slice as a slide that is open, with its labels as mask."""
    window = (0.0, 1.0) if volume.windowed else options.window_hu
    slide = SliceSlide(task.slide, windowed(picture_of(volume.voxels, options.axis, index), window), None)
    mask = None if labels is None else SliceMask(task.slide, picture_of(labels, options.axis, index))
    return OpenedSlide(slide, mask, options.build)


def _build_slice(task: SlideTask, opened: OpenedSlide, hashes: Hashes, outcome: SlideOutcome) -> None:
    whole, basis = cut_slide(opened, task.options, outcome)
    token_set, meta = finish(opened, whole, basis, task.options, outcome)
    write_result(task, token_set, meta, hashes, outcome)


def reassemble(case: str, folder: Path, predictions: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Predicted classes of every slice's cells as one label volume.

    Args:
        case: Name of the volume.
        folder: Where its token files and sidecar lie.
        predictions: For every slice in order, (N, p, p) class ids per cell, 0 = none.

    Returns:
        (X, Y, Z) uint8 in RAS+ order, in the grid of the volume: a voxel takes the cell under its centre.

    Raises:
        SlideError: The sidecar is missing, or the number of slices or cells does not fit.
    """
    about = read_sidecar(case, folder)
    if len(predictions) != len(about["slices"]):
        raise SlideError(f"{folder / case}: {len(predictions)} predictions for {len(about['slices'])} slices")
    pictures = []
    for name, cells in zip(about["slices"], predictions, strict=True):
        token_set, meta = read_tokens(token_path(folder, name))
        if cells.shape != token_set.content_counts.shape:
            wanted = token_set.content_counts.shape
            raise SlideError(f"{token_path(folder, name)}: predictions are {cells.shape}, its cells {wanted}")
        raster = rebuild(cells.astype(np.uint8), token_set.leaf_xy, token_set.leaf_size, token_set.size_px)
        pictures.append(_to_slide(raster, meta))
    return volume_of(pictures, about["axis"])


def _to_slide(raster: NDArray[np.uint8], meta: dict[str, Any]) -> NDArray[np.uint8]:
    """The content of a frame in the pixels of its slide: each takes the frame pixel over its centre."""
    frame = make_frame(tuple(meta["size0_wh"]), meta["frame_px"], meta["params"]["aspect"])
    index = []
    for axis in (0, 1):
        scale, size0 = frame.scale_xy[axis], meta["size0_wh"][axis]
        at = (2 * np.arange(size0) + 1) * scale.numerator // (2 * scale.denominator)
        index.append(np.minimum(at, frame.content_wh[axis] - 1))
    return raster[np.ix_(index[1], index[0])]


def read_sidecar(case: str, folder: Path) -> dict[str, Any]:
    """What `build_volume` left about a volume.

    Raises:
        SlideError: It is missing or damaged.
    """
    path = folder / f"{case}.volume.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        _ = (found["slices"], found["axis"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlideError(f"{path}: no description of a volume ({one_line(error)})") from error
    return found


def volume_dice(pred: NDArray[Any], truth: NDArray[Any], classes: int) -> dict[str, Any]:
    """Dice over a whole volume.

    Args:
        pred: (X, Y, Z) class ids.
        truth: The same shape.
        classes: K; ids 1..K count.

    Returns:
        As `dice_of_sums`.

    Raises:
        ValueError: Shapes that differ.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"prediction is {pred.shape}, truth is {truth.shape}")
    sums = []
    for k in range(1, classes + 1):
        p, t = pred == k, truth == k
        sums.append((int((p & t).sum()), int(p.sum()), int(t.sum())))
    return dice_of_sums(sums)


def dice_of_sums(sums: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Dice from what was counted of every class: in both, in the prediction, in the truth.

    Returns:
        `dice`: one value per class, None where the truth does not hold the class; `mean`: over those that it holds,
        None if there are none; `absent`: how many it does not hold.
    """
    dice = [2 * both / (predicted + true) if true else None for both, predicted, true in sums]
    held = [value for value in dice if value is not None]
    return {"dice": dice, "mean": sum(held) / len(held) if held else None, "absent": len(dice) - len(held)}
