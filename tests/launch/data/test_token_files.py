"""Splits, checks of the token files, samples, crops, data order and the background thread."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.token_files.token_file import read_tokens, token_path, write_tokens
from data_prep.tokens.paper_sequences import pack_strip
from data_prep.tokens.token_set import rebuild
from launch.config.config import ConfigError
from launch.data.batches import Prefetch, Sampler, collate, crop_sample, token_sample, training_batch
from launch.data.token_files import Raster, TokenFiles, read_split
from launch.experiments.load import load
from tests.helpers.small_runs import LENGTH, PATCH, SIZE, SPLIT, overrides, token_set


def config(files, *words, **more):
    return load("smoke", [*overrides(files, "unused", **more), *words])


def tile_config(files, **more):
    tiles = {"data__kind": "tiles", "data__patching": "uniform", "data__patch": 32, "data__crop_px": 32}
    words = overrides(files, "unused", data__length=4, **tiles, **more)
    return load("demo_tiled_unet", [w for w in words if not w.startswith("model.")])


# -- splits and checks ------------------------------------------------------------------------------------------------


def test_split_from_file_and_by_hash(apf_files):
    assert read_split(config(apf_files).data) == SPLIT
    by_hash = read_split(config(apf_files, "data.split=null", "data.fractions=[0.5,0.2,0.3]").data)
    assert sorted(n for part in by_hash.values() for n in part) == sorted(n for part in SPLIT.values() for n in part)


def testhash_split_does_not_move_when_slides_are_added(tmp_path):
    from launch.data.token_files import hash_split

    names = [f"slide{i}" for i in range(300)]
    few, many = hash_split(names[:200], (0.7, 0.1, 0.2)), hash_split(names, (0.7, 0.1, 0.2))
    assert all(set(few[part]) <= set(many[part]) for part in few)
    assert 0.6 < len(many["train"]) / 300 < 0.8


@pytest.fixture
def fault(apf_files):
    """What is said of token files or a split that do not fit the settings."""

    def of(**changes):
        with pytest.raises(ConfigError) as error:
            files = TokenFiles(config(apf_files, **changes).data)
            files.check()
        assert "\n" not in str(error.value)
        return str(error.value)

    return of


def test_wrong_folders_are_told(fault, tmp_path):
    assert "no such folder" in fault(data__dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no *.tokens.h5" in fault(data__dir=tmp_path / "empty")


def test_wrong_splits_are_told(fault, tmp_path):
    def split_file(tree):
        (tmp_path / "s.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return fault(data__split=tmp_path / "s.json")

    assert "No such file" in fault(data__split=tmp_path / "none.json")
    assert "not JSON" in split_file("{")
    assert "train, val, test" in split_file({"training": []})
    assert "'a' is listed twice" in split_file({"train": ["a"], "test": ["a"]})
    assert "no token file for x, y, z and 1 more" in split_file({"train": ["a", "x", "y"], "test": ["z", "zz"]})
    assert "no slide in test" in split_file({"train": ["a"]})
    assert "data.fractions=[1.0, 0.0, 0.0]: no slide in test" in fault(
        data__split="null", data__fractions="[1.0,0.0,0.0]"
    )


def test_token_files_of_other_settings_are_told(fault):
    assert "resolution 64" in fault(data__resolution=128)
    assert "patch 8" in fault(data__patch=4)
    assert "patching apf" in fault(data__patching="uniform")
    assert "classes 1" in fault(data__classes=2)
    assert "more than data.length=4" in fault(data__length=4)


def test_files_that_cannot_be_turned_need_flips_off(apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "x")
    tokens, meta = read_tokens(token_path(folder, "c"))
    meta["params"] |= {"fit": "drop"}
    write_tokens(token_path(folder, "c"), tokens, meta)
    with pytest.raises(ConfigError, match=r"c\.tokens\.h5.*data\.flips=false"):
        TokenFiles(config(folder).data).check()
    TokenFiles(config(folder, data__flips="false").data).check()


def test_rows_that_strip_packing_mixed_are_put_back(apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "x")
    tokens, meta = read_tokens(token_path(folder, "c"))
    meta["params"] |= {"packing": "strip"}
    mixed = replace(tokens, tokens=pack_strip(tokens.tokens))
    assert (mixed.tokens != tokens.tokens).any()
    write_tokens(token_path(folder, "c"), mixed, meta)
    files = TokenFiles(config(folder).data)
    files.check()
    np.testing.assert_array_equal(files.load("c").tokens, tokens.tokens)
    np.testing.assert_array_equal(files.load("c").mask_counts, tokens.mask_counts)


@pytest.mark.parametrize(
    ("built", "asked", "why"),
    [
        ({"split_on": "variance"}, {}, "split_on variance, but data.split_on=edges"),
        ({}, {"data__split_on": "entropy"}, "split_on edges, but data.split_on=entropy"),
        ({"split_on": "variance"}, {"data__split_on": "variance"}, None),
        ({"thresholds": "auto"}, {"data__thresholds": "[100,200]"}, "thresholds auto, but data.thresholds="),
        ({"thresholds": [100, 250]}, {"data__thresholds": "[100,200]"}, "thresholds .100, 250., but data.thresholds="),
        ({"thresholds": [100, 200]}, {"data__thresholds": "[100,200]"}, None),
        ({"thresholds": [100, 200]}, {}, None),
        ({"resample": "cubic"}, {}, "resample cubic, but data.resample=mean"),
        ({"resample": "cubic"}, {"data__resample": "cubic"}, None),
        ({"fov": True}, {}, "fov True, but data.fov=False"),
        ({}, {"data__fov": "true"}, "fov False, but data.fov=True"),
        ({"fov": True}, {"data__fov": "true"}, None),
    ],
)
def test_files_are_split_as_the_configuration_says(built, asked, why, apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "x")
    for path in folder.glob("*.tokens.h5"):
        tokens, meta = read_tokens(path)
        meta["params"] |= built
        write_tokens(path, tokens, meta)
    files = TokenFiles(config(folder, **asked).data)
    if why is None:
        files.check()
    else:
        with pytest.raises(ConfigError, match=why):
            files.check()


def test_damaged_file_is_named(apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "cut")
    path = token_path(folder, "c")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"c\.tokens\.h5"):
        TokenFiles(config(folder).data).check()


def test_a_flipped_bit_is_told_before_it_is_trained_on(apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "flipped")
    path = token_path(folder, "c")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.tokens\.h5"):
        TokenFiles(config(folder).data).load("c")


def test_cache_keeps_to_its_budget(apf_files):
    files = TokenFiles(config(apf_files, data__cache_gib=1e-9).data)
    assert files.load("a") is not files.load("a")
    files = TokenFiles(config(apf_files).data)
    assert files.load("a") is files.load("a")


def test_preprocessing_seconds(apf_files, tile_files, tmp_path):
    assert TokenFiles(config(apf_files).data).preprocessing_seconds() == 1.5
    folder = shutil.copytree(apf_files, tmp_path / "x")
    (folder / "build_log.jsonl").unlink()
    assert TokenFiles(config(folder).data).preprocessing_seconds() is None


def test_preprocessing_seconds_are_of_the_last_build_of_each_slide(apf_files, tmp_path):
    folder = shutil.copytree(apf_files, tmp_path / "x")
    with (folder / "build_log.jsonl").open("a") as log:
        log.write('{"slide": "a", "status": "done", "seco\n')  # killed inside the line
        for slide, status, seconds in (
            ("a", "done", 5.0),
            ("a", "skipped", 0.1),
            ("b", "failed", 9.0),
            ("of another split", "done", 99.0),
        ):
            log.write(json.dumps({"slide": slide, "status": status, "seconds": seconds}) + "\n")
    assert TokenFiles(config(folder).data).preprocessing_seconds() == (5.0 + 2.0) / 2


# -- samples ----------------------------------------------------------------------------------------------------------


def test_evaluation_sample_is_the_token_set_padded():
    tokens = token_set(1)
    n = len(tokens)
    assert n < LENGTH
    sample = token_sample(tokens, LENGTH, None, True, 0.5)
    np.testing.assert_array_equal(sample["tokens"][:n], (tokens.tokens / 255).astype(np.float32))
    np.testing.assert_array_equal(sample["mask_counts"][:n], tokens.mask_counts)
    np.testing.assert_array_equal(sample["leaf_xy"][:n], tokens.leaf_xy)
    assert sample["valid"].tolist() == [True] * n + [False] * (LENGTH - n)
    for name in ("tokens", "leaf_size", "mask_counts", "content_counts"):
        assert not sample[name][n:].any()
    with pytest.raises(ValueError, match="do not fit"):
        token_sample(tokens, n - 1, None, False, 0.0)


def test_training_batch_depends_on_seed_and_sample_only(apf_files):
    setup = config(apf_files)
    files, fresh = TokenFiles(setup.data), TokenFiles(setup.data)
    whole = training_batch(setup, files, [(0, 10), (3, 11), (0, 12)])
    part = training_batch(setup, fresh, [(3, 11)])
    for name, value in part.items():
        assert torch.equal(value, whole[name][1:2]), name
    assert not torch.equal(whole["tokens"][0], whole["tokens"][2]), "two samples of a slide look alike"
    other = training_batch(config(apf_files, train__seed=1), files, [(3, 11)])
    assert not torch.equal(other["tokens"], part["tokens"])
    assert {k: str(v.dtype) for k, v in part.items()} == {
        "tokens": "torch.float32",
        "content_counts": "torch.float32",
        "mask_counts": "torch.float32",
        "leaf_xy": "torch.int64",
        "leaf_size": "torch.int64",
        "valid": "torch.bool",
    }


def test_raster_of_tiles_is_the_picture(tile_files):
    from tests.helpers.small_runs import picture

    raster = TokenFiles(tile_config(tile_files).data).load_raster("b")
    image, mask = picture(1, (SIZE, SIZE - 16))
    np.testing.assert_array_equal(raster.image, image)
    np.testing.assert_array_equal(raster.masks[..., 0], mask > 0)
    assert raster.content.sum() == SIZE * (SIZE - 16)


def test_tiles_need_full_resolution(apf_files):
    with pytest.raises(ConfigError, match="as large as the patch"):
        TokenFiles(config(apf_files).data).load_raster("a")


def test_crops_lie_in_the_content_and_match_it():
    tokens = token_set(1, "uniform", (SIZE - 8, SIZE - 24), 32)
    paint = [rebuild(v, tokens.leaf_xy, tokens.leaf_size, SIZE) for v in (tokens.tokens, tokens.mask_counts > 0)]
    content = rebuild(tokens.content_counts > 0, tokens.leaf_xy, tokens.leaf_size, SIZE)
    raster = Raster(paint[0], paint[1], content, tokens.content_wh)
    places, foreground = set(), 0
    for seed in range(60):
        sample = crop_sample(raster, 16, np.random.default_rng(seed), False, 0.0, 0.0)
        x, y = sample["leaf_xy"][0]
        assert 0 <= x <= SIZE - 8 - 16 and 0 <= y <= SIZE - 24 - 16
        np.testing.assert_array_equal(np.round(sample["tokens"][0] * 255), raster.image[y : y + 16, x : x + 16])
        np.testing.assert_array_equal(sample["mask_counts"][0], raster.masks[y : y + 16, x : x + 16])
        assert sample["content_counts"].all()
        places.add((int(x), int(y)))
        centred = crop_sample(raster, 16, np.random.default_rng(seed), True, 0.2, 1.0)
        foreground += bool(centred["mask_counts"].any())
    assert len(places) > 40 and foreground == 60


def test_crops_with_nothing_to_score_are_drawn_again():
    tokens = token_set(1, "uniform", (SIZE, SIZE), 32)
    image, masks = (rebuild(v, tokens.leaf_xy, tokens.leaf_size, SIZE) for v in (tokens.tokens, tokens.mask_counts > 0))
    content = np.zeros((SIZE, SIZE), bool)
    content[:, -SIZE // 2 :] = True  # a crop of 16 at x <= 16 has none: a third of them
    raster = Raster(image, masks, content, (SIZE, SIZE))

    def corner(raster: Raster, seed: int) -> list[int]:
        return crop_sample(raster, 16, np.random.default_rng(seed), False, 0.0, 0.0)["leaf_xy"][0].tolist()

    everywhere = Raster(image, masks, np.ones_like(content), (SIZE, SIZE))
    first = [corner(everywhere, seed) for seed in range(200)]
    drawn = [corner(raster, seed) for seed in range(200)]
    missed = [x + 16 <= SIZE // 2 for x, _ in first]
    assert 20 < sum(missed) < 120
    assert all(x + 16 > SIZE // 2 for x, _ in drawn)
    assert all(a == b for a, b, again in zip(first, drawn, missed, strict=True) if not again)
    last = np.zeros_like(content)
    last[-1, -1] = True  # one corner in 49 x 49 holds it: after eight tries whatever was drawn
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tries = [[int(rng.integers(SIZE - 16 + 1)), int(rng.integers(SIZE - 16 + 1))] for _ in range(8)]
        assert corner(Raster(image, masks, last, (SIZE, SIZE)), seed) == tries[-1]


def test_crop_batch_has_one_token_per_image(tile_files):
    setup = tile_config(tile_files)
    batch = training_batch(setup, TokenFiles(setup.data), [(0, 0), (1, 1)])
    assert batch["tokens"].shape == (2, 1, 32, 32, 3) and batch["mask_counts"].shape == (2, 1, 32, 32, 1)
    assert batch["valid"].all() and (batch["leaf_size"] == 32).all()


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "batch"), [(5, 4), (12, 4), (3, 8)])
def test_order_is_the_same_for_any_number_of_ranks_and_from_any_step(images, batch):
    whole = [Sampler(images, batch, 3).at(step) for step in range(12)]
    for world in (1, 2, 4):
        ranks = [Sampler(images, batch, 3) for _ in range(world)]
        for step in range(12):
            assert [pick for r in range(world) for pick in ranks[r].at(step, r, world)] == whole[step]
    assert Sampler(images, batch, 3).at(11) == whole[11]
    assert Sampler(images, batch, 4).at(0) != whole[0] or images < 5
    stream = [pick for step in whole for pick in step]
    assert [g for _, g in stream] == list(range(12 * batch))
    for epoch in range(len(stream) // images):
        assert sorted(i for i, _ in stream[epoch * images : (epoch + 1) * images]) == list(range(images))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_keeps_the_order_and_hands_errors_on(depth):
    def make(step):
        if step == 9:
            raise OSError("disk gone")
        return step * step

    ahead = Prefetch(make, 4, depth)
    assert [next(ahead) for _ in range(5)] == [16, 25, 36, 49, 64]
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    ahead.close()
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


def test_prefetch_closes_while_full():
    ahead = Prefetch(lambda step: step, 0, 2)
    assert next(ahead) == 0
    ahead.close()
    assert not any(t.name.startswith("prefetch") for t in threading.enumerate())


def test_collate_stacks():
    batch = collate([token_sample(token_set(seed), LENGTH, None, False, 0.0) for seed in (0, 1)])
    assert batch["tokens"].shape == (2, LENGTH, PATCH, PATCH, 3)
    assert batch["valid"].sum() == len(token_set(0)) + len(token_set(1))
