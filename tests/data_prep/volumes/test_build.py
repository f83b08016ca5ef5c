"""CT volumes: read in one orientation, cut slice by slice, put back together, scored in three dimensions."""

import json
from pathlib import Path

import h5py
import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from data_prep.__main__ import main
from data_prep.slides.base import SlideError
from data_prep.token_files.token_file import read_tokens, token_path
from data_prep.token_files.verify import verify_file
from data_prep.tokens.ceiling import ceiling
from data_prep.volumes.build import ORGANS, read_sidecar, reassemble, volume_dice, windowed
from data_prep.volumes.read import AXES, find_volumes, load_volume, picture_of, save_labels, slice_count, volume_of
from tests.helpers.volumes import body, write_nifti


def write_dicom(
    folder: Path,
    hu: np.ndarray,
    spacing=(2.0, 3.0, 5.0),
    skip: int | None = None,
    again: bool = False,
    uid: str | None = None,
) -> Path:
    """A series of axial slices: rows to the back, columns to the left (LPS), numbered against their order."""
    folder.mkdir(exist_ok=True)
    series, count = uid or generate_uid(), hu.shape[2]
    for k in range(count):
        if k == skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID = series
        ds.Modality, ds.InstanceNumber = "CT", count - k
        ds.Rows, ds.Columns = hu.shape[1], hu.shape[0]
        ds.PixelSpacing, ds.ImageOrientationPatient = [spacing[1], spacing[0]], [1, 0, 0, 0, 1, 0]
        # The first column is the patient's right, the first row the front: x to the left and y to the back in LPS.
        corner = [50 - spacing[0] * (hu.shape[0] - 1), 70 - spacing[1] * (hu.shape[1] - 1)]
        ds.ImagePositionPatient = [*corner, 10 + spacing[2] * k]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = (hu[::-1, ::-1, k].T + 1024).round().astype(np.uint16).tobytes()
        ds.save_as(folder / f"IM{(k * 7) % count:03d}.dcm", enforce_file_format=True)
        if again and k == 2:
            ds.save_as(folder / "again.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "LAS", "ASL", "SPR", "IRP"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_in_any_order_is_the_same_volume(axcodes: str, suffix: str, tmp_path: Path):
    hu, labels = body()
    path = write_nifti(tmp_path / f"a{suffix}", hu, axcodes)
    volume = load_volume(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume.voxels, np.asarray(canonical.dataobj))
    np.testing.assert_array_equal(volume.voxels, hu)
    np.testing.assert_allclose(volume.affine, canonical.affine)
    assert volume.spacing_mm == pytest.approx((2, 3, 5))
    out = tmp_path / f"pred{suffix}"
    save_labels(out, labels, volume)
    saved, stored = nib.load(out), nib.load(path)
    assert saved.shape == stored.shape
    np.testing.assert_allclose(saved.affine, stored.affine)
    np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(saved).dataobj), labels)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, out.name}


def test_dicom_series_is_the_volume_whatever_its_numbers_say(tmp_path: Path):
    hu, _ = body()
    volume = load_volume(write_dicom(tmp_path / "series", hu))
    expected = load_volume(write_nifti(tmp_path / "a.nii", hu))
    np.testing.assert_array_equal(volume.voxels, hu)
    assert volume.spacing_mm == pytest.approx(expected.spacing_mm)
    np.testing.assert_allclose(np.diag(volume.affine), np.diag(expected.affine))
    np.testing.assert_allclose(volume.affine[:3, 3], expected.affine[:3, 3])
    file = next((tmp_path / "series").iterdir())
    one = pydicom.dcmread(file)
    np.testing.assert_array_equal(
        pydicom.pixels.apply_rescale(one.pixel_array, one), np.array(one.pixel_array, float) - 1024
    )


def test_axial_slices_look_as_in_a_viewer():
    hu, _ = body()
    picture = picture_of(hu, "axial", 3)
    assert picture.shape == (50, 60)
    x, y = 40, 30  # the right-hand organ, in front: left and up in the picture
    assert picture[49 - y, 59 - x] == hu[x, y, 3]
    for axis in AXES:
        pictures = [picture_of(hu, axis, i) for i in range(hu.shape[AXES.index(axis)])]
        np.testing.assert_array_equal(volume_of(pictures, axis), hu)
    assert picture_of(hu, "coronal", 5)[0, 0] == hu[-1, 5, -1]  # the head at the top


