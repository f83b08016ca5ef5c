"""A small CT volume with two organs, and the NIfTI file that holds it."""

from pathlib import Path

import nibabel as nib
import numpy as np


def body(shape=(60, 50, 8)) -> tuple[np.ndarray, np.ndarray]:
    """A body in RAS+: HU with two organs, and their labels; no symmetry, so that every flip shows."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    rng = np.random.default_rng(0)
    hu = np.where(((x - 28) / 26) ** 2 + ((y - 25) / 20) ** 2 < 1, 40.0, -1000.0) + rng.integers(-5, 6, shape)
    labels = np.zeros(shape, np.uint8)
    labels[((x - 40) ** 2 + (y - 30) ** 2 < 60) & (z > 1)] = 6
    labels[((x - 15) ** 2 + (y - 14) ** 2 < 25) & (z < 6)] = 2
    hu[labels == 6] += 60
    hu[labels == 2] += 120
    return hu.astype(np.float32), labels


def write_nifti(path: Path, values: np.ndarray, axcodes: str = "RAS", spacing=(2.0, 3.0, 5.0)) -> Path:
    """The volume stored in another order of axes, at the same place in space."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-50, -70, 10)
    image = nib.Nifti1Image(values, affine)
    to = nib.orientations.axcodes2ornt(tuple(axcodes))
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to)), path)
    return path
