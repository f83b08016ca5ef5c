"""Training draws trees from several folders of the same slides: which, checks of the folders, resuming."""

import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from data_prep.token_files.token_file import read_tokens, token_path, write_tokens
from launch.config.config import ConfigError
from launch.data.batches import token_sample, training_batch
from launch.data.pictures import open_files
from launch.data.token_files import TokenFiles
from launch.experiments.load import load
from launch.jobs.body_steps import prep_arguments
from launch.records.record import read_record
from launch.train.classification import Classification
from tests.helpers.small_runs import (
    LENGTH,
    SPLIT,
    STEPS,
    ended_alike,
    finish_well,
    losses,
    overrides,
    stoppable,
    wait_for_steps,
    write_folder,
)


@pytest.fixture(scope="module")
def fewer(tmp_path_factory):
    """Trees of fewer tokens, of the training slides alone: what is evaluated comes from data.dir."""
    folder = write_folder(tmp_path_factory.mktemp("variants") / "fewer", length=10)
    for name in SPLIT["val"] + SPLIT["test"]:
        token_path(folder, name).unlink()
    return folder


def config(files, *variants, **more):
    return load("smoke", [*overrides(files, "unused", data__variants=json.dumps([*map(str, variants)]), **more)])


def batch_of(setup, picks, files=None):
    return training_batch(setup, files or TokenFiles(setup.data), picks)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_each_folder_is_drawn_as_often_and_by_the_sample_alone(apf_files, fewer, tmp_path):
    third = shutil.copytree(fewer, tmp_path / "third")
    setup = config(apf_files, fewer, third)
    files = TokenFiles(setup.data)
    files.check()
    rows = {0: len(files.load("b")), 1: len(read_tokens(token_path(fewer, "b"))[0])}
    assert rows[0] > rows[1]
    drawn = [files.draw("b", np.random.default_rng([0, 2, i])) for i in range(300)]
    kinds = [id(tokens) for tokens in drawn]
    counts = sorted(kinds.count(kind) for kind in set(kinds))
    assert len(counts) == 3 and counts[0] > 70, "three files in the cache, each as often"
    assert sum(len(tokens) == rows[0] for tokens in drawn) == kinds.count(id(files.load("b")))
    whole = batch_of(setup, [(1, i) for i in range(12)], files)
    assert {int(n) for n in whole["valid"].sum(1)} == set(rows.values()), "a slide has several trees"
    for i in (11, 0, 5):
        alone = batch_of(setup, [(1, i)])
        assert all(torch.equal(value[0], whole[name][i]) for name, value in alone.items())


def test_without_variants_nothing_is_drawn(apf_files):
    files = TokenFiles(config(apf_files).data)
    rng = np.random.default_rng(7)
    assert files.draw("a", rng) is files.load("a")
    assert rng.bit_generator.state == np.random.default_rng(7).bit_generator.state
    setup = config(apf_files)
    sample = token_sample(files.load("c"), LENGTH, np.random.default_rng([0, 2, 4]), True, setup.data.jitter)
    batch = batch_of(setup, [(2, 4)])
    assert all(np.array_equal(batch[name][0], values) for name, values in sample.items())


