"""Digests of token files of many build settings, at one and three ranks: a refactoring changes none of them.

`GOLDEN_RECORD=1 python -m pytest tests/goldens` writes token_files.json anew, from one rank. A digest covers name,
type, shape and decoded values of a dataset, so how HDF5 stores it does not matter. Attributes are kept as text.
"""

import json
import shutil
from pathlib import Path

import cv2
import h5py
import nibabel as nib
import numpy as np
import pytest

from tests.goldens.commands import FOLDER, MPIEXEC, ROOT, changed, differences, digest, in_processes

GOLDEN = FOLDER / "token_files.json"
SAMPLES = ROOT / "data_prep" / "sample_data"
SMALL = ("10003", "10025")
# They name the code or follow from the rest.
LEFT_OUT = {"code_version", "checksum"}
SCRATCH = "IN"  # in a setting: the folder of what the fixture makes

APF = "IN/small --resolution 512"
MASKED = f"{APF} --masks IN/masks"
WIDE = "IN/wide --resolution 1024"
# name: arguments of `data_prep build`, or of `data_prep volume` where they begin with the word volume.
SETTINGS = {
    "budget": f"{MASKED} --patch 8 --length 256",
    "budget_p4": f"{APF} --patch 4 --length 1024",
    "budget_p16": f"{MASKED} --patch 16 --length 100",
    "budget_p1": "IN/small --resolution 128 --patch 1 --length 2000",
    "budget_r1024": f"{WIDE} --masks IN/wide_masks --patch 16 --length 511",
    "budget_r256": "IN/small --masks IN/masks --resolution 256 --patch 8 --length 64",
    "threshold": f"{MASKED} --patch 8 --split-value 20",
    "threshold_p16": f"{APF} --patch 16 --split-value 100 --thresholds 100,200",
    "threshold_zero": f"{APF} --patch 32 --split-value 0",
    "fixed": f"{MASKED} --patch 8 --length 256 --thresholds 60,120",
    "blur": f"{APF} --patch 8 --length 256 --blur 7",
    "no_blur": f"{APF} --patch 8 --length 256 --blur 1 --thresholds 100,200",
    "quantile": f"{APF} --patch 8 --length 256 --auto-quantile 0.7",
    "variance": f"{MASKED} --patch 8 --length 256 --split-on variance",
    "entropy": f"{MASKED} --patch 8 --length 256 --split-on entropy",
    "variance_p1": "IN/small --resolution 128 --patch 1 --length 301 --split-on variance",
    "cubic": f"{MASKED} --patch 8 --length 256 --resample cubic",
    "cubic_threshold": f"{APF} --patch 16 --split-value 50 --resample cubic",
    "strip": f"{MASKED} --patch 8 --length 256 --packing strip",
    "drop": f"{MASKED} --patch 8 --split-value 10 --length 200 --fit drop",
    "drop_seed": f"{MASKED} --patch 8 --split-value 50 --length 400 --fit drop --seed 7",
    "drop_strip": f"{MASKED} --patch 8 --split-value 10 --length 300 --fit drop --packing strip",
    "squash": f"{WIDE} --masks IN/wide_masks --patch 16 --length 256 --aspect squash",
    "uniform": f"{MASKED} --patch 32 --patching uniform",
    "uniform_squash": f"{WIDE} --masks IN/wide_masks --patch 64 --patching uniform --aspect squash",
    "uniform_strip": f"{APF} --patch 64 --patching uniform --packing strip",
    "fov": f"{MASKED} --fov IN/fov --patch 8 --length 256",
    "fov_uniform": f"{MASKED} --fov IN/fov --patch 32 --patching uniform",
    "classes": "IN/small --resolution 512 --masks IN/classes --classes 3 --patch 8 --length 256",
    "classes_fov": "IN/small --resolution 512 --masks IN/classes --fov IN/fov --classes 3 --patch 8 --split-value 30",
    "polygons": f"{APF} --masks IN/polygons --mask-classes glomerulus=1,other=2 --classes 2 --patch 8 --length 256",
    "kind_both": f"{APF} --masks IN/kinds --mask-kind both --classes 2 --patch 8 --length 256",
    # a frame of several regions takes the steps of a large slide
    "tile_64": f"{MASKED} --patch 8 --length 256 --tile 64",
    "tile_128_threshold": f"{MASKED} --patch 8 --split-value 20 --tile 128",
    "tile_256_fov": f"{MASKED} --fov IN/fov --patch 8 --length 256 --tile 256",
    "tile_256_fixed": f"{APF} --patch 16 --length 100 --thresholds 60,120 --tile 256",
    "tile_128_strip_drop": f"{MASKED} --patch 8 --split-value 10 --length 200 --fit drop --packing strip --tile 128",
    "tile_512_squash": f"{WIDE} --masks IN/wide_masks --patch 16 --length 256 --aspect squash --tile 512",
    # cells larger than what is read at once
    "one_leaf": "IN/small --resolution 4096 --masks IN/masks --patch 1 --split-value 100000000",
    "tile_64_one_leaf": f"{MASKED} --patch 1 --split-value 100000000 --tile 64",
    "tile_64_p1": f"{MASKED} --patch 1 --length 10 --tile 64",
    "tile_64_p4": f"{MASKED} --patch 4 --length 10 --tile 64",
    "svs": f"{SAMPLES}/wsi/CMU-1-Small-Region.svs --resolution 1024 --patch 16 --length 300",
    "svs_tile_512": f"{SAMPLES}/wsi/CMU-1-Small-Region.svs --resolution 2048 --patch 32 --length 300 --tile 512",
    "synth": "IN/synth --masks IN/synth_masks --resolution 1024 --patch 16 --length 256",
    "synth_tile_256": "IN/synth --masks IN/synth_masks --resolution 1024 --patch 8 --length 1000 --tile 256",
    "volume": "volume IN/volumes --labels IN/labels --classes 6 --resolution 32 --patch 2 --length 64",
    "volume_coronal": "volume IN/volumes --axis coronal --resolution 32 --patch 4 --split-value 5 --window=-1000,400",
    "volume_uniform": "volume IN/volumes --labels IN/labels --classes 6 --axis sagittal --resolution 32 --patch 8 "
    "--patching uniform",
}
# The same token file whatever shares the work.
SAME = {"budget": "tile_64", "threshold": "tile_128_threshold", "fov": "tile_256_fov", "squash": "tile_512_squash"}
# The steps of a large slide, whole slides, fields of view, three scores, and drawn tokens on ranks too.
ON_RANKS = (
    "budget", "threshold", "entropy", "drop_seed", "uniform", "fov", "tile_64", "tile_128_threshold", "tile_256_fov",
    "tile_256_fixed", "tile_512_squash", "svs_tile_512", "synth_tile_256",
)  # fmt: skip