@pytest.mark.parametrize("kind", ["npz", "h5"])
def test_arrays_of_btcv_code(kind: str, tmp_path: Path):
    image = np.random.default_rng(0).random((5, 12, 16)).astype(np.float32)
    label = (image > 0.7).astype(np.float32)
    if kind == "npz":
        path = tmp_path / "case0005_slice000.npz"
        np.savez(path, image=image[0], label=label[0])
        image, label = image[:1], label[:1]
    else:
        path = tmp_path / "case0001.npy.h5"
        with h5py.File(path, "w") as out:
            out["image"], out["label"] = image, label
    volume = load_volume(path)
    assert volume.windowed and slice_count(volume, "axial") == len(image)
    for k in range(len(image)):  # as stored
        np.testing.assert_array_equal(picture_of(volume.voxels, "axial", k), image[k])
        np.testing.assert_array_equal(picture_of(volume.labels, "axial", k), label[k])


def test_window():
    np.testing.assert_array_equal(windowed(np.array([-2000, -125, 75, 275, 3000]), (-125, 275)), [0, 0, 128, 255, 255])


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """Token files of a volume with labels, patches of one pixel where it matters."""
    hu, labels = body()
    (tmp_path / "ct").mkdir()
    (tmp_path / "seg").mkdir()
    write_nifti(tmp_path / "ct" / "img0001.nii.gz", hu, "LPS")
    write_nifti(tmp_path / "seg" / "label0001.nii.gz", labels, "LPS")
    return tmp_path, tmp_path / "out"


def volume(*args: object) -> int:
    return main(["volume", *map(str, args)])


ARGS = ("--resolution", "64", "--patch", "4", "--length", "64")


def test_from_volumes_to_dice(built: tuple[Path, Path], capsys):
    folder, out = built
    args = (folder / "ct", "--labels", folder / "seg", "--out", out, *ARGS)
    assert volume(*args) == 0
    names = [f"img0001_slice{k:03d}" for k in range(8)]
    assert sorted(p.name for p in out.glob("*.h5")) == [f"{name}.tokens.h5" for name in names]
    assert all(verify_file(token_path(out, name)) == [] for name in names)
    about = json.loads((out / "img0001.volume.json").read_text())
    assert about["slices"] == names and about["spacing_mm"] == [2, 3, 5] and about["axis"] == "axial"
    before = {p.name: p.read_bytes() for p in out.glob("*.h5")}
    assert volume(*args) == 0 and "0 done, 8 skipped, 0 failed of 8 slices" in capsys.readouterr().out
    assert volume(*args, "--window=-100,200") == 0 and "8 done" in capsys.readouterr().out
    assert volume(*args) == 0 and {p.name: p.read_bytes() for p in out.glob("*.h5")} == before

    # Cells predicted from the true counts, painted back, against plain NumPy on the painted volume.
    _, labels = body()
    cells, intersection, size = [], np.zeros(13), np.zeros(13)
    for name in names:
        token_set, _ = read_tokens(token_path(out, name))
        most = token_set.mask_counts.argmax(-1) + 1
        cells.append(np.where(2 * token_set.mask_counts.max(-1) > token_set.content_counts, most, 0))
        for k in range(13):
            on = cells[-1] == k + 1
            intersection[k] += token_set.mask_counts[..., k][on].sum()
            size[k] += token_set.content_counts[on].sum()
    pred = reassemble("img0001", out, cells)
    found = volume_dice(pred, labels, len(ORGANS))
    truth = np.array([(labels == k + 1).sum() for k in range(13)])
    expected = [2 * intersection[k] / (size[k] + truth[k]) if truth[k] else None for k in range(13)]
    assert found["dice"] == pytest.approx(expected) and found["absent"] == 11
    assert found["mean"] == pytest.approx(np.mean([expected[1], expected[5]])) and found["mean"] > 0.8
    sets = [read_tokens(token_path(out, name))[0] for name in read_sidecar("img0001", out)["slices"]]
    best = ceiling(*(np.concatenate([getattr(one, key) for one in sets]) for key in ("mask_counts", "content_counts")))
    assert all(best[k] >= found["dice"][k] - 1e-9 for k in (1, 5))


