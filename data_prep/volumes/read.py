"""CT volumes from disk: NIfTI, DICOM series, and the npz / h5 slices that BTCV code passes around. Never imports torch.

One convention inside: axes run to the patient's right, front and head (RAS+), so a slice along an axis always looks the
same. Where the file says how it lies (affine), it is turned; arrays without one are taken as they are.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.slides.base import SlideError
from data_prep.system.files import one_line

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ARRAY_SUFFIXES = (".npz", ".npy.h5", ".h5")
AXES = ("sagittal", "coronal", "axial")  # the axis of RAS+ that runs through the slices


@dataclass(frozen=True)
class Volume:
    """A volume in RAS+ order.

    Attributes:
        path: file, or folder of a DICOM series.
        voxels: (X, Y, Z) HU, or values 0 to 1 where `windowed`.
        labels: (X, Y, Z) uint8 if the same file holds them, else None.
        affine: (4, 4) from RAS+ voxels to mm; None where the file does not say.
        spacing_mm: sides of a voxel along X, Y, Z; None as `affine`.
        windowed: values were already mapped to 0..1 by whoever made the file.
        stored: (3, 2) nibabel orientation of the file as stored, to write results back in place; None as `affine`.
    """

    path: Path
    voxels: NDArray[Any]
    labels: NDArray[np.uint8] | None
    affine: NDArray[np.float64] | None
    spacing_mm: tuple[float, float, float] | None
    windowed: bool
    stored: NDArray[np.float64] | None


def case_name(path: Path) -> str:
    """Name of a volume: the file's or folder's, without suffixes, dots replaced (they would look like suffixes)."""
    name = path.name
    for suffix in (*NIFTI_SUFFIXES, *ARRAY_SUFFIXES):
        if path.is_file() and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return name.replace(".", "_")


def find_volumes(paths: list[Path]) -> list[Path]:
    """Volumes among files and folders; a folder of DICOM files is one volume.

    Raises:
        SlideError: A path is missing, no volume is found, or two have the same name.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SlideError(f"{path}: no such file or folder")
        if path.is_file() or _is_series(path):
            found.append(path)
            continue
        inside = sorted(
            entry
            for entry in path.iterdir()
            if (entry.is_dir() and _is_series(entry))
            or (entry.is_file() and entry.name.lower().endswith((*NIFTI_SUFFIXES, *ARRAY_SUFFIXES)))
        )
        if not inside:
            raise SlideError(f"{path}: no .nii, .nii.gz, .npz, .h5 and no folder of DICOM files in it")
        found += inside
    names = [case_name(path) for path in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SlideError(f"{found[names.index(twice[0])]}: two volumes are called {twice[0]}")
    return found


def load_volume(path: Path) -> Volume:
    """Read a volume.

    Raises:
        SlideError: Damaged, of another kind, not three-dimensional, or with values that are no numbers.
    """
    try:
        if path.is_dir():
            volume = _dicom(path)
        elif path.name.lower().endswith(NIFTI_SUFFIXES):
            volume = _nifti(path)
        elif path.name.lower().endswith(ARRAY_SUFFIXES):
            volume = _arrays(path)
        else:
            raise SlideError(f"{path}: not a volume: .nii, .nii.gz, .npz, .h5 or a folder of DICOM files")
    except SlideError:
        raise
    except Exception as error:  # each library has its own errors for broken files
        raise SlideError(f"{path}: cannot be read as a volume: {one_line(error)}") from error
    if not np.isfinite(volume.voxels).all():
        raise SlideError(f"{path}: holds values that are no numbers")
    return volume


def load_labels(path: Path, volume: Volume, classes: int) -> NDArray[np.uint8]:
    """Labels of a volume, (X, Y, Z) uint8 in its RAS+ order.

    Raises:
        SlideError: Another shape or place than the volume, or labels that are no whole numbers from 0 to `classes`.
    """
    labels = load_volume(path)
    if labels.voxels.shape != volume.voxels.shape:
        a, b = (" x ".join(map(str, v.voxels.shape)) for v in (labels, volume))
        raise SlideError(f"{path}: labels are {a} voxels, the volume {volume.path.name} is {b}")
    if (
        labels.affine is not None
        and volume.affine is not None
        and not np.allclose(labels.affine, volume.affine, atol=0.01 * float(np.abs(volume.affine).max() + 1))
    ):
        raise SlideError(f"{path}: labels lie elsewhere than the volume {volume.path.name} (their affines differ)")
    return check_labels(path, labels.voxels, classes)


def check_labels(path: Path, values: NDArray[Any], classes: int) -> NDArray[np.uint8]:
    """Values as uint8 class ids.

    Raises:
        SlideError: They are no whole numbers from 0 to `classes`.
    """
    whole = np.rint(values)
    if not np.array_equal(whole, values):
        raise SlideError(f"{path}: labels are no whole numbers")
    low, high = int(whole.min(initial=0)), int(whole.max(initial=0))
    if low < 0 or high > classes:
        wrong = low if low < 0 else high
        raise SlideError(f"{path}: label {wrong}, but only classes 1 to {classes} are expected; see --classes")
    ids: NDArray[np.uint8] = whole.astype(np.uint8)
    return ids


def save_labels(path: Path, labels: NDArray[np.uint8], volume: Volume) -> None:
    """Write labels as NIfTI, in the grid and orientation that the volume's file has.

    Args:
        path: .nii or .nii.gz.
        labels: (X, Y, Z) in RAS+ order.
        volume: What they belong to.
    """
    import nibabel as nib
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

    affine = np.eye(4) if volume.affine is None else volume.affine
    image = nib.Nifti1Image(labels, affine)
    if volume.stored is not None:
        back = ornt_transform(axcodes2ornt("RAS"), volume.stored)
        turned = nib.orientations.apply_orientation(labels, back)
        image = nib.Nifti1Image(turned, affine @ inv_ornt_aff(back, labels.shape))
    temporary = path.with_name(f".{path.name.removesuffix('.gz').removesuffix('.nii')}.tmp.nii.gz")
    try:
        nib.save(image, temporary)
        if not path.name.endswith(".gz"):
            nib.save(image, temporary.with_suffix(""))
            temporary.unlink()
            temporary = temporary.with_suffix("")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_series(folder: Path) -> bool:
    return any(_is_dicom(entry) for entry in folder.iterdir())


def _is_dicom(path: Path) -> bool:
    """By name, or by the mark that follows the first 128 bytes: scanners often give no suffix."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _oriented(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64]) -> Volume:
    """Turn a volume with an affine to RAS+."""
    import nibabel as nib
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    if voxels.ndim == 4 and voxels.shape[3] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise SlideError(f"{path}: {voxels.ndim} dimensions instead of 3 (shape {voxels.shape})")
    stored = io_orientation(affine)
    if np.isnan(stored).any() or not np.isfinite(affine).all():
        raise SlideError(f"{path}: its affine is no orientation in space")
    turned = apply_orientation(voxels, stored)
    new_affine = affine @ inv_ornt_aff(stored, voxels.shape)
    x, y, z = nib.affines.voxel_sizes(new_affine).tolist()
    return Volume(path, turned, None, new_affine, (x, y, z), False, stored)


def _nifti(path: Path) -> Volume:
    import nibabel as nib

    image: Any = nib.load(path)
    return _oriented(path, np.asarray(image.get_fdata(dtype=np.float32)), np.asarray(image.affine, np.float64))


def _dicom(folder: Path) -> Volume:
    """A series of one slice per file; sorted by place along the slices' normal, not by number."""
    import pydicom

    from data_prep.volumes.dicom_codecs import register

    register()
    files = sorted(entry for entry in folder.iterdir() if _is_dicom(entry))
    if not files:
        raise SlideError(f"{folder}: no DICOM files in this folder")
    slices: list[tuple[Path, Any]] = [(file, pydicom.dcmread(file)) for file in files]
    first = slices[0][1]
    for file, s in slices:
        if "PixelData" not in s:
            raise SlideError(f"{file}: holds no pixels, or is cut off")
    series = {str(s.get("SeriesInstanceUID")) for _, s in slices}
    if len(series) > 1:
        raise SlideError(f"{folder}: {len(series)} DICOM series in one folder; give each a folder of its own")
    for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        for file, s in slices:
            if s.get(name) is None:
                raise SlideError(f"{file}: the DICOM tag {name} is missing")
            if np.abs(np.array(s[name].value, float) - np.array(first[name].value, float)).max() > 1e-3:
                raise SlideError(f"{file}: its {name} differs from that of {files[0].name}")
    down, across = (np.array(first.ImageOrientationPatient[i : i + 3], float) for i in (3, 0))
    normal = np.cross(across, down)
    places = [float(np.dot(np.array(s.ImagePositionPatient, float), normal)) for _, s in slices]
    order = np.argsort(places)
    steps = np.diff(np.array(places)[order])
    if len(steps) and (steps.min() < 1e-3 or steps.max() - steps.min() > 0.02 * abs(float(np.median(steps))) + 1e-3):
        what = "two slices at one place" if steps.min() < 1e-3 else "a slice is missing or the spacing is uneven"
        raise SlideError(f"{folder}: {what} (steps from {steps.min():.3f} to {steps.max():.3f} mm)")
    planes = []
    for i in order:
        file, s = slices[i]
        try:
            stored = s.pixel_array
        except Exception as error:  # compressed by something that no installed decoder knows, or damaged
            raise SlideError(f"{file}: its pixels cannot be decoded: {one_line(error)}") from error
        planes.append(stored * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0)))
    step = float(np.median(steps)) if len(steps) else float(first.get("SliceThickness") or 1)
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    affine = np.eye(4)  # voxel (column, row, slice) to LPS, then to RAS
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = across * column_mm, down * row_mm, normal * step
    affine[:3, 3] = np.array(slices[order[0]][1].ImagePositionPatient, float)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return _oriented(folder, np.stack(planes, -1).transpose(1, 0, 2).astype(np.float32), affine)


