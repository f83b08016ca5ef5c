"""Dice, floors and pictures against the painted full-size masks."""

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from data_prep.token_files.token_file import read_tokens, token_path, write_tokens
from data_prep.tokens.ceiling import ceiling
from data_prep.tokens.paper_sequences import drop_or_repeat
from data_prep.tokens.token_set import rebuild
from launch import engines
from launch.data.batches import collate, parts_of, take, token_sample
from launch.data.token_files import TokenFiles
from launch.engines.base import EngineSetup
from launch.experiments.load import load
from launch.train.segmentation import Segmentation, class_gray, paint, picture_side
from launch.train.trainer import build_model
from launch.train.trivial_baselines import gray, otsu_threshold, trivial_baselines
from tests.helpers.small_runs import LENGTH, PATCH, SIZE, SPLIT, overrides, picture, token_set


def pixel_dice(pred: np.ndarray, truth: np.ndarray) -> float:
    total = int(pred.sum()) + int(truth.sum())
    return 2 * int((pred & truth).sum()) / total if total else 1.0


def slides(part: str) -> dict[str, tuple[int, tuple[int, int]]]:
    """Seed and content of each slide, as `write_folder` chose them."""
    names = sorted(name for names in SPLIT.values() for name in names)
    return {n: (i, (SIZE, SIZE - 16 * (i % 2))) for i, n in enumerate(names) if n in SPLIT[part]}


def make(files, kind="tokens", **more):
    words = overrides(files, "unused", **more)
    if kind == "tiles":
        config = load("demo_tiled_unet", [word for word in words if not word.startswith("model.")])
    else:
        config = load("smoke", words)
    torch.manual_seed(0)
    model = build_model(config)
    return (
        config,
        TokenFiles(config.data),
        engines.build(model, config.engine, EngineSetup(torch.device("cpu"), "fp32")),
    )


@pytest.mark.usefixtures("one_rank")
def test_dice_of_a_model_is_that_of_its_painted_prediction(apf_files, tmp_path):
    config, files, engine = make(apf_files, eval__pictures_px=SIZE)
    scores = Segmentation(config, files).evaluate(engine, "test", torch.device("cpu"), tmp_path)
    assert engine.module.training
    expected, pooled = {}, []
    for name, (seed, content_wh) in slides("test").items():
        tokens = token_set(seed, "apf", content_wh)
        with torch.no_grad():
            logits = engine.module.eval()(collate([token_sample(tokens, LENGTH, None, False, 0.0)]))[0]
        on = (logits[: len(tokens)] > 0).numpy()
        pred = rebuild(on, tokens.leaf_xy, tokens.leaf_size, SIZE)[..., 0]
        truth = picture(seed, content_wh)[1] > 0
        pred[content_wh[1] :] = False
        expected[name] = pixel_dice(pred, truth)
        pooled.append((pred, truth))
        shown = cv2.imread(str(tmp_path / f"pred_{name}.png"), 0)
        np.testing.assert_array_equal(shown > 127, pred[: content_wh[1]])
        truth_shown = cv2.imread(str(tmp_path / f"truth_{name}.png"), 0)
        assert truth_shown.shape == shown.shape == cv2.imread(str(tmp_path / f"image_{name}.png")).shape[:2]
        assert truth_shown.sum() == pytest.approx(255 * truth.sum(), rel=0.02)
        counts = np.load(tmp_path / f"{name}.npz")["counts"]
        assert counts.tolist() == [[int((pred & truth).sum()), int(pred.sum()), int(truth.sum())]]
    assert scores.per_slide() == pytest.approx(expected, abs=1e-12)
    assert scores.headline() == pytest.approx(np.mean(list(expected.values())))
    both = [np.concatenate([a.ravel() for a in part]) for part in zip(*pooled, strict=True)]
    assert scores.pooled() == pytest.approx(pixel_dice(*both))
    assert scores.tokens == [len(token_set(seed, "apf", c)) for seed, c in slides("test").values()]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("share", [0.5, 0.75, None])