@pytest.mark.parametrize("axis", AXES)
def test_patches_of_single_pixels_lose_nothing(axis: str, built: tuple[Path, Path]):
    folder, out = built
    assert (
        volume(
            folder / "ct",
            "--labels",
            folder / "seg",
            "--out",
            out,
            "--resolution",
            "64",
            "--patch",
            "64",
            "--patching",
            "uniform",
            "--axis",
            axis,
        )
        == 0
    )
    _, labels = body()
    cells = []
    case = "img0001" if axis == "axial" else f"img0001_{axis}"  # so that axes never mix in one folder
    for name in json.loads((out / f"{case}.volume.json").read_text())["slices"]:
        token_set, _ = read_tokens(token_path(out, name))
        cells.append(np.where(token_set.mask_counts.any(-1), token_set.mask_counts.argmax(-1) + 1, 0))
    np.testing.assert_array_equal(reassemble(case, out, cells), labels)
    assert volume_dice(labels, labels, 13)["mean"] == 1


def test_volumes_scaled_to_the_frame_come_back_at_their_size(built: tuple[Path, Path]):
    folder, out = built
    assert (
        volume(
            folder / "ct",
            "--labels",
            folder / "seg",
            "--out",
            out,
            "--resolution",
            "32",
            "--patch",
            "32",
            "--patching",
            "uniform",
        )
        == 0
    )
    cells = []
    for name in json.loads((out / "img0001.volume.json").read_text())["slices"]:
        token_set, _ = read_tokens(token_path(out, name))
        cells.append(np.where(token_set.mask_counts.any(-1), token_set.mask_counts.argmax(-1) + 1, 0))
    _, labels = body()
    pred = reassemble("img0001", out, cells)
    assert pred.shape == labels.shape and volume_dice(pred, labels, 13)["mean"] > 0.75


def test_dice_counts_absent_organs_apart():
    a, b = np.array([1, 1, 0, 3]), np.array([1, 0, 0, 2])
    assert volume_dice(a, b, 3) == {"dice": [2 / 3, 0.0, None], "mean": 1 / 3, "absent": 1}
    assert volume_dice(b * 0, b * 0, 2) == {"dice": [None, None], "mean": None, "absent": 2}
    with pytest.raises(ValueError, match="prediction is"):
        volume_dice(a, b[:2], 3)