def _arrays(path: Path) -> Volume:
    """`image` and `label` of a slice (npz) or a volume (h5), as the usual BTCV preprocessing writes them."""
    if path.name.lower().endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in ("image", "label") if key in file.files}
        except zipfile.BadZipFile as error:
            raise SlideError(f"{path}: damaged or cut off ({error})") from error
    else:
        with h5py.File(path, "r") as file:
            found = {key: np.asarray(file[key]) for key in ("image", "label") if key in file}
    if "image" not in found:
        raise SlideError(f"{path}: no array called image in it")
    image = found["image"][None] if found["image"].ndim == 2 else found["image"]
    if image.ndim != 3:
        raise SlideError(f"{path}: image has {image.ndim} dimensions instead of 2 or 3")
    labels = None
    if "label" in found:
        values = found["label"].reshape(image.shape) if found["label"].size == image.size else found["label"]
        if values.shape != image.shape:
            raise SlideError(f"{path}: label is {values.shape}, image is {image.shape}")
        labels = _as_ras(check_labels(path, values, 255))
    windowed = bool(np.nanmin(image) >= 0 and np.nanmax(image) <= 1)
    return Volume(path, _as_ras(image), labels, None, None, windowed, None)


def _as_ras(stack: NDArray[Any]) -> NDArray[Any]:
    """(slice, row, column) to axes whose axial slices look as the rows and columns were."""
    return stack.transpose(2, 1, 0)[::-1, ::-1]


def slice_count(volume: Volume, axis: str) -> int:
    """Number of slices along an axis."""
    return int(volume.voxels.shape[AXES.index(axis)])


def picture_of(values: NDArray[Any], axis: str, index: int) -> NDArray[Any]:
    """One slice as a picture, (rows, columns): head or front at the top, the patient's right at the left.

    Args:
        values: (X, Y, Z) in RAS+ order.
        axis: sagittal, coronal or axial; sagittal pictures have the front at the left.
        index: slice, from left, back or feet.
    """
    plane = np.take(values, index, AXES.index(axis))
    return np.ascontiguousarray(plane.T[::-1, ::-1])


def volume_of(pictures: list[NDArray[Any]], axis: str) -> NDArray[Any]:
    """The inverse of `picture_of`: all slices along an axis, in order, as one (X, Y, Z) array."""
    return np.stack([picture[::-1, ::-1].T for picture in pictures], AXES.index(axis))
