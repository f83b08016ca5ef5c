"""`python -m data_prep export`: GeoJSON and coords files say where the leaves lie in the slide."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.masks.masks import open_mask
from data_prep.slides.open import open_slide
from data_prep.token_files.export import boxes_level0
from data_prep.token_files.token_file import read_tokens, token_path
from tests.helpers.repository import GLOMERULI
from tests.helpers.slide_files import CMU, KIDNEY

MASKS = GLOMERULI / "masks"


def build(slide: Path, out: Path, *options: object) -> Path:
    assert main(["build", str(slide), "--out", str(out), *map(str, options)]) == 0
    return token_path(out, slide.stem)


def leaf_numbers(path: Path, size_px: int) -> np.ndarray:
    """(R, R) the row of the leaf over each frame pixel, from the token file itself."""
    token_set, _ = read_tokens(path)
    picture = np.full((size_px, size_px), -1)
    for row, ((x, y), side) in enumerate(zip(token_set.leaf_xy.tolist(), token_set.leaf_size.tolist(), strict=True)):
        picture[y : y + side, x : x + side] = row
    return picture


def test_geojson_covers_the_slide_as_the_leaves_do(tmp_path: Path) -> None:
    """Read back as annotation: where frame pixels are level-0 pixels, every pixel has its leaf's side."""
    path = build(KIDNEY, tmp_path / "t", "--resolution", 1024, "--patch", 16, "--length", 200, "--masks", MASKS)
    assert main(["export", str(path), "--out", str(tmp_path / "q"), "--format", "geojson"]) == 0
    made = tmp_path / "q" / "10003.geojson"
    token_set, _ = read_tokens(path)
    sides = np.unique(token_set.leaf_size).tolist()
    assert len(sides) > 2
    with open_mask(made, (1024, 1024), {f"leaf {side} px": k + 1 for k, side in enumerate(sides)}) as mask:
        drawn = mask.read(0, 0, 1024, 1024)
    expected = np.searchsorted(sides, token_set.leaf_size[leaf_numbers(path, 1024)]) + 1
    np.testing.assert_array_equal(drawn, expected)
    features = json.loads(made.read_text())["features"]
    assert len(features) == len(token_set)
    with open_mask(MASKS / "10003.png") as mask:
        truth = mask.read(0, 0, 1024, 1024) == 1
    for feature in features[::17]:
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] and len(ring) == 5
        (left, top), (right, bottom) = ring[0], ring[2]
        measured = feature["properties"]["measurements"]
        assert measured["share of class 1"] == pytest.approx(truth[top:bottom, left:right].mean(), abs=1e-6)
        assert token_set.leaf_xy[measured["token"]].tolist() == [left, top]
        assert feature["properties"]["objectType"] == "detection"


def test_a_frame_smaller_than_the_slide(tmp_path: Path) -> None:
    """Boxes are level-0 pixels, tile the slide without gap or overlap and end where it ends."""
    path = build(CMU, tmp_path / "t", "--resolution", 1024, "--patch", 16, "--length", 400)
    assert main(["export", str(tmp_path / "t"), "--out", str(tmp_path), "--format", "geojson"]) == 0
    with open_slide(CMU) as slide:
        width, height = slide.size_wh
        mpp = slide.mpp
    features = json.loads((tmp_path / f"{CMU.stem}.geojson").read_text())["features"]
    corners = np.array([[*f["geometry"]["coordinates"][0][0], *f["geometry"]["coordinates"][0][2]] for f in features])
    token_set, meta = read_tokens(path)
    rows = [f["properties"]["measurements"]["token"] for f in features]
    scale = height / 1024
    np.testing.assert_allclose(corners[:, :2], token_set.leaf_xy[rows] * scale, rtol=1e-12)
    np.testing.assert_array_equal(corners, boxes_level0(token_set, meta)[rows])
    assert corners[:, 2].max() <= width and corners[:, 3].max() == height
    area = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sum()
    assert len(features) < len(token_set), "leaves of the padding are left out"
    assert 0.998 * width * height < area <= width * height * (1 + 1e-9)
    assert mpp is not None
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "coords"]) == 0
    check_coords(tmp_path, path, rows, round(10 / mpp), (width, height), scale)


def check_coords(
    out: Path, path: Path, rows: list[int], magnification: int, size_wh: tuple[int, int], scale: float
) -> None:
    """One file per side of leaves; together they are the leaves; both tools' attributes say the same square."""
    token_set, meta = read_tokens(path)
    found: list[int] = []
    sides = np.unique(token_set.leaf_size[rows]).tolist()
    files = sorted(out.glob(f"*/patches/{meta['slide']}_patches.h5"))
    assert len(files) == len(sides) > 1
    for side in sides:
        side0 = round(side * scale)
        file = out / f"{magnification}x_{side0}px_0px_overlap" / "patches" / f"{meta['slide']}_patches.h5"
        with h5py.File(file) as opened:
            coords, at = opened["coords"], opened["token_index"][:]
            assert coords.dtype == np.int64 and coords.shape == (len(at), 2)
            attrs = dict(coords.attrs)
            np.testing.assert_array_equal(coords[:], np.floor(token_set.leaf_xy[at] * scale + 1e-9))
        assert (token_set.leaf_size[at] == side).all()
        found += at.tolist()
        assert attrs["patch_size"] == attrs["patch_size_level0"] == side0
        assert attrs["target_magnification"] == attrs["level0_magnification"] == magnification
        assert (attrs["patch_level"], attrs["downsample"], attrs["overlap"]) == (0, 1.0, 0)
        assert (attrs["level0_width"], attrs["level0_height"]) == size_wh == tuple(attrs["level_dim"].tolist())
        assert attrs["name"] == meta["slide"]
    assert sorted(found) == rows


