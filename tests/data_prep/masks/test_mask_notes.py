"""Class ids of polygons for `build`, and what is told about masks: things left out, overlaps, masks without tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.__main__ import main
from data_prep.build.options import BuildOptions, OptionError
from data_prep.masks.annotations import overlap_note, read_polygons
from data_prep.masks.polygons import Ring
from data_prep.token_files.token_file import read_tokens, token_path
from tests.helpers.builds import run
from tests.helpers.slide_files import KIDNEY

TREE = ("--resolution", "512", "--patch", "16", "--length", "64")


def box(x: float, y: float, w: float, h: float) -> list[tuple[float, float]]:
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def image_scope(path: Path, layers: list[tuple[str, list[tuple[list[tuple[float, float]], int]]]]) -> Path:
    """Layers of (name, [(vertices, negative)])."""
    text = "<Annotations>"
    for number, (name, regions) in enumerate(layers, 1):
        text += f'<Annotation Id="{number}" Name="{name}" LineColor="255"><Regions>'
        for n, (vertices, negative) in enumerate(regions, 1):
            points = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in vertices)
            text += f'<Region Id="{n}" NegativeROA="{negative}"><Vertices>{points}</Vertices></Region>'
        text += "</Regions></Annotation>"
    path.write_text(text + "</Annotations>")
    return path


def geojson(path: Path, features: list[tuple[str, str, object]]) -> Path:
    """Features of (class, kind of geometry, coordinates)."""
    path.write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {
                        "type": "Feature",
                        "geometry": {"type": kind, "coordinates": where},
                        "properties": {"classification": {"name": name}},
                    }
                    for name, kind, where in features
                ],
            }
        )
    )
    return path


def test_build_takes_class_names(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    geojson(
        masks / "10003.geojson",
        [
            ("Tumor", "Polygon", [box(0, 0, 512, 512)]),
            ("Stroma", "Polygon", [box(512, 0, 256, 256)]),
            ("Ignore", "Polygon", [box(0, 600, 100, 100)]),
        ],
    )
    args = ["build", str(KIDNEY), "--out", str(tmp_path / "t"), *TREE, "--masks", str(masks), "--classes", "2"]
    assert main([*args, "--mask-classes", "Stroma=1,Tumor=2,Ignore=none"]) == 0
    path = token_path(tmp_path / "t", "10003")
    tokens, meta = read_tokens(path)
    assert tokens.mask_counts is not None  # the frame has half of the slide's pixels a side
    assert tokens.mask_counts.sum(axis=(0, 1, 2)).tolist() == [128 * 128, 256 * 256]
    assert meta["params"]["mask_classes"] == {"Stroma": 1, "Tumor": 2, "Ignore": None}
    before = path.read_bytes()
    assert main([*args, "--mask-classes", "Stroma=1,Tumor=2,Ignore=none"]) == 0
    assert path.read_bytes() == before
    done = run(*args, "--mask-classes", "Stroma=2,Tumor=1,Ignore=none")
    assert done.returncode == 0 and "rebuilt: parameter mask_classes" in done.stdout
    assert read_tokens(path)[0].mask_counts.sum(axis=(0, 1, 2)).tolist() == [256 * 256, 128 * 128]
    done = run(*args)
    assert done.returncode == 1 and "class 'Stroma', 'Ignore' has no class id of its own" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Tumor", "--mask-classes Tumor: must be NAME=ID"),
        ("Tumor=3", "--mask-classes Tumor=3: only classes 1..2, see --classes"),
    ],
)
def test_bad_class_names(tmp_path: Path, given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["build", str(KIDNEY), "--out", str(tmp_path / "t"), *TREE, "--masks", str(tmp_path), "--classes", "2"]
    assert main([*args, "--mask-classes", given]) == 64
    assert said in capsys.readouterr().err


def test_class_names_need_masks() -> None:
    with pytest.raises(OptionError, match="--mask-classes Tumor: only with --masks"):
        BuildOptions(512, 16, length=64, mask_classes=(("Tumor", 1),))


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    image_scope(masks / "10003.xml", [("Tumor", [(box(10, 10, 300, 300), 0), ([(1, 1), (5, 5)], 0), ([(2, 2)], 0)])])
    said = (
        "2 things drawn have no area and are left out: annotation 1, region 2 (2 vertices); annotation 1, region 3"
        " (1 vertex)"
    )
    done = run("build", KIDNEY, "--out", tmp_path / "t", *TREE, "--masks", masks)
    assert done.returncode == 0 and f"warning: 10003: 10003.xml: {said}" in done.stderr
    done = run("build", KIDNEY, "--out", tmp_path / "regions", *TREE, "--masks", masks, "--tile", 256)
    assert done.returncode == 0 and done.stderr.count(said) == 1
    done = run("convert", masks, "--slides", KIDNEY.parent, "--out", tmp_path / "c")
    assert done.returncode == 0 and f"note: 10003.xml: {said}" in done.stderr


def test_points_and_dots_are_listed(tmp_path: Path) -> None:
    path = geojson(
        tmp_path / "a.geojson",
        [("Tumor", "Point", [3, 4]), ("Tumor", "Polygon", [box(0, 0, 9, 9)]), ("Tumor", "Polygon", [[(0, 0), (1, 1)]])],
    )
    assert read_polygons(path).notes == (
        "2 things drawn have no area and are left out: feature 0 (Point); feature 2 (Polygon of 2 vertices)",
    )
    dots = tmp_path / "a.xml"
    points = "".join(f'<Coordinate Order="{i}" X="{i}" Y="{i * i}"/>' for i in range(3))
    dots.write_text(
        '<ASAP_Annotations><Annotations><Annotation Name="n" Type="Dot" PartOfGroup="None"><Coordinates>'
        f'{points[: len(points) // 3]}</Coordinates></Annotation><Annotation Name="a" Type="Polygon" '
        f'PartOfGroup="None"><Coordinates>{points}</Coordinates></Annotation>'
        "</Annotations></ASAP_Annotations>"
    )
    assert read_polygons(dots).notes == ("1 thing drawn has no area and is left out: annotation n (Dot, 1 vertex)",)


def ring(vertices: list[tuple[float, float]], negative: bool = False) -> Ring:
    return Ring(np.array(vertices, np.float64), negative)


def test_overlapping_regions_of_one_layer_are_told_once(tmp_path: Path) -> None:
    path = image_scope(
        tmp_path / "a.xml",
        [
            ("Tumor", [(box(0, 0, 100, 100), 0), (box(50, 50, 100, 100), 0), (box(60, 60, 10, 10), 0)]),
            ("2", [(box(0, 0, 100, 100), 0)]),
        ],
    )
    polygons = read_polygons(path, {"Tumor": 1, "2": 2})
    assert len(polygons.notes) == 1
    assert "regions of annotation Tumor overlap (first near x=50 y=50)" in polygons.notes[0]
    only = read_polygons(path, {"Tumor": 1, "2": None}).draw(0, 0, 160, 160)  # even-odd stays
    assert only[20, 20] == 1 and only[90, 90] == 0 and only[65, 65] == 1 and only[120, 120] == 1


def test_regions_that_touch_or_are_negative_do_not_overlap() -> None:
    whole, hole = ring(box(0, 0, 100, 100)), ring(box(20, 20, 50, 50), negative=True)
    neighbour = ring(box(100, 0, 100, 100))
    assert overlap_note("a", [whole, hole, neighbour, ring(box(400, 0, 5, 5))]) == []
    corner = ring([(0, 0), (100, 0), (0, 100)]), ring([(100, 1), (100, 100), (1, 100)])  # boxes overlap, they do not
    assert overlap_note("a", corner) == []
    assert len(overlap_note("a", [whole, ring(box(20, 20, 50, 50))])) == 1


def test_a_large_mask_without_tiles_is_told(tmp_path: Path) -> None:
    slides, masks = tmp_path / "s", tmp_path / "m"
    slides.mkdir()
    masks.mkdir()
    size = 4160
    tifffile.imwrite(
        slides / "a.tif", np.zeros((size, size, 3), np.uint8), tile=(512, 512), photometric="rgb", compression="deflate"
    )
    mask = np.zeros((size, size), np.uint8)
    mask[:100, :100] = 1
    tifffile.imwrite(masks / "a.tif", mask, compression="deflate")
    done = run("build", slides, "--out", tmp_path / "t", *TREE, "--masks", masks)
    said = "a.tif: 4160 x 4160 pixels without tiles: every process decodes it whole; `convert` makes it tiled, once"
    assert done.returncode == 0 and said in done.stderr
    done = run("convert", masks, "--out", tmp_path / "c")
    assert done.returncode == 0 and "without tiles" not in done.stderr
    done = run("build", slides, "--out", tmp_path / "t", *TREE, "--masks", tmp_path / "c", "--rebuild")
    assert done.returncode == 0 and "without tiles" not in done.stderr
