"""`python -m launch erf`: noise and pictures, trained weights, what is in the file, and what is refused."""

import json

import cv2
import numpy as np
import pytest
import torch

from launch.__main__ import main
from launch.experiments.load import load
from launch.score.receptive_field import inputs_of
from launch.train.trainer import build_model
from tests.helpers.small_runs import LENGTH, PATCH, SIZE

SMALL = ["data.resolution=96", "model.strides=[1,1,2,1,1]"]
TOKENS = [f"data.resolution={SIZE}", f"data.patch={PATCH}", f"data.length={LENGTH}"]


@pytest.fixture
def folder(tmp_path):
    """Six gray pictures, two per split, with labels."""
    rng = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    for i in range(6):
        cv2.imwrite(str(tmp_path / "p" / f"m{i}.png"), rng.integers(0, 65535, (96, 96), dtype=np.uint16))
    (tmp_path / "l.csv").write_text("name,label\n" + "".join(f"m{i},{i % 2}\n" for i in range(6)))
    split = {"train": ["m0", "m1"], "val": ["m2", "m3"], "test": ["m4", "m5"]}
    (tmp_path / "s.json").write_text(json.dumps(split))
    return tmp_path


def words(folder, *more):
    where = [f"data.dir={folder / 'p'}", f"data.labels={folder / 'l.csv'}", f"data.split={folder / 's.json'}"]
    return ["erf", "gmic_patch", *where, *SMALL, "--out", str(folder / "out"), *more]


def result(folder, name="gmic_patch"):
    with np.load(folder / "out" / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def test_fields_of_pictures_are_written_with_what_they_are(folder, capsys):
    assert main(words(folder, "--images", "5")) == 0
    found = result(folder)
    about = json.loads(str(found["about"]))
    assert about["images"] == 2 and about["support_hw_px"] == [96, 96] and about["weights"] is None
    assert about["pictures"] == f"{folder / 'p'} (test)" and about["model"]["name"] == "gmic"
    np.testing.assert_allclose(found["profile_row"], found["map"].sum(1))
    np.testing.assert_allclose(found["profile_col"], found["map"].sum(0))
    assert found["map"].shape == (96, 96) and found["map"].max() > 0
    assert "2 pictures of 96 x 96 px, support 96 x 96 px" in capsys.readouterr().out


def test_trained_weights_are_used(folder):
    config = load("gmic_patch", SMALL)
    torch.manual_seed(7)
    model = build_model(config)
    with torch.no_grad():
        model.stem.weight.zero_()
        model.stem.weight[:, :, 3, 3] = 1.0
    torch.save(model.state_dict(), folder / "w.pt")
    assert main(words(folder, f"train.init_from={folder / 'w.pt'}")) == 0
    seen = result(folder)["map"] > 0  # only every second pixel can matter to a stem that reads its middle alone
    assert seen.any() and not seen[1::2].any() and not seen[:, 1::2].any()


def test_noise_needs_no_data_and_follows_the_seed(tmp_path):
    def noise(*more):
        return list(inputs_of(load("hct_half", ["data.image_hw=[40,30]", *more]), "test", 2, True))

    first, again, other = noise(), noise(), noise("train.seed=1")
    assert first[0].shape == (1, 40, 30) and 0 <= first[0].min() and first[0].max() < 1
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(*first)
    assert main(["erf", "hct_patch", *SMALL, "--noise", "--images", "1", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(str(result(tmp_path, "hct_patch")["about"]))["pictures"] == "noise"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["data.dir=nowhere"], "error: data.dir=nowhere: no such folder"),
        (["--layer", "blocks.77"], "error: erf of gmic_patch: no layer 'blocks.77' in GMIC; e.g. stem, blocks"),
        (["--layer", "head"], "gives (1, 2), which is no map of a 96 x 96 picture"),
        (["--images", "0"], "must be a whole number of at least 1, got '0'"),
        (["train.init_from=nowhere.pt"], "error: train.init_from=nowhere.pt: No such file"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(folder, capsys, more, line):
    assert main(words(folder, *more)) == 64
    assert line in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_fields_of_token_sets_lie_in_the_frame(apf_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.score.receptive_field.LARGEST_MAP", SIZE // 4)
    data = [f"data.dir={apf_files}", f"data.split={apf_files / 'split.json'}", *TOKENS]
    asked = ["erf", "smoke", *data, "--out", str(tmp_path / "out")]
    assert main([*asked, "--images", "1"]) == 0
    assert f"1 pictures of {SIZE} x {SIZE} px, support {SIZE} x {SIZE} px" in capsys.readouterr().out
    found = result(tmp_path, "smoke")
    about = json.loads(str(found["about"]))
    assert found["map"].shape == (SIZE // 4, SIZE // 4) and found["map"].max() > 0
    assert about["pixel_px"] == 4 and about["support_hw_px"] == [SIZE, SIZE] and about["model"]["name"] == "unetr"
    assert main([*asked, "--noise"]) == 64
    assert "--noise needs data.kind=images or tiles: token sets are made from pictures" in capsys.readouterr().err


def test_an_experiment_is_named_in_what_is_wrong_with_its_model(folder, capsys):
    assert main(words(folder, "model.strides=[0,1,1,1,1]")) == 64
    assert "strides must be 5 positive numbers, got [0, 1, 1, 1, 1]" in capsys.readouterr().err
