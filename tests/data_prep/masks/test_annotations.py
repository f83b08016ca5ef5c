"""Polygons as masks: ImageScope and ASAP XML, GeoJSON; which pixels, which classes, which files are refused."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from data_prep.masks.masks import open_mask
from data_prep.masks.polygons import Polygons, Ring, Shape
from data_prep.slides.base import SlideError
from tests.helpers.annotations import Points, image_scope, layer, region, square


def ids(path: Path, size_wh: tuple[int, int], classes: dict[str, int | None] | None = None, kind: str | None = None):
    with open_mask(path, size_wh, classes, kind=kind) as mask:
        assert mask.size_wh == size_wh
        return mask.read(0, 0, *size_wh)


def refusal(path: Path, classes: dict[str, int | None] | None = None) -> str:
    with pytest.raises(SlideError) as caught:
        open_mask(path, (100, 100), classes)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def exact_inside(rings: list[Points], x: int, y: int) -> bool:
    """Even-odd at the centre of a pixel in fractions, edge by edge: a ray to the left."""
    centre_x, centre_y = Fraction(2 * x + 1, 2), Fraction(2 * y + 1, 2)
    crossings = 0
    for points in rings:
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            if (Fraction(ay) <= centre_y) != (Fraction(by) <= centre_y):
                at = Fraction(ax) + (centre_y - Fraction(ay)) * (Fraction(bx) - Fraction(ax)) / Fraction(by - ay)
                crossings += at <= centre_x
    return crossings % 2 == 1


# ---- which pixels


def test_each_pixel_against_fractions() -> None:
    """Quarter pixels, so that edges and vertices fall on pixel centres."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        points = [(float(x) / 4, float(y) / 4) for x, y in rng.integers(-8, 72, (5, 2))]
        boxes = [square(float(x) / 4, float(y) / 4, float(s) / 4) for x, y, s in rng.integers(0, 40, (3, 3))]
        drawn = Polygons([Shape(1, [Ring(np.array(box)) for box in boxes])]).draw(0, 0, 16, 16)
        expected = [[exact_inside(boxes, x, y) for x in range(16)] for y in range(16)]
        np.testing.assert_array_equal(drawn, np.array(expected, np.uint8))
        slanted = Polygons([Shape(1, [Ring(np.array(points))])]).draw(0, 0, 16, 16)
        on_edge = [(x, y) for x in range(16) for y in range(16) if exact_inside([points], x, y) != bool(slanted[y, x])]
        for x, y in on_edge:  # only where the edge runs through the centre, up to rounding
            near = [exact_inside([[(px + dx, py) for px, py in points]], x, y) for dx in (-(2.0**-40), 2.0**-40)]
            assert len(set(near)) == 2


def test_large_polygon_against_matplotlib() -> None:
    rng = np.random.default_rng(1)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 3000))
    radius = rng.uniform(120, 240, 3000)
    star = np.stack([260.3 + radius * np.cos(angle), 250.7 + radius * np.sin(angle)], axis=1)
    drawn = Polygons([Shape(7, [Ring(star)])]).draw(0, 0, 520, 500)
    centres = np.stack(np.meshgrid(np.arange(520) + 0.5, np.arange(500) + 0.5), axis=-1).reshape(-1, 2)
    expected = Outline(np.vstack([star, star[:1]])).contains_points(centres).reshape(500, 520)  # a star is simple
    np.testing.assert_array_equal(drawn == 7, expected)
    assert set(np.unique(drawn)) == {0, 7}


