"""Training on a pack is training on the folder it was made of."""

import shutil

import numpy as np
import pytest

from data_prep.token_files.pack import pack_folder
from launch.config.config import ConfigError
from launch.data.token_files import TokenFiles
from launch.experiments.load import load
from tests.helpers.small_runs import SPLIT, losses, overrides


@pytest.fixture(scope="module")
def packed(apf_files, tmp_path_factory):
    pack = tmp_path_factory.mktemp("packs") / "pack"
    pack_folder(apf_files, pack, 20_000)
    return pack


def files(folder, *words):
    return TokenFiles(load("smoke", [*overrides(folder, "unused"), *words]).data)


def test_the_same_slides_and_tokens(apf_files, packed):
    folder, pack = files(apf_files), files(packed)
    pack.check()
    assert folder.split == pack.split == SPLIT and folder.split_sha256 == pack.split_sha256
    by_hash = [files(f, "data.split=null", "data.fractions=[0.5,0.2,0.3]").split for f in (apf_files, packed)]
    assert by_hash[0] == by_hash[1]
    for name in SPLIT["train"]:
        ours, theirs = pack.load(name), folder.load(name)
        assert all(np.array_equal(getattr(ours, key), getattr(theirs, key)) for key in vars(ours))
        np.testing.assert_array_equal(pack.truth_pixels(name, ours), folder.truth_pixels(name, theirs))
    assert pack.preprocessing_seconds() == folder.preprocessing_seconds()


def test_a_damaged_pack_is_one_line(packed, tmp_path):
    bad = tmp_path / "pack"
    shutil.copytree(packed, bad)
    (bad / "pack.json").write_text("{")
    with pytest.raises(ConfigError, match=r"pack\.json: not the index of a pack") as error:
        files(bad)
    assert "\n" not in str(error.value)


@pytest.mark.gloo
def test_the_same_losses(apf_files, packed, tmp_path, start):
    found = []
    for folder in (apf_files, packed):
        root = tmp_path / folder.name
        settings = {"run_id": "r", "train__max_steps": 6, "eval__pictures_px": 0}
        start(1, overrides(folder, root, **settings)).wait()
        found.append(losses(root / "smoke" / "r"))
    assert len(found[0]) == 6 and found[0] == found[1]
