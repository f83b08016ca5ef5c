"""A field of view: nothing outside it is counted, in memory and in regions alike; files say so and stay true to it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.build.options import BuildOptions, OptionError
from data_prep.inspect.figure import caption
from data_prep.inspect.look import look_at
from data_prep.token_files.token_file import read_meta, read_tokens, token_path, write_tokens
from data_prep.token_files.verify import verify_file
from data_prep.tokens.ceiling import ceiling
from data_prep.tokens.token_set import rebuild
from tests.helpers.builds import some_slides, token_bytes

TREE = ["--resolution", "1024", "--patch", "16", "--length", "64"]
UNIFORM = ["--resolution", "1024", "--patch", "256", "--patching", "uniform"]


def disc(side: int, value: int = 255) -> np.ndarray:
    """What a fundus camera sees: a circle that the frame cuts at two sides."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return ((x * x + 1.6 * y * y < (0.55 * side) ** 2) * value).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two fields of kidney with masks and a field of view that cuts both."""
    folder = tmp_path_factory.mktemp("fov")
    images, masks = some_slides(folder, 2)
    (folder / "fov").mkdir()
    for k, path in enumerate(sorted(images.iterdir())):
        view = disc(1024)
        if not k:  # half of the foreground
            x = np.nonzero(cv2.imread(str(masks / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE))[1]
            view = np.where(np.arange(1024) < np.median(x), view, np.uint8(0))
        cv2.imwrite(str(folder / "fov" / f"{path.stem}.png"), view)
    return folder


def build(made: Path, out: Path, *words: str, fov: Path | None = None) -> int:
    view = [] if fov == Path() else ["--fov", str(fov or made / "fov")]
    return main(["build", str(made / "images"), "--masks", str(made / "masks"), "--out", str(out), *view, *words])


@pytest.mark.parametrize("grid", [TREE, UNIFORM], ids=["tree", "uniform"])
def test_counts_are_those_of_the_pixels_inside(made, tmp_path, grid):
    assert build(made, tmp_path / "in", *grid) == 0
    assert build(made, tmp_path / "all", *grid, fov=Path()) == 0
    for path in sorted((made / "images").iterdir()):
        inside, meta = read_tokens(token_path(tmp_path / "in", path.stem))
        whole, _ = read_tokens(token_path(tmp_path / "all", path.stem))
        view = cv2.imread(str(made / "fov" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) > 0
        mask = cv2.imread(str(made / "masks" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) > 0
        assert 0 < (mask & view).sum() < mask.sum()
        for name in ("tokens", "leaf_xy", "leaf_size"):  # the picture and its tree are the same
            np.testing.assert_array_equal(getattr(inside, name), getattr(whole, name))
        p = whole.tokens.shape[1]
        for (x, y), size, content, counts in zip(
            inside.leaf_xy, inside.leaf_size, inside.content_counts, inside.mask_counts, strict=True
        ):
            for wanted, got in ((view, content), (view & mask, counts[..., 0])):
                square = wanted[y : y + size, x : x + size].reshape(p, size // p, p, size // p)
                np.testing.assert_array_equal(got, square.sum((1, 3)))
        assert meta["mask_pixels"] == [int((mask & view).sum())]
        assert meta["params"]["fov"] is True
        assert meta["ceiling"] == pytest.approx(ceiling(inside.mask_counts, inside.content_counts), abs=1e-6)
        assert verify_file(token_path(tmp_path / "in", path.stem)) == []


@pytest.mark.parametrize("words", [TREE, ["--resolution", "1024", "--patch", "8", "--split-value", "150"], UNIFORM])
def test_regions_give_the_same_bytes(made, tmp_path, words):
    assert build(made, tmp_path / "whole", *words) == 0
    assert build(made, tmp_path / "regions", *words, "--tile", "128") == 0
    assert build(made, tmp_path / "pool", *words, "--tile", "256", "--jobs", "2") == 0
    assert token_bytes(tmp_path / "whole") == token_bytes(tmp_path / "regions") == token_bytes(tmp_path / "pool")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([60, 97, 128]))
def test_any_view_of_any_classes(tmp_path_factory, seed, classes, side):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("any")
    for name in ("images", "masks", "fov"):
        (folder / name).mkdir()
    ids = cv2.resize(rng.integers(0, classes + 1, (9, 9), np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    view = cv2.resize(rng.integers(0, 2, (7, 7), np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(folder / "images" / "a.png"), rng.integers(0, 256, (side, side, 3), np.uint8))
    cv2.imwrite(str(folder / "masks" / "a.png"), ids)
    cv2.imwrite(str(folder / "fov" / "a.png"), view)
    words = ["--resolution", "128", "--patch", "8", "--length", "40", "--classes", str(classes)]
    assert build(folder, folder / "out", *words) == 0
    tokens, _ = read_tokens(token_path(folder / "out", "a"))
    p = 8
    assert tokens.content_counts.sum() == view.sum()
    assert tokens.mask_counts.sum((0, 1, 2)).tolist() == [((ids == k + 1) & (view > 0)).sum() for k in range(classes)]
    cells = tokens.leaf_size // p
    seen = rebuild(tokens.content_counts, tokens.leaf_xy, tokens.leaf_size, 128)[:side, :side]
    full = rebuild(
        np.broadcast_to((cells**2)[:, None, None], tokens.content_counts.shape), tokens.leaf_xy, tokens.leaf_size, 128
    )[:side, :side]
    assert (view[seen == full] > 0).all() and (view[seen == 0] == 0).all()


def test_a_new_view_is_built_again_and_an_old_one_is_not(made, tmp_path, capsys):
    views = shutil.copytree(made / "fov", tmp_path / "fov")
    assert build(made, tmp_path / "out", *TREE, fov=views) == 0
    capsys.readouterr()
    assert build(made, tmp_path / "out", *TREE, fov=views) == 0
    assert capsys.readouterr().out.count("skipped") >= 2
    first = sorted(views.iterdir())[0]
    cv2.imwrite(str(first), disc(1024))
    before = token_bytes(tmp_path / "out")
    assert build(made, tmp_path / "out", *TREE, fov=views) == 0
    told = capsys.readouterr().out
    assert "rebuilt: the mask or its field of view changed" in told
    after = token_bytes(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == [f"{first.stem}.tokens.h5"]
    assert build(made, tmp_path / "out", *TREE, fov=Path()) == 0
    assert "rebuilt: parameter fov True -> None" in capsys.readouterr().out
    assert "fov" not in read_meta(token_path(tmp_path / "out", first.stem))["params"]


def test_what_is_wrong_with_a_view_is_said_in_one_line(made, tmp_path, capsys):
    def lines(fov: Path, *words: str) -> str:
        assert build(made, tmp_path / "out", *TREE, *words, fov=fov) == 1
        said = capsys.readouterr()
        return said.out + said.err

    name = sorted((made / "images").iterdir())[0].stem
    views = tmp_path / "fov"
    shutil.copytree(made / "fov", views)
    (views / f"{name}.png").unlink()
    assert f"no field of view {name}.png, .tif, .xml or .geojson in {views}" in lines(views)
    cv2.imwrite(str(views / f"{name}.png"), disc(512))
    assert f"{name}.png: field of view is 512 x 512" in lines(views)
    (views / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    assert f"{name}.png" in lines(views)
    assert not token_path(tmp_path / "out", name).exists()


def test_a_class_too_many_is_not_taken_for_the_outside(made, tmp_path, capsys):
    folder = tmp_path / "two"
    shutil.copytree(made, folder)
    path = sorted((folder / "masks").iterdir())[0]
    ids = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    ids[:8, -8:] = 2
    cv2.imwrite(str(path), ids)
    for more in ([], ["--tile", "128"]):
        assert build(folder, tmp_path / "out", *TREE, *more) == 1
        said = capsys.readouterr()
        assert f"{path}: has class 2, but only classes 1 to 1 are expected; see --classes" in said.out + said.err


def test_options_that_cannot_be(made, tmp_path):
    grid = {"resolution": 1024, "patch": 16, "length": 64}
    with pytest.raises(OptionError, match=r"--fov .*nowhere: no such folder"):
        BuildOptions(**grid, masks=made / "masks", fov=tmp_path / "nowhere")
    with pytest.raises(OptionError, match="is the folder of --masks"):
        BuildOptions(**grid, masks=made / "masks", fov=made / "masks")
    with pytest.raises(OptionError, match="only with --masks"):
        BuildOptions(**grid, fov=made / "fov")
    with pytest.raises(OptionError, match="room for 254 classes"):
        BuildOptions(**grid, masks=made / "masks", fov=made / "fov", classes=255)


def test_inspect_shows_what_counts(made, tmp_path):
    path = sorted((made / "images").iterdir())[0]
    look = look_at(path, BuildOptions(1024, 16, length=64, masks=made / "masks", fov=made / "fov"))
    assert f"field of view {100 * look.token_set.content_counts.sum() / 1024**2:.0f} %" in caption(look)
    view = cv2.imread(str(made / "fov" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) > 0
    assert set(np.unique(look.truth)) == {0, 1} and not look.truth[~view].any()
    np.testing.assert_array_equal(look.outside, ~view)
    assert not look_at(path, BuildOptions(1024, 16, length=64, masks=made / "masks")).outside.any()
    assert look.token_set.content_counts.sum() == view.sum()


def test_counts_that_are_not_those_of_the_view_are_found(made, tmp_path):
    assert build(made, tmp_path / "out", *TREE) == 0
    path = sorted((tmp_path / "out").glob("*.tokens.h5"))[0]
    whole, meta = read_tokens(path)
    pixels = meta["content_pixels"]
    assert pixels == whole.content_counts.sum() < 1024 * 1024

    def faults(content: np.ndarray) -> list[str]:
        write_tokens(path, replace(whole, content_counts=content.astype(np.uint32)), meta)
        return verify_file(path)

    assert faults(whole.content_counts) == []
    fewer = whole.mask_counts[..., 0]
    assert faults(fewer) == [f"content_counts add up to {fewer.sum()}, the field of view has {pixels} pixels"]
    cell = (whole.leaf_size.astype(np.int64) // 16) ** 2
    more = whole.content_counts.astype(np.int64)
    more[5, 0, 0] = cell[5] + 1
    assert "leaf 5: content_counts exceed the area of a cell" in faults(more)


def test_counts_beyond_the_slide_are_found(made, tmp_path):
    """A frame with padding: as many pixels, but some of them where no slide is."""
    assert build(made, tmp_path / "out", "--resolution", "2048", "--patch", "16", "--length", "64") == 0
    path = sorted((tmp_path / "out").glob("*.tokens.h5"))[0]
    whole, meta = read_tokens(path)
    moved = whole.content_counts.copy()
    padding = np.flatnonzero((whole.leaf_xy >= 1024).any(axis=1))[0]
    full = np.argwhere(moved > 0)[0]
    moved[tuple(full)] -= 1
    moved[padding, 0, 0] += 1
    write_tokens(path, replace(whole, content_counts=moved), meta)
    assert verify_file(path) == [f"leaf {padding}: content_counts are not the part of its cells inside the content"]


@pytest.mark.parametrize("more", [[], ["--tile", "128"]])
def test_a_view_without_any_pixel_is_refused(made, tmp_path, more, capsys):
    views = shutil.copytree(made / "fov", tmp_path / "fov")
    path = sorted(views.iterdir())[0]
    cv2.imwrite(str(path), np.zeros((1024, 1024), np.uint8))
    assert build(made, tmp_path / "out", *TREE, *more, fov=views) == 1
    said = capsys.readouterr()
    assert f"{path.stem}.jpg: its field of view in {views} is 0 everywhere" in said.out + said.err
    assert not token_path(tmp_path / "out", path.stem).exists()


def test_polygons_of_any_name_are_inside(made, tmp_path):
    views = tmp_path / "fov"
    views.mkdir()
    square = [[[100, 100], [900, 100], [900, 612], [100, 612], [100, 100]]]
    for path in (made / "images").iterdir():
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": square},
            "properties": {"classification": {"name": "field of view"}},
        }
        (views / f"{path.stem}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    assert build(made, tmp_path / "out", *TREE, fov=views) == 0
    for path in (tmp_path / "out").glob("*.tokens.h5"):
        assert read_tokens(path)[0].content_counts.sum() == 800 * 512


@pytest.mark.parametrize(
    "words",
    [
        ["--split-value", "150", "--fit", "drop"],
        ["--packing", "strip"],
        ["--aspect", "squash", "--resample", "cubic"],
    ],
)
def test_habits_of_comparison_keep_to_the_view(made, tmp_path, words):
    assert build(made, tmp_path / "out", *TREE, *words) == 0
    for path in (made / "images").iterdir():
        view = cv2.imread(str(made / "fov" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) > 0
        mask = cv2.imread(str(made / "masks" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) > 0
        file = token_path(tmp_path / "out", path.stem)
        meta = read_meta(file)
        assert meta["mask_pixels"] == [int((mask & view).sum())] and meta["content_pixels"] == view.sum()
        assert verify_file(file) == []