coordinate = st.one_of(st.integers(-20, 80).map(lambda v: v / 2), st.floats(-30, 90, width=32))
rings = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=90)
shapes = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.tuples(rings, st.booleans()), min_size=1, max_size=4)),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 40), st.integers(1, 40))
def test_tiles_equal_the_whole(parts, tile_w: int, tile_h: int) -> None:
    """Bit for bit, whatever the tile; and the whole equals one shape, one ring, one pixel at a time."""
    polygons = Polygons([Shape(c, [Ring(np.array(r, float), n) for r, n in rs]) for c, rs in parts])
    whole = polygons.draw(0, 0, 50, 40)
    for y in range(0, 40, tile_h):
        for x in range(0, 50, tile_w):
            w, h = min(tile_w, 50 - x), min(tile_h, 40 - y)
            np.testing.assert_array_equal(polygons.draw(x, y, w, h), whole[y : y + h, x : x + w])
    expected = np.zeros((40, 50), np.uint8)
    for class_id in (1, 2, 3, 0):
        for c, rs in parts:
            if c == class_id:
                one = [(Polygons([Shape(1, [Ring(np.array(r, float))])]).draw(0, 0, 50, 40), n) for r, n in rs]
                inside = np.bitwise_xor.reduce([image for image, _ in one]).astype(bool)
                positive = [image for image, negative in one if not negative]
                inside &= np.any(positive, axis=0) if positive else False
                expected[inside] = class_id
    np.testing.assert_array_equal(whole, expected)


def test_more_crossings_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    polygons = Polygons([Shape(1, [Ring(rng.uniform(0, 300, (400, 2)))]), Shape(2, [Ring(rng.uniform(0, 90, (9, 2)))])])
    expected = polygons.draw(0, 0, 300, 300)
    monkeypatch.setattr("data_prep.masks.polygons._EVENTS", 500)
    monkeypatch.setattr("data_prep.masks.polygons._AREA_PX", 7000)
    np.testing.assert_array_equal(polygons.draw(0, 0, 300, 300), expected)
    assert 0.2 < (expected == 1).mean() < 0.8


def test_a_corner_of_a_huge_slide_is_the_same_shape() -> None:
    """Far from the origin nothing is rounded: the shape moved by a whole number of pixels is the same picture."""
    points = np.random.default_rng(8).integers(0, 400, (60, 2)) / 8
    near = Polygons([Shape(1, [Ring(points)])]).draw(0, 0, 50, 50)
    moved = Polygons([Shape(1, [Ring(points + 65536 * 3)])]).draw(65536 * 3, 65536 * 3, 50, 50)
    on_edge = near != moved
    assert near.any() and on_edge.mean() < 0.002


def test_shapes_that_share_a_border_share_no_pixel() -> None:
    """A fan of triangles around pixel centres, drawn one by one, covers its square once."""
    corners = [(2.5, 2.5), (30.5, 2.5), (30.5, 30.5), (2.5, 30.5), (2.5, 2.5)]
    total = np.zeros((40, 40), int)
    for first, second in pairwise(corners):
        total += Polygons([Shape(1, [Ring(np.array([first, second, (16.5, 16.5)]))])]).draw(0, 0, 40, 40)
    expected = np.zeros((40, 40), int)
    expected[2:30, 2:30] = 1  # from the left and upper border on
    np.testing.assert_array_equal(total, expected)


# ---- ImageScope


def test_islands_under_negative_regions_survive(tmp_path: Path) -> None:
    """In whatever order they were drawn; and a negative region that reaches out adds nothing."""
    outline, lake, island = square(10, 10, 80), square(20, 20, 50), square(30, 30, 10)
    expected = np.zeros((100, 100), np.uint8)
    expected[10:90, 10:90] = 1
    expected[20:70, 20:70] = 0
    expected[30:40, 30:40] = 1
    reach_out = square(80, 80, 15)
    expected[80:90, 80:90] = 0
    parts = [region(outline), region(lake, True), region(island), region(reach_out, True)]
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        path = image_scope(tmp_path / "a.xml", layer(1, *(parts[i] for i in order)))
        np.testing.assert_array_equal(ids(path, (100, 100)), expected)


def test_coordinates_are_not_truncated(tmp_path: Path) -> None:
    path = image_scope(tmp_path / "a.xml", layer(1, region([(1.6, 1.4), (4.4, 1.4), (4.4, 3.6), (1.6, 3.6)])))
    expected = np.zeros((6, 6), np.uint8)
    expected[1:4, 2:4] = 1  # centres 1.5, 2.5, 3.5 down; 2.5, 3.5 across
    np.testing.assert_array_equal(ids(path, (6, 6)), expected)