def make_inputs(folder: Path) -> list[list[str]]:
    """Slides, masks, fields of view and volumes; returns the commands that make the rest."""
    for name in ("small", "masks", "fov", "classes", "polygons", "kinds", "wide", "wide_masks", "volumes", "labels"):
        (folder / name).mkdir()
    for stem in SMALL:
        shutil.copy(SAMPLES / "glomeruli24" / "images" / f"{stem}.jpg", folder / "small")
        shutil.copy(SAMPLES / "glomeruli24" / "masks" / f"{stem}.png", folder / "masks")
        mask = cv2.imread(str(folder / "masks" / f"{stem}.png"), cv2.IMREAD_GRAYSCALE)
        height, width = mask.shape
        y, x = np.mgrid[:height, :width]
        inside = ((x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.45 * width) ** 2).astype(np.uint8)
        cv2.imwrite(str(folder / "fov" / f"{stem}.png"), inside)
        classes = np.where(mask > 0, 1 + (x * 3 // width), 0).astype(np.uint8)
        cv2.imwrite(str(folder / "classes" / f"{stem}.png"), classes)
        cv2.imwrite(str(folder / "kinds" / f"{stem}_whole.tif"), (mask > 0).astype(np.uint8))
        viable = ((mask > 0) & (x < width // 2)).astype(np.uint8)
        cv2.imwrite(str(folder / "kinds" / f"{stem}_viable.tif"), viable)
        (folder / "polygons" / f"{stem}.geojson").write_text(json.dumps(polygons()))
    picture = cv2.imread(str(SAMPLES / "glomeruli24" / "images" / "10063.jpg"))
    mask = cv2.imread(str(SAMPLES / "glomeruli24" / "masks" / "10063.png"), cv2.IMREAD_GRAYSCALE)
    # by whole pixels, so that no interpolation of OpenCV is part of the input
    cv2.imwrite(str(folder / "wide" / "wide.png"), np.tile(picture, (1, 2, 1))[:700])
    cv2.imwrite(str(folder / "wide_masks" / "wide.png"), np.tile(mask, (1, 2))[:700])
    hu, labels = body()
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    nib.save(nib.Nifti1Image(hu, affine), folder / "volumes" / "img0001.nii")
    nib.save(nib.Nifti1Image(labels, affine), folder / "labels" / "label0001.nii")
    synth = ["data_prep", "synth", "--size", "2048,1500", "--seed", "3", "--out", f"{folder}/synth/made.tif"]
    return [[*synth, "--mask-out", f"{folder}/synth_masks/made.tif"]]


def polygons() -> dict:
    """Two classes of polygons in level-0 pixels, one with a hole."""
    ring = [[100, 100], [620, 140], [560, 600], [120, 520], [100, 100]]
    hole = [[250, 250], [250, 400], [400, 400], [400, 250], [250, 250]]
    other = [[700, 650], [900, 700], [760, 930], [700, 650]]
    shapes = {"glomerulus": [ring, hole], "other": [other]}
    return {"type": "FeatureCollection", "features": [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings},
         "properties": {"classification": {"name": name}}} for name, rings in shapes.items()]}  # fmt: skip


def body() -> tuple[np.ndarray, np.ndarray]:
    """A volume in Hounsfield units with two organs, and their labels."""
    shape = (26, 22, 6)
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    hu = np.where(((x - 12) / 11) ** 2 + ((y - 11) / 9) ** 2 < 1, 40.0, -1000.0) + (x * 7 + y * 5 + z * 3) % 11 - 5
    labels = np.zeros(shape, np.uint8)
    labels[((x - 17) ** 2 + (y - 13) ** 2 < 12) & (z > 1)] = 6
    labels[((x - 7) ** 2 + (y - 8) ** 2 < 6) & (z < 4)] = 2
    return (hu + 60 * (labels == 6) + 120 * (labels == 2)).astype(np.float32), labels


def command(name: str, inputs: Path, out: Path) -> list[str]:
    words = SETTINGS[name].replace(f"{SCRATCH}/", f"{inputs}/").split()
    words = words if words[0] == "volume" else ["build", *words]
    return ["data_prep", *words, "--out", str(out / name)]


def digest_of(array: np.ndarray) -> str:
    return f"{array.dtype.str} {'x'.join(map(str, array.shape))} {digest(np.ascontiguousarray(array).tobytes())}"


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """Per token file of a folder, and per sidecar of a volume: digests of datasets, attributes as text."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.tokens.h5")):
        with h5py.File(path, "r") as file:
            of_file = {name: digest_of(np.asarray(file[name])) for name in file}
            of_file |= {f"@{key}": str(value) for key, value in file.attrs.items() if key not in LEFT_OUT}
            of_file |= {f"{name}@{key}": str(v) for name in file for key, v in file[name].attrs.items()}
        found[path.name.removesuffix(".tokens.h5")] = of_file
    for path in sorted(folder.glob("*.volume.json")):
        found[path.name] = {f"@{key}": json.dumps(value) for key, value in json.loads(path.read_text()).items()}
        found[path.name].pop("@code_version", None)
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "synth").mkdir()
    (folder / "synth_masks").mkdir()
    in_processes(make_inputs(folder), folder)
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("alone")
    in_processes([command(name, inputs, out) for name in SETTINGS], out)
    return {name: contents(out / name) for name in SETTINGS}


def test_token_files_are_the_recorded_ones(alone: dict[str, dict]):
    assert all(alone.values())
    wrong = changed(GOLDEN, alone)
    if wrong:
        pytest.fail(wrong, pytrace=False)


@pytest.mark.parametrize(("whole", "regions"), SAME.items())
def test_regions_change_nothing(alone: dict[str, dict], whole: str, regions: str):
    assert alone[whole] == alone[regions]


@pytest.mark.mpi
@pytest.mark.skipif(not MPIEXEC.exists() and shutil.which("mpiexec") is None, reason="no mpiexec")
def test_three_ranks_make_the_recorded_files(inputs: Path, tmp_path: Path):
    in_processes([command(name, inputs, tmp_path) for name in ON_RANKS], tmp_path, ranks=3)
    golden = json.loads(GOLDEN.read_text())
    found = {name: contents(tmp_path / name) for name in ON_RANKS}
    wrong = differences({name: golden[name] for name in ON_RANKS}, found)
    if wrong:
        pytest.fail(wrong, pytrace=False)