def test_patches_read_by_coords_are_the_tokens(tmp_path: Path) -> None:
    """What a reader of the smallest leaves cuts from the slide is pixel for pixel the token."""
    path = build(KIDNEY, tmp_path / "t", "--resolution", 1024, "--patch", 16, "--length", 1500)
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "coords"]) == 0
    token_set, _ = read_tokens(path)
    with h5py.File(tmp_path / "0x_16px_0px_overlap" / "patches" / "10003_patches.h5") as file:
        coords, at, side = file["coords"][:], file["token_index"][:], int(file["coords"].attrs["patch_size"])
    assert len(at) > 20
    with open_slide(KIDNEY) as slide:
        for (x, y), row in zip(coords.tolist(), at.tolist(), strict=True):
            np.testing.assert_array_equal(slide.read(0, x, y, side, side), token_set.tokens[row])


def test_squashed_and_repeated_leaves(tmp_path: Path) -> None:
    """Two scales; leaves that the paper's rule repeated are written once."""
    Image.open(KIDNEY).crop((0, 0, 800, 512)).save(tmp_path / "a.png")
    path = build(
        tmp_path / "a.png",
        tmp_path / "t",
        "--resolution",
        512,
        "--patch",
        16,
        "--split-value",
        400,
        "--fit",
        "drop",
        "--length",
        500,
        "--aspect",
        "squash",
    )
    token_set, meta = read_tokens(path)
    unique = np.unique(token_set.leaf_xy, axis=0)
    assert len(unique) < len(token_set), "the drop rule repeats leaves here"
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "geojson"]) == 0
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert len(features) == len(unique)
    boxes = boxes_level0(token_set, meta)
    assert boxes[:, 2].max() == 800 and boxes[:, 3].max() == 512
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_allclose(widths / heights, 800 / 512)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--format", "coords"]
    assert main(["export", str(tmp_path / "none"), *out]) == 64
    assert capsys.readouterr().err.count("\n") == 1
    path = build(KIDNEY, tmp_path / "t", "--resolution", 512, "--patch", 16, "--length", 40)
    path.with_name("b.tokens.h5").write_bytes(path.read_bytes()[:3000])
    capsys.readouterr()
    assert main(["export", str(path.parent), *out]) == 1
    streams = capsys.readouterr()
    assert f"error: {path.with_name('b.tokens.h5')}: not a whole token file" in streams.err
    assert "of 1 token file written" in streams.out and "1 bad" in streams.out


def test_classification_depth_and_size(tmp_path: Path) -> None:
    path = build(KIDNEY, tmp_path / "t", "--resolution", 512, "--patch", 16, "--length", 40)
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "geojson", "--classification", "APF"]) == 0
    features = json.loads((tmp_path / "10003.geojson").read_text())["features"]
    token_set, _ = read_tokens(path)
    assert len(features) == len(token_set) > 30
    for feature in features:
        properties = feature["properties"]
        assert properties["classification"]["name"] == "APF"
        assert properties["size"] == token_set.leaf_size[properties["measurements"]["token"]]
        assert properties["size"] * 2 ** properties["depth"] == 512
        assert properties["measurements"]["depth"] == properties["depth"]
    assert len({feature["properties"]["depth"] for feature in features}) > 1


def test_uniform_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They cover the slide; TRIDENT's grid of that size has the same corners."""
    path = build(CMU, tmp_path / "t", "--resolution", 256, "--patch", 16, "--length", 40)
    for form in ("geojson", "coords"):
        assert main(["export", str(path), "--out", str(tmp_path), "--format", form, "--uniform", "500"]) == 0
    with h5py.File(tmp_path / "20x_500px_0px_overlap" / "patches" / f"{CMU.stem}_patches.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 500 and "token_index" not in file
        coords = file["coords"][:].tolist()
    assert coords == [[x, y] for y in range(0, 2967, 500) for x in range(0, 2220, 500)]
    features = json.loads((tmp_path / f"{CMU.stem}.geojson").read_text())["features"]
    rings = [feature["geometry"]["coordinates"][0] for feature in features]
    assert [ring[0] for ring in rings] == coords
    assert sum((c[0] - a[0]) * (c[1] - a[1]) for a, _, c, *_ in rings) == 2220 * 2967
    capsys.readouterr()
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "coords", "--uniform", "0"]) == 64
    assert main(["export", str(path), "--out", str(tmp_path), "--format", "coords", "--classification", "A"]) == 64
    assert "--uniform 0: must be at least 1 pixel" in (said := capsys.readouterr().err) and "--classification:" in said