def test_files_that_are_no_volumes(tmp_path: Path):
    hu, _ = body()
    whole = write_nifti(tmp_path / "whole.nii.gz", hu).read_bytes()
    cases = {
        "cut.nii.gz": (whole[: len(whole) // 2], "cannot be read as a volume"),
        "text.nii": (b"no volume", "cannot be read as a volume"),
        "cut.npz": (b"PK\3\4 cut", "damaged or cut off|cannot be read"),
        "x.h5": (b"none", "cannot be read as a volume"),
        "x.png": (b"none", "not a volume"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(SlideError, match=words) as caught:
            load_volume(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3)), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(SlideError, match="4 dimensions instead of 3"):
        load_volume(tmp_path / "four.nii")
    holes = hu.copy()
    holes[3, 3, 3] = np.nan
    with pytest.raises(SlideError, match="no numbers"):
        load_volume(write_nifti(tmp_path / "nan.nii", holes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"skip": 3}, "a slice is missing or the spacing is uneven"),
        ({"again": True}, "two slices at one place"),
    ],
)
def test_series_with_faults(change: dict, words: str, tmp_path: Path):
    with pytest.raises(SlideError, match=words):
        load_volume(write_dicom(tmp_path / "s", body()[0], **change))


def test_two_series_in_one_folder(tmp_path: Path):
    folder = write_dicom(tmp_path / "s", body()[0])
    other = write_dicom(tmp_path / "t", body()[0])
    for file in other.iterdir():
        file.rename(folder / f"b{file.name}")
    with pytest.raises(SlideError, match="2 DICOM series in one folder"):
        load_volume(folder)


def test_labels_that_do_not_fit(built: tuple[Path, Path], capsys):
    folder, out = built
    _, labels = body()
    for values, words in (
        (labels[:, :, :-1], "labels are 60 x 50 x 7 voxels, the volume img0001.nii.gz is 60 x 50 x 8"),
        (labels * 3, "label 18, but only classes 1 to 13 are expected"),
        (labels + 0.5, "labels are no whole numbers"),
    ):
        write_nifti(folder / "seg" / "label0001.nii.gz", values.astype(np.float32), "LPS")
        assert volume(folder / "ct", "--labels", folder / "seg", "--out", out, *ARGS) == 1
        captured = capsys.readouterr()
        assert words in captured.err and "Traceback" not in captured.err and "1 failed" in captured.out
    write_nifti(folder / "seg" / "label0001.nii.gz", labels, "LPS", spacing=(9, 3, 5))
    assert volume(folder / "ct", "--labels", folder / "seg", "--out", out, *ARGS) == 1
    assert "affines differ" in capsys.readouterr().err
    (folder / "seg" / "label0001.nii.gz").unlink()
    assert volume(folder / "ct", "--labels", folder / "seg", "--out", out, *ARGS) == 1
    assert "no labels called img0001 or label0001" in capsys.readouterr().err
    assert not list(out.glob("*.h5"))


def test_find_volumes(tmp_path: Path):
    hu, _ = body((8, 8, 4))
    write_dicom(tmp_path / "patient1", hu)
    write_nifti(tmp_path / "b.nii.gz", hu)
    assert [p.name for p in find_volumes([tmp_path])] == ["b.nii.gz", "patient1"]
    assert find_volumes([tmp_path / "patient1"]) == [tmp_path / "patient1"]
    write_nifti(tmp_path / "b.nii", hu)
    for file in (tmp_path / "patient1").iterdir():  # as scanners name them
        file.rename(file.with_suffix(""))
    assert find_volumes([tmp_path / "patient1"]) == [tmp_path / "patient1"]
    np.testing.assert_array_equal(load_volume(tmp_path / "patient1").voxels, hu)
    for paths, words in (([tmp_path], "two volumes are called b"), ([tmp_path / "none"], "no such file")):
        with pytest.raises(SlideError, match=words):
            find_volumes(paths)


ENCODERS = {
    "JPEGLSLossless": lambda stored: imagecodecs.jpegls_encode(stored.view(np.uint16)),
    "JPEGLosslessSV1": lambda stored: imagecodecs.ljpeg_encode(stored.view(np.uint16)),
    "JPEG2000Lossless": lambda stored: imagecodecs.jpeg2k_encode(stored, codecformat="j2k", reversible=True),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["JPEGLSLossless", "JPEGLosslessSV1", "JPEG2000Lossless", "RLELossless"])
def test_compressed_dicom_is_the_same_volume(kind: str, signed: bool, tmp_path: Path):
    hu, _ = body()
    plain = write_dicom(tmp_path / "plain", hu.round())
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in plain.iterdir():
        ds = pydicom.dcmread(file)
        stored = ds.pixel_array
        if signed:
            ds.PixelRepresentation, ds.RescaleIntercept = 1, 0
            stored = stored.astype(np.int16) - 1024
            ds.PixelData = stored.tobytes()
            ds.save_as(file, enforce_file_format=True)
        if kind == "RLELossless":
            ds.compress(getattr(pydicom.uid, kind))
        else:
            frame = ENCODERS[kind](stored)
            ds.file_meta.TransferSyntaxUID = getattr(pydicom.uid, kind)
            ds.PixelData = pydicom.encaps.encapsulate([frame])
            ds["PixelData"].is_undefined_length = True
        ds.save_as(packed / file.name, enforce_file_format=True)
    found, expected = load_volume(packed), load_volume(plain)
    assert expected.voxels.min() < -900
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_array_equal(found.affine, expected.affine)
    damaged = sorted(packed.iterdir())[3]
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) - 500])
    cut_off = f"^{damaged}: holds no pixels, or is cut off$"
    with pytest.warns(UserWarning, match="End of file"), pytest.raises(SlideError, match=cut_off):
        load_volume(packed)
    ds = pydicom.dcmread(plain / damaged.name)
    ds.file_meta.TransferSyntaxUID = getattr(pydicom.uid, kind)
    ds.PixelData = pydicom.encaps.encapsulate([bytes(200)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(damaged, enforce_file_format=True)
    with pytest.raises(SlideError, match=f"^{damaged}: its pixels cannot be decoded: .+$") as caught:
        load_volume(packed)
    assert "\n" not in str(caught.value)
