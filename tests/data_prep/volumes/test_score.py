"""`volume score` and `volume reassemble`: predictions on slices as three-dimensional Dice and as label volumes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.token_files.token_file import read_tokens, token_path
from data_prep.volumes.build import volume_dice
from data_prep.volumes.read import load_volume
from tests.helpers.volumes import body, write_nifti


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a volume of 60 x 50 x 8 with labels, tokens of one pixel per cell."""
    folder = tmp_path_factory.mktemp("volume")
    hu, labels = body()
    for name, values in (("ct/img0001", hu), ("seg/label0001", labels)):
        (folder / name).parent.mkdir()
        write_nifti(folder / f"{name}.nii.gz", values, "LPS")
    assert (
        main(
            [
                "volume",
                str(folder / "ct"),
                "--labels",
                str(folder / "seg"),
                "--out",
                str(folder / "tokens"),
                "--resolution",
                "64",
                "--patch",
                "8",
                "--patching",
                "uniform",
            ]
        )
        == 0
    )
    return folder / "tokens"


def slice_names(tokens: Path) -> list[str]:
    return json.loads((tokens / "img0001.volume.json").read_text())["slices"]


def predictions(tokens: Path, folder: Path, packed: bool) -> tuple[Path, dict[str, np.ndarray]]:
    """The truth with every cell of the first rows of tokens wrong."""
    folder.mkdir()
    cells = {}
    for name in slice_names(tokens):
        token_set, _ = read_tokens(token_path(tokens, name))
        best = np.where(token_set.mask_counts.any(-1), token_set.mask_counts.argmax(-1) + 1, 0).astype(np.uint8)
        best[:24] = 6
        cells[name] = best
        if not packed:
            np.save(folder / f"{name}.npy", best)
    if packed:
        np.savez(folder / "img0001.npz", **cells)
    return folder, cells


@pytest.mark.parametrize("packed", [False, True])
def test_score_and_reassemble(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool) -> None:
    folder, _ = predictions(tokens, tmp_path / "pred", packed)
    assert main(["volume", "reassemble", str(tokens), "--predictions", str(folder), "--out", str(tmp_path / "o")]) == 0
    assert "1 volume -> " in capsys.readouterr().out
    pred = load_volume(tmp_path / "o" / "img0001.nii.gz")
    _, labels = body()
    expected = volume_dice(pred.voxels, labels, 13)
    assert 0 < expected["mean"] < 1 and expected["absent"] == 11
    np.testing.assert_allclose(pred.affine, load_volume(tokens.parent / "ct" / "img0001.nii.gz").affine)
    assert nib.load(tmp_path / "o" / "img0001.nii.gz").get_data_dtype() == np.uint8
    for more in ((), ("--labels", str(tokens.parent / "seg"))):  # one cell a pixel: the two ways agree
        args = ["volume", "score", str(tokens), "--predictions", str(folder), "--json", str(tmp_path / "s.json"), *more]
        assert main(args) == 0
        found = json.loads((tmp_path / "s.json").read_text())
        assert found["volumes"]["img0001"] == expected and found["mean"] == expected["mean"]
    said = capsys.readouterr().out
    assert f"img0001: mean {expected['mean']:.4f}, 11 absent, per class - {expected['dice'][1]:.4f} -" in said


def test_without_predictions_the_cells_are_scored(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["volume", "score", str(tokens), "--labels", str(tokens.parent / "seg")]) == 0
    assert "img0001: mean 1.0000" in capsys.readouterr().out


def test_coarse_cells_lose_something(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "volume",
                str(tokens.parent / "ct"),
                "--labels",
                str(tokens.parent / "seg"),
                "--out",
                str(tmp_path),
                "--resolution",
                "64",
                "--patch",
                "4",
                "--length",
                "16",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["volume", "score", str(tmp_path), "--json", str(tmp_path / "a.json")]) == 0
    assert (
        main(
            [
                "volume",
                "score",
                str(tmp_path),
                "--labels",
                str(tokens.parent / "seg"),
                "--json",
                str(tmp_path / "b.json"),
            ]
        )
        == 0
    )
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a == b and 0.5 < a["mean"] < 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("shape", "img0001_slice003.npy: img0001_slice003 is (1, 8, 8), the cells are (64, 8, 8)"),
        ("missing", "img0001_slice003.npy: no such file, and no img0001.npz beside it"),
        ("noise", "img0001_slice003.npy: no predictions ("),
        ("parts", "img0001_slice003.npy: labels are no whole numbers"),
    ],
)
def test_bad_predictions(
    tokens: Path, tmp_path: Path, spoil: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cells = predictions(tokens, tmp_path / "pred", False)
    path = folder / "img0001_slice003.npy"
    if spoil == "shape":
        np.save(path, cells["img0001_slice003"][:1])
    elif spoil == "missing":
        path.unlink()
    elif spoil == "noise":
        path.write_bytes(b"\0" * 100)
    else:
        np.save(path, cells["img0001_slice003"] + 0.5)
    for command in (["score"], ["reassemble", "--out", str(tmp_path / "o")]):
        assert main(["volume", command[0], str(tokens), "--predictions", str(folder), *command[1:]]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not list((tmp_path / "o").iterdir())


def test_bad_arguments(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        ([tmp_path], "no *.volume.json in it"),
        ([tmp_path / "x"], "no such folder"),
        ([tokens, "--case", "img9"], "no volume img9; it holds img0001"),
        ([tokens, "--predictions", tmp_path / "x"], "--predictions"),
    ):
        assert main(["volume", "score", *map(str, args)]) == 64
        assert words in capsys.readouterr().err
