"""Predictions on slices of volumes: read, scored in three dimensions, written as label volumes. Never imports torch.

A prediction is one class id per cell of a token file, (N, p, p) whole numbers, 0 for none: `FOLDER/<slice>.npy` each,
or `FOLDER/<case>.npz` with an array per slice, named like it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.slides.base import SlideError
from data_prep.system.files import one_line
from data_prep.token_files.token_file import read_tokens, token_path
from data_prep.tokens.token_set import TokenSet
from data_prep.volumes.build import dice_of_sums, find_labels, read_sidecar, reassemble, volume_dice
from data_prep.volumes.read import Volume, check_labels, load_volume, save_labels

_ENDING = ".volume.json"


def find_cases(folder: Path, names: list[str]) -> list[str]:
    """Names of the volumes whose slices lie in a folder of token files.

    Args:
        folder: Token files and sidecars.
        names: Those that are wanted; empty for all.

    Raises:
        SlideError: There are none, or one that is wanted is missing.
    """
    if not folder.is_dir():
        raise SlideError(f"{folder}: no such folder")
    found = sorted(path.name.removesuffix(_ENDING) for path in folder.glob(f"[!.]*{_ENDING}"))
    if not found:
        raise SlideError(f"{folder}: no *{_ENDING} in it: not the token files of volumes")
    missing = [name for name in names if name not in found]
    if missing:
        raise SlideError(f"{folder}: no volume {missing[0]}; it holds {', '.join(found[:8])}")
    return names or found


def slices(case: str, folder: Path, predictions: Path | None) -> Iterator[tuple[TokenSet, NDArray[np.uint8]]]:
    """Yield token set and predicted cells (N, p, p) of every slice of a volume, in order.

    Args:
        case: Name of the volume.
        folder: Its token files and sidecar.
        predictions: Folder of predictions; None takes `best_cells`.

    Raises:
        SlideError: A file is missing or damaged, or does not fit the token file.
    """
    names = read_sidecar(case, folder)["slices"]
    packed = None if predictions is None else _packed(predictions / f"{case}.npz")
    for name in names:
        token_set, _ = read_tokens(token_path(folder, name))
        if predictions is None:
            yield token_set, best_cells(token_set, token_path(folder, name))
            continue
        path = predictions / (f"{case}.npz" if packed is not None else f"{name}.npy")
        try:
            values = packed[name] if packed is not None else np.load(path, allow_pickle=False)
        except KeyError:
            raise SlideError(f"{path}: holds no {name}") from None
        except FileNotFoundError:
            raise SlideError(f"{path}: no such file, and no {case}.npz beside it") from None
        except (OSError, ValueError, EOFError) as error:
            raise SlideError(f"{path}: no predictions ({one_line(error)})") from error
        if values.shape != token_set.content_counts.shape:
            raise SlideError(f"{path}: {name} is {values.shape}, the cells are {token_set.content_counts.shape}")
        yield token_set, check_labels(path, values, 255)


def _packed(path: Path) -> dict[str, NDArray[Any]] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SlideError(f"{path}: no predictions ({one_line(error)})") from error


def best_cells(token_set: TokenSet, path: Path) -> NDArray[np.uint8]:
    """The most frequent class of every cell, (N, p, p), none included: what a model without fault would say.

    Raises:
        SlideError: The token file has no masks.
    """
    if token_set.mask_counts is None:
        raise SlideError(f"{path}: built without labels; give --predictions")
    counts = token_set.mask_counts.astype(np.int64)
    none = token_set.content_counts.astype(np.int64) - counts.sum(axis=-1)
    best: NDArray[np.uint8] = np.argmax(np.concatenate([none[..., None], counts], axis=-1), axis=-1).astype(np.uint8)
    return best


def score_cells(case: str, folder: Path, predictions: Path | None) -> dict[str, Any]:
    """Dice over a volume in the pixels of its frames, exact from the counts in the token files.

    Returns:
        As `dice_of_sums`.

    Raises:
        SlideError: As `slices`; or the token files hold no masks.
    """
    sums: NDArray[np.int64] | None = None
    for token_set, cells in slices(case, folder, predictions):
        if token_set.mask_counts is None:
            raise SlideError(f"{folder / case}: built without labels; give --labels")
        kinds = token_set.mask_counts.shape[-1]
        sums = np.zeros((3, kinds), np.int64) if sums is None else sums
        for k in range(kinds):
            on = cells == k + 1
            truth = token_set.mask_counts[..., k]
            sums[:, k] += [int(part.sum(dtype=np.int64)) for part in (truth[on], token_set.content_counts[on], truth)]
    assert sums is not None  # a volume has slices
    return dice_of_sums(sums.T.tolist())


def score_labels(case: str, folder: Path, predictions: Path | None, labels: Path, classes: int) -> dict[str, Any]:
    """Dice over a volume in its own voxels, against label files.

    Args:
        case: Name of the volume.
        folder: Its token files and sidecar.
        predictions: As in `slices`.
        labels: Folder of the labels, named as for `build_volume`.
        classes: K.

    Returns:
        As `volume_dice`.

    Raises:
        SlideError: As `slices`; or labels that are missing or of another shape.
    """
    about = read_sidecar(case, folder)
    name = case if about["axis"] == "axial" else case.removesuffix(f"_{about['axis']}")
    path = find_labels(Path(name), labels)
    volume = load_volume(path)
    truth = check_labels(path, volume.voxels if volume.labels is None else volume.labels, classes)
    if list(truth.shape) != list(about["shape"]):
        raise SlideError(f"{path}: labels are {list(truth.shape)} voxels, the volume is {about['shape']}")
    return volume_dice(label_volume(case, folder, predictions), truth, classes)


def label_volume(case: str, folder: Path, predictions: Path | None) -> NDArray[np.uint8]:
    """Predictions as labels (X, Y, Z) in RAS+ order, in the grid of the volume; raises as `slices`."""
    return reassemble(case, folder, [cells for _, cells in slices(case, folder, predictions)])


def write_labels(case: str, folder: Path, predictions: Path | None, out: Path) -> Path:
    """Write `OUT/<case>.nii.gz`, whole or not at all: predictions as labels at the volume's place in space (RAS+).

    Raises:
        SlideError: As `slices`.
        OSError: It cannot be written.
    """
    about = read_sidecar(case, folder)
    labels = label_volume(case, folder, predictions)
    affine = None if about.get("affine") is None else np.array(about["affine"], np.float64)
    path = out / f"{case}.nii.gz"
    save_labels(path, labels, Volume(path, labels, None, affine, None, False, None))
    return path
