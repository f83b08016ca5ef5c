"""Reads annotations from GeoJSON in level-0 pixels, as QuPath exports them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.masks.polygons import Ring
from data_prep.masks.xml import Drawn, check_coordinates
from data_prep.slides.base import SlideError
from data_prep.system.files import one_line

_NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


def read_geojson(path: Path, left_out: list[str] | None = None) -> list[Drawn]:
    """Return the polygons of a FeatureCollection, a list of features, a feature or a bare geometry, in file order.

    A polygon's first ring is its outline, the others are holes. Rings need not be closed. Coordinates beyond x and y
    are ignored; points and lines are left out. `left_out` gets a few words about each of these.

    Raises:
        SlideError: no GeoJSON, damaged, or with coordinates that are no numbers.
    """

    def compact(node: dict[str, Any]) -> Any:
        """Turn coordinates into arrays as soon as they are read: lists of lists take ten times the memory."""
        if node.get("type") == "Polygon":
            node["coordinates"] = [_polygon(path, node.get("coordinates"))]
        elif node.get("type") == "MultiPolygon":
            parts = node.get("coordinates")
            if parts is not None and not isinstance(parts, list):
                raise SlideError(f"{path}: a MultiPolygon's coordinates are not a list")
            node["coordinates"] = [_polygon(path, part) for part in parts or []]
        return node

    try:
        root = json.loads(path.read_bytes(), object_hook=compact)
    except SlideError:
        raise
    except (ValueError, RecursionError) as error:
        raise SlideError(f"{path}: damaged or truncated JSON: {one_line(error)}") from error
    told = [] if left_out is None else left_out
    return [drawn for n, feature in enumerate(_features(path, root)) for drawn in _drawn(path, n, feature, told)]


def _polygon(path: Path, rings: Any) -> list[Ring]:
    if rings is None or rings == []:
        return []
    out: list[Ring] = []
    try:
        for ring in rings:
            xy = np.array([(float(point[0]), float(point[1])) for point in ring], np.float64).reshape(-1, 2)
            out.append(Ring(check_coordinates(path, xy, "a polygon"), negative=bool(out)))
    except (TypeError, IndexError, KeyError, ValueError, OverflowError) as error:
        if isinstance(error, SlideError):
            raise
        raise SlideError(f"{path}: coordinates of a polygon are not lists of x and y: {one_line(error)}") from error
    return out


def _features(path: Path, root: Any) -> Iterator[dict[str, Any]]:
    nodes = root if isinstance(root, list) else [root]
    for node in nodes:
        kind = node.get("type") if isinstance(node, dict) else None
        if kind == "FeatureCollection":
            inside = node.get("features")
            if not isinstance(inside, list):
                raise SlideError(f"{path}: a FeatureCollection without a list of features")
            yield from _features(path, inside)
        elif kind == "Feature":
            yield node
        elif kind in ("Polygon", "MultiPolygon", "GeometryCollection", *_NO_AREA):
            yield {"geometry": node}
        else:
            raise SlideError(f"{path}: no GeoJSON: no FeatureCollection, Feature or geometry")


def _drawn(path: Path, number: int, feature: dict[str, Any], left_out: list[str]) -> Iterator[Drawn]:
    names, colour = _classification(path, feature.get("properties"))
    for rings in _geometry(path, feature.get("geometry"), f"feature {number}", left_out):
        if rings and len(rings[0].xy) < 3:
            left_out.append(f"feature {number} (Polygon of {len(rings[0].xy)} vertices)")
        elif rings:
            yield Drawn(names, "", colour, rings)


def _geometry(path: Path, geometry: Any, where: str, left_out: list[str]) -> Iterator[list[Ring]]:
    if geometry is None:
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else geometry
    if kind in ("Polygon", "MultiPolygon"):
        yield from geometry["coordinates"]
    elif kind == "GeometryCollection":
        parts = geometry.get("geometries") or []
        if not isinstance(parts, list):
            raise SlideError(f"{path}: a GeometryCollection's geometries are not a list")
        for part in parts:
            yield from _geometry(path, part, where, left_out)
    elif kind in _NO_AREA:
        left_out.append(f"{where} ({kind})")
    else:
        raise SlideError(f"{path}: geometry {kind!r} is unknown")


def _classification(path: Path, properties: Any) -> tuple[tuple[str, ...], str]:
    """Name and colour of a feature's class, from QuPath's `classification` (an object or a string) or `class`."""
    if properties is None:
        return (), ""
    if not isinstance(properties, dict):
        raise SlideError(f"{path}: properties of a feature are not an object")
    found = properties.get("classification", properties.get("class"))
    colour = ""
    if isinstance(found, dict):
        red_green_blue = found.get("color")
        if isinstance(red_green_blue, list) and [type(value) for value in red_green_blue] == [int, int, int]:
            colour = "#" + "".join(f"{value & 255:02x}" for value in red_green_blue)
        parts = found.get("names")
        found = found.get("name", ": ".join(map(str, parts)) if isinstance(parts, list) else None)
    name = "" if found is None else str(found).strip()
    return ((name,) if name else ()), colour