BIG, SMALL = region(square(0, 0, 8)), region(square(2, 2, 3))
YELLOW, RED, GREEN = 65535, 255, 65280


def found_in(path: Path, *layers: str, **how) -> tuple[int, int]:
    """Class ids where the big square is alone, and where the small one lies on it."""
    drawn = ids(image_scope(path, *layers), (10, 10), **how)
    return int(drawn[0, 0]), int(drawn[3, 3])


def test_classes_of_layers_come_from_numbers_colours_and_names(tmp_path: Path) -> None:
    found = partial(found_in, tmp_path / "a.xml")
    assert found(layer(1, BIG), layer(2, SMALL)) == (1, 2)
    assert found(layer(2, SMALL), layer(1, BIG)) == (1, 2), "higher ids lie over lower ones"
    assert found(layer(1, SMALL, colour=RED), layer(2, BIG, colour=YELLOW)) == (1, 2), "PAIP's colours"
    assert found(layer(1, SMALL, colour=GREEN), layer(2, BIG, colour=YELLOW)) == (2, 2), "other colours say nothing"
    assert found(layer(1, SMALL, name="Viable Tumor"), layer(2, BIG, value="whole tumour")) == (1, 2)
    assert found(layer(1, BIG, name="non-viable")) == (1, 1), "no PAIP name: the layer's number"


@pytest.mark.parametrize(("kind", "expected"), [("viable", (0, 1)), ("whole", (1, 1)), ("both", (1, 2))])
def test_a_kind_of_mask_takes_the_layers_of_that_name(kind: str, expected: tuple[int, int], tmp_path: Path) -> None:
    layers = layer(1, BIG, name="whole"), layer(2, SMALL, name="viable")
    assert found_in(tmp_path / "a.xml", *layers, kind=kind) == expected


def test_given_classes_name_layers_by_name_number_or_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    found = partial(found_in, path)
    layers = layer(4, BIG, name="Stroma"), layer(7, SMALL, colour=RED)
    assert found(*layers, classes={"stroma": 5, "7": 9}) == (5, 9)
    assert found(*layers, classes={"STROMA": 5, "#FF0000": 0}) == (5, 0)
    assert found(*layers, classes={"4": 3, "7": None}) == (3, 3)
    assert "no class id was given for '7'; ids are known for 'Stroma'" in refusal(path, {"Stroma": 5})
    assert "class 'Stroma' has id 256" in refusal(path, {"Stroma": 256, "7": 1})


def test_what_has_no_area_is_left_out(tmp_path: Path) -> None:
    ruler = region([(1, 1), (9, 9)])
    assert not ids(image_scope(tmp_path / "a.xml", layer(1, ruler, region([])), layer(2)), (10, 10)).any()
    assert not ids(image_scope(tmp_path / "b.xml"), (10, 10)).any(), "a slide without annotations is all background"
    ellipse = region(square(1, 1, 5)).replace('Type="0"', 'Type="2"')
    assert "annotation 1, region 1 is an ellipse" in refusal(image_scope(tmp_path / "c.xml", layer(1, ellipse)))


def test_bad_xml(tmp_path: Path) -> None:
    good = image_scope(tmp_path / "good.xml", layer(1, region(square(1, 1, 5)))).read_text()
    path = tmp_path / "bad.xml"
    cases = {
        "damaged or truncated XML": good[: len(good) // 2],
        "no annotation of ImageScope or ASAP": "<svg/>",
        "annotation 1, region 1: a vertex has 'one' as X": good.replace('X="1"', 'X="one"').replace("1.0", "1"),
        "a vertex lacks Y": good.replace("Y=", "W="),
        "a vertex outside of any <Region>": good.replace("<Region ", "<Refion "),
        "coordinate nan is no pixel": good.replace('X="1"', 'X="nan"'),
        "coordinate 1e+12 is no pixel": good.replace('X="1"', 'X="1e12"'),
        "defines entities": '<!DOCTYPE a [<!ENTITY x "y">]><Annotations>&x;</Annotations>',
    }
    for words, text in cases.items():
        path.write_text(text)
        assert words in refusal(path), words
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "damaged or truncated XML" in refusal(path)
    path.write_text("")
    assert "damaged or truncated XML" in refusal(path)
    with pytest.raises(SlideError, match="its size is needed"):
        open_mask(path)


# ---- ASAP


def asap(path: Path, *annotations: tuple[str, str, Points]) -> Path:
    text = ""
    for number, (group, kind, points) in enumerate(annotations):
        coordinates = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points))
        head = f'<Annotation Name="Annotation {number}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
        text += f"{head}<Coordinates>{coordinates}</Coordinates></Annotation>"
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None"><Attributes /></Group></AnnotationGroups>'
    path.write_text(f"<ASAP_Annotations><Annotations>{text}</Annotations>{groups}</ASAP_Annotations>")
    return path