def test_prediction_in_parts_is_the_weighted_mean_of_what_parts_say(apf_files, share):
    config, files, engine = make(apf_files, data__part=0.5, eval__part=share, model__position="geom")
    scores = Segmentation(config, files).evaluate(engine, "test", torch.device("cpu"))
    for name in files.split["test"]:
        tokens = files.load(name)
        total, weight = np.zeros((len(tokens), PATCH, PATCH, 1)), np.zeros(len(tokens))
        content = np.flatnonzero(tokens.content_counts.any((1, 2)))
        whole = [(content, np.ones(len(content)))]  # white padding is left out, as it is in parts
        for rows, weights in parts_of(tokens, share, config.data.overlap) if share else whole:
            with torch.no_grad():
                batch = collate([token_sample(take(tokens, rows), len(rows), None, False, 0.0)])
                logits = engine.module.eval()(batch)[0].numpy()
            for row, w, z in zip(rows, weights, logits, strict=True):
                total[row] += w * z
                weight[row] += w
        on = total / np.maximum(weight, 1)[:, None, None, None] > 0
        both = (on * tokens.mask_counts).sum()
        expected = 2 * both / ((on[..., 0] * tokens.content_counts).sum() + tokens.mask_counts.sum())
        assert scores.per_slide()[name] == pytest.approx(expected, abs=2e-3)  # a logit near zero may tip over


@pytest.mark.usefixtures("one_rank")
def test_pictures_show_the_slide_and_predictions_inside_the_view_only(apf_files, tile_files, tmp_path):
    sides = {}
    for kind, source in (("tokens", apf_files), ("tiles", tile_files)):
        folder = shutil.copytree(source, tmp_path / kind)
        for name in sorted(name for names in SPLIT.values() for name in names):
            tokens, meta = read_tokens(token_path(folder, name))
            seen = (tokens.leaf_xy[:, 0] >= SIZE // 4) & (tokens.leaf_xy[:, 0] < 3 * SIZE // 4)
            content = tokens.content_counts * seen[:, None, None].astype(np.uint32)
            masks = tokens.mask_counts * seen[:, None, None, None].astype(np.uint32)
            meta["params"]["fov"] = True
            write_tokens(token_path(folder, name), replace(tokens, content_counts=content, mask_counts=masks), meta)
        tiles = {
            "data__kind": "tiles",
            "data__patching": "uniform",
            "data__patch": 32,
            "data__length": 4,
            "data__crop_px": 32,
        }
        more = {"data__fov": "true", "eval__pictures_px": SIZE} | (tiles if kind == "tiles" else {})
        config, files, engine = make(folder, kind, **more)
        files.check()
        scores = Segmentation(config, files).evaluate(engine, "test", torch.device("cpu"), tmp_path / f"{kind}_out")
        for k, (name, (_, content_wh)) in enumerate(slides("test").items()):
            shown = [cv2.imread(str(tmp_path / f"{kind}_out" / f"{what}_{name}.png"), 0) for what in ("image", "pred")]
            sides.setdefault(name, set()).update(picture.shape for picture in shown)
            assert shown[0].shape == (content_wh[1], content_wh[0])
            assert (shown[1] > 127).sum() == scores.counts[k, 0, 1]
            tokens = files.load(name)
            content = rebuild(tokens.content_counts, tokens.leaf_xy, tokens.leaf_size, SIZE)
            assert not (shown[1] > 127)[content[: content_wh[1], : content_wh[0]] == 0].any()
    assert all(len(found) == 1 for found in sides.values())


@pytest.mark.usefixtures("one_rank")
def test_what_was_dropped_is_missed(apf_files, tmp_path):
    """Files of which only some random tokens were kept: truth is still all of the frame's foreground."""
    folder = shutil.copytree(apf_files, tmp_path / "dropped")
    for name in slides("train") | slides("test"):
        tokens, meta = read_tokens(token_path(folder, name))
        meta["mask_pixels"] = tokens.mask_counts.sum((0, 1, 2), dtype=np.int64).tolist()
        write_tokens(token_path(folder, name), drop_or_repeat(tokens, 5, 0), meta)
    config, files, engine = make(folder, data__flips="false")
    scores = Segmentation(config, files).evaluate(engine, "test", torch.device("cpu"))
    truth = [int((picture(*place)[1] > 0).sum()) for place in slides("test").values()]
    assert scores.counts[:, 0, 2].tolist() == truth
    best, everything = [], []
    for (name, (_, (w, h))), whole in zip(slides("test").items(), truth, strict=True):
        kept = files.load(name)
        assert kept.mask_counts.sum() < whole, "nothing was dropped"
        best += ceiling(kept.mask_counts, kept.content_counts, [whole])
        everything.append(2 * whole / (w * h + whole))  # the same as of all leaves
    assert scores.ceilings == pytest.approx(best)
    assert all(d <= b for d, b in zip(scores.per_slide().values(), scores.ceilings, strict=True))
    assert trivial_baselines(files)["all_foreground"] == pytest.approx(np.mean(everything))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["apf", "tiles"])