def test_parts_and_labels_of_slides_draw_too(apf_files, fewer, tmp_path):
    setup = config(apf_files, fewer, data__part=0.5, model__decoder="leaf", model__position="geom")
    sizes = {int(batch_of(setup, [(1, i)])["leaf_size"].max()) for i in range(12)}
    assert len(sizes) > 1
    labels = tmp_path / "labels.csv"
    names = [name for part in SPLIT.values() for name in part]
    labels.write_text("name,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    words = [word for word in overrides(apf_files, "unused") if not word.startswith("model.")]
    setup = load(
        "classify_paip",
        [
            *words,
            f"data.variants=[{fewer}]",
            f"data.labels={labels}",
            "data.classes=2",
            "train.precision=fp32",
        ],
    )
    files = open_files(setup.data)
    task = Classification(setup, files)
    lengths = task.batch([(1, i) for i in range(20)])["valid"].sum(1)
    assert {int(n) for n in lengths} == {len(files.load("b")), len(read_tokens(token_path(fewer, "b"))[0])}


def test_preprocessing_counts_every_folder(apf_files, fewer, tmp_path):
    alone = TokenFiles(config(apf_files).data).preprocessing_seconds()
    both = TokenFiles(config(apf_files, fewer).data).preprocessing_seconds()
    assert both == alone + 1.5 * len(SPLIT["train"]) / 10
    silent = shutil.copytree(fewer, tmp_path / "x")
    (silent / "build_log.jsonl").unlink()
    assert TokenFiles(config(apf_files, silent).data).preprocessing_seconds() is None


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def fault(apf_files, fewer):
    """What is said of one more folder of trees."""

    def of(variant, **changes):
        with pytest.raises(ConfigError) as error:
            TokenFiles(config(apf_files, fewer, variant, **changes).data).check()
        assert "\n" not in str(error.value) and str(variant) in str(error.value)
        return str(error.value)

    return of


@pytest.fixture
def spoilt(fewer, tmp_path):
    """A copy of `fewer` in which one token file says other things of itself."""

    def copy(**meta):
        folder = shutil.copytree(fewer, tmp_path / "spoilt", dirs_exist_ok=True)
        tokens, about = read_tokens(token_path(fewer, "d"))
        about["params"] |= meta.pop("params", {})
        write_tokens(token_path(folder, "d"), tokens, about | meta)
        return folder

    return copy


def test_missing_folders_and_files_are_named(fault, apf_files, fewer, tmp_path):
    said = fault(tmp_path / "none")
    assert "no such folder; `python -m launch prep EXPERIMENT --slides FOLDER --masks FOLDER data.dir=" in said
    (tmp_path / "empty").mkdir()
    assert "no token file for a, b, c and 2 more" in fault(tmp_path / "empty")
    gap = shutil.copytree(fewer, tmp_path / "gap")
    token_path(gap, "c").unlink()
    assert "gap: no token file for c;" in fault(gap)
    assert "leave it out" in fault(apf_files)
    assert "is named twice" in fault(fewer / ".." / fewer.name)


def test_folders_built_with_other_settings_are_named(fault, spoilt, tile_files, tmp_path):
    assert "patch 32" in fault(tile_files)
    more = write_folder(tmp_path / "more", length=40)
    assert f"more than data.length={LENGTH}" in fault(more)
    assert "patching uniform" in fault(spoilt(params={"patching": "uniform"}))
    assert "data.flips=false" in fault(spoilt(params={"fit": "drop"}))
    shutil.rmtree(tmp_path / "spoilt")
    assert "was built with aspect squash" in fault(spoilt(params={"aspect": "squash"}))
    shutil.rmtree(tmp_path / "spoilt")
    assert "was built with mask_classes {'x': 2}" in fault(spoilt(params={"mask_classes": {"x": 2}}))


def test_folders_of_other_slides_and_damaged_files_are_named(fault, spoilt, apf_files, fewer):
    assert "another slide" in fault(spoilt(source_sha256="0" * 64))
    assert "another mask" in fault(spoilt(mask_sha256="0" * 64))
    path = token_path(spoilt(), "d")
    path.write_bytes(path.read_bytes()[:2000])
    assert "d.tokens.h5" in fault(path.parent)
    TokenFiles(config(apf_files, fewer).data).check()


def test_a_variant_is_prepared_as_the_folder_is_with_other_options():
    words = ["data.dir=other", "data.variants=[other]", "--thresholds", "60,120"]
    line = " ".join(prep_arguments("demo_apf", "slides", "masks", words))
    assert "--out other --resolution 1024" in line and line.endswith("--masks masks --thresholds 60,120")


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.gloo
def test_a_stopped_run_with_variants_ends_as_one_that_was_not(apf_files, fewer, tmp_path, start):
    def words(root):
        return stoppable(apf_files, tmp_path / root, data__variants=f"[{fewer}]", engine__name="ddp")

    runs = {root: tmp_path / root / "smoke" / "r" for root in ("whole", "parts", "two")}
    whole, parts, two = start(1, words("whole")), start(1, words("parts")), start(2, words("two"))
    wait_for_steps(runs["parts"], random.SystemRandom().randrange(3, STEPS - 8), parts)
    parts.send(signal.SIGUSR1)
    assert parts.wait() == [75], parts.errors
    finish_well(start(1, words("parts")))
    finish_well(whole)
    finish_well(two)
    ended_alike(runs["parts"], runs["whole"])
    assert read_record(runs["parts"])["starts"] == 2
    assert losses(runs["two"]) == pytest.approx(losses(runs["whole"]), abs=1e-5)
    assert read_record(runs["whole"])["data"] == str(apf_files)