def test_asap(tmp_path: Path) -> None:
    expected = np.zeros((10, 10), np.uint8)
    expected[0:6, 0:6] = 1
    expected[4:8, 4:8] = 1  # two annotations that overlap are a union
    path = asap(tmp_path / "a.xml", ("_0", "Polygon", square(0, 0, 6)), ("_1", "Spline", square(4, 4, 4)))
    np.testing.assert_array_equal(ids(path, (10, 10)), expected)
    expected[1:3, 1:3] = 0
    parts = [("_2", "Polygon", square(1, 1, 2)), ("_0", "Polygon", square(0, 0, 6)), ("_0", "Polygon", square(4, 4, 4))]
    np.testing.assert_array_equal(ids(asap(path, *parts), (10, 10)), expected)
    points = [("None", "Dot", [(1, 1)]), ("None", "PointSet", square(1, 1, 5)), ("None", "Rectangle", square(0, 0, 2))]
    assert ids(asap(path, *points), (10, 10)).sum() == 4
    asap(path, ("Stroma", "Polygon", square(0, 0, 6)), ("Tumor", "Polygon", square(2, 2, 2)))
    assert "class 'Stroma' has no class id of its own" in refusal(path)
    drawn = ids(path, (10, 10), {"Stroma": 1, "tumor": 4})
    assert (drawn[0, 0], drawn[2, 2], drawn[9, 9]) == (1, 4, 0)


def test_asap_coordinates_go_by_their_order(tmp_path: Path) -> None:
    path = asap(tmp_path / "a.xml", ("Tumor", "Polygon", square(1, 1, 6)))
    sorted_ids = ids(path, (10, 10))
    text = path.read_text()
    first, second = ('<Coordinate Order="1" X="7" Y="1" />', '<Coordinate Order="2" X="7" Y="7" />')
    path.write_text(text.replace(first, "FIRST").replace(second, first).replace("FIRST", second))
    assert path.read_text() != text
    np.testing.assert_array_equal(ids(path, (10, 10)), sorted_ids)


# ---- GeoJSON


def feature(geometry: object, name: object = None) -> dict[str, object]:
    return {"type": "Feature", "properties": {"objectType": "annotation", "classification": name}, "geometry": geometry}