def test_floors_are_those_of_painted_pictures(kind, apf_files, tile_files):
    more = {} if kind == "apf" else {"data__patching": "uniform", "data__patch": 32, "data__length": 4}
    files = TokenFiles(load("smoke", overrides(apf_files if kind == "apf" else tile_files, "x", **more)).data)
    got = trivial_baselines(files)

    def whole(part):
        for name in SPLIT[part]:
            tokens = files.load(name)
            shade = rebuild(gray(tokens), tokens.leaf_xy, tokens.leaf_size, SIZE)
            seed, (w, h) = slides(part)[name]
            yield shade[:h, :w], picture(seed, (w, h))[1][:h, :w] > 0

    everything = np.concatenate([shade.ravel() for shade, _ in whole("train")])[None]
    above = cv2.threshold(everything, 0, 255, cv2.THRESH_OTSU)[0]  # OpenCV's foreground is > threshold, ours is >=
    train = {p: np.mean([pixel_dice((s > above) == p, t) for s, t in whole("train")]) for p in (True, False)}
    bright = train[True] >= train[False]
    otsu = np.mean([pixel_dice((s > above) == bright, t) for s, t in whole("test")])
    assert got["otsu"] == pytest.approx(otsu)
    assert got["all_foreground"] == pytest.approx(np.mean([pixel_dice(np.ones_like(t), t) for _, t in whole("test")]))
    assert got["all_background"] == pytest.approx(np.mean([pixel_dice(np.zeros_like(t), t) for _, t in whole("test")]))


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_opencvs(seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(m, 20, 500) for m in rng.integers(20, 230, 2)]
    values = np.clip(np.concatenate(parts), 0, 255).astype(np.uint8)[None]
    assert otsu_threshold(np.bincount(values[0], minlength=256)) == int(cv2.threshold(values, 0, 1, 8)[0]) + 1


def test_otsu_of_one_gray_level_is_defined():
    histogram = np.zeros(256, np.int64)
    histogram[77] = 5
    assert 1 <= otsu_threshold(histogram) <= 255


@pytest.mark.parametrize("out_px", [64, 32, 16, 4, 1])
@pytest.mark.parametrize("patching", ["apf", "uniform"])
def test_painted_picture_is_the_mean_of_the_raster(out_px, patching):
    tokens = token_set(1, patching, patch=4)
    values = np.random.default_rng(0).integers(0, 256, (*tokens.tokens.shape[:3], 2))
    raster = rebuild(values.astype(np.float64), tokens.leaf_xy, tokens.leaf_size, SIZE)
    factor = SIZE // out_px
    expected = raster.reshape(out_px, factor, out_px, factor, 2).mean((1, 3))
    np.testing.assert_allclose(paint(values, tokens.leaf_xy, tokens.leaf_size, SIZE, out_px), expected, rtol=1e-5)


def test_picture_sides_and_grays():
    assert [picture_side(r, 1024) for r in (512, 1024, 4096, 65536)] == [512, 1024, 1024, 1024]
    shares = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    assert class_gray(shares).tolist() == [[127.5, 255.0, 0.0]]