def test_geojson(tmp_path: Path) -> None:
    hole = [[3, 3, 0], [5, 3, 0], [5, 5, 0], [3, 5, 0], [3, 3, 0]]
    island = square(3.5, 3.5, 1)
    polygon = {"type": "Polygon", "coordinates": [square(1, 1, 6), hole]}  # not closed, with z
    several = {"type": "MultiPolygon", "coordinates": [[island], [square(8, 8, 2)], []]}
    features = [
        feature(polygon, {"name": "whole", "color": [255, 255, 0]}),
        feature(several, {"names": ["viable"]}),
        feature(None, {"name": "whole"}),
        feature({"type": "Polygon", "coordinates": []}, {"name": "whole"}),
        feature({"type": "LineString", "coordinates": [[0, 0], [9, 9]]}, {"name": "whole"}),
        feature({"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [0, 0]}]}),
    ]
    expected = np.zeros((12, 10), np.uint8)
    expected[1:7, 1:7] = 1
    expected[3:5, 3:5] = 0
    expected[3:4, 3:4] = 2
    expected[8:10, 8:10] = 2
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8-sig")
    np.testing.assert_array_equal(ids(path, (10, 12)), expected)
    (tmp_path / "b.json").write_text(json.dumps(features))
    np.testing.assert_array_equal(ids(tmp_path / "b.json", (10, 12)), expected)
    assert ids(path, (10, 12), {"whole": 9, "viable": None}).max() == 9
    path.write_text(json.dumps(polygon))
    assert ids(path, (10, 12)).sum() == 32, "without a class it is class 1"
    path.write_text(json.dumps(feature(polygon, "Tumor: Positive")))
    assert "class 'Tumor: Positive' has no class id" in refusal(path)
    assert ids(path, (10, 12), {"tumor: positive": 3}).max() == 3


def test_bad_geojson(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    cases = {
        "damaged or truncated JSON": '{"type": "FeatureCollection", "features": [',
        "no GeoJSON": '{"a": 1}',
        "without a list of features": '{"type": "FeatureCollection"}',
        "not lists of x and y": '{"type": "Polygon", "coordinates": [[1, 2, 3]]}',
        "coordinate inf is no pixel": '{"type": "Polygon", "coordinates": [[[1, 2], [Infinity, 2], [3, 3]]]}',
        "int too large": '{"type": "Polygon", "coordinates": [[[1, 2], [' + "9" * 400 + ", 2], [3, 3]]]}",
        "geometries are not a list": '{"type": "GeometryCollection", "geometries": 5}',
        "geometry 'Circle' is unknown": '{"type": "Feature", "geometry": {"type": "Circle"}}',
        "properties of a feature are not an object": '{"type": "Feature", "properties": 3, "geometry": null}',
    }
    for words, text in cases.items():
        path.write_text(text)
        assert words in refusal(path), words
    path.write_bytes(b"\xff\xfe\xfa")
    assert "damaged or truncated JSON" in refusal(path)
    path.write_text("[" * 100_000)
    assert "damaged or truncated JSON" in refusal(path)


@pytest.mark.parametrize("suffix", ["xml", "asap.xml", "geojson"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    """Cuts, wrong bytes and wrong values: a mask or one line that names the file, nothing else."""
    good = tmp_path / f"good.{suffix}"
    if suffix == "xml":
        first = layer(1, region(square(1, 1, 50)), region(square(5, 5, 10), True))
        image_scope(good, first, layer(2, region(square(3, 3, 9))))
    elif suffix == "asap.xml":
        asap(good, ("Tumor", "Polygon", square(1, 1, 6)), ("_2", "Spline", square(2, 2, 2)))
    else:
        parts = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [square(1, 1, 6)]}]}
        several = {"type": "MultiPolygon", "coordinates": [[square(1, 1, 6), square(2, 2, 2)]]}
        features = [feature(parts, {"name": "whole", "color": [1, 2, 3]}), feature(several, {"names": ["viable"]})]
        good.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert ids(good, (100, 100)).any()
    rng = np.random.default_rng(4)
    raw = good.read_bytes()
    values = [match.span() for match in re.finditer(rb'-?\d+\.?\d*|"[^"]*"|\[[^][]*\]', raw)]
    bad = tmp_path / f"bad.{suffix}"
    refused = 0
    for turn in range(300):
        text = bytearray(raw)
        if turn % 3 == 0:
            del text[rng.integers(len(text)) :]
        elif turn % 3 == 1:
            text[rng.integers(len(text))] = rng.integers(256)
        else:
            start, stop = values[rng.integers(len(values))]
            text[start:stop] = rng.choice([b"null", b"{}", b"[]", b"1e999", b'"-1"', b'"x"', b"[[0]]"])
        bad.write_bytes(text)
        try:
            assert ids(bad, (100, 100)).shape == (100, 100)
        except SlideError as error:
            refused += 1
            assert str(error).startswith(str(bad)) and "\n" not in str(error)
    assert refused > 150
