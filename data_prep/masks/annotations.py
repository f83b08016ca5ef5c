"""Turns annotation files into polygons with class ids, and notes what their user should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.masks import VIABLE, WHOLE
from data_prep.masks.geojson import read_geojson
from data_prep.masks.polygons import Polygons, Ring, Shape
from data_prep.masks.xml import Drawn, read_xml
from data_prep.slides.base import SlideError
from data_prep.system.files import one_line

_KNOWN = {"tumor": 1, "tumour": 1, "annotation": 1, "_0": 1, "_1": 1, "_2": 0, "exclusion": 0}
_SHOWN = 3
_GRID_PX = 256  # both rings are drawn on so many pixels of what their boxes share
_PAIRS = 500
_YELLOW, _RED = "#ffff00", "#ff0000"


def read_polygons(path: Path, classes: Mapping[str, int | None] | None = None, kind: str | None = None) -> Polygons:
    """Read an annotation file.

    `classes` gives class ids by name: the class name (ImageScope: the layer's name, description or attribute; ASAP: its
    group; GeoJSON: its classification), ImageScope's layer number, or the line colour as "#rrggbb". The name "" stands
    for things without a class. None leaves a class out, 0 erases. Without `classes`:
    - a name with "whole" is 1, one with "viable" (not "non-viable") is 2, a number is itself;
    - "tumor" is 1; CAMELYON's groups "_0" and "_1" are 1, "_2" and "exclusion" erase;
    - ImageScope layers without such a name: of exactly two, yellow is 1 and red is 2 (PAIP: whole and viable tumour),
      else the layer's number is the class;
    - ASAP and GeoJSON polygons without a class are 1.
    `Polygons.notes` lists things without area, which are left out, and rings of one ImageScope layer that overlap: the
    even-odd rule leaves their common part out.

    Args:
        path: .xml, .geojson or .json.
        classes: class id (0 to 255, None to leave out) by name, in any case.
        kind: "viable" or "whole" keeps only class 2 or 1 and makes it 1; "both" and None keep all; "inside" makes every
            class 1 unless its name erases.

    Raises:
        SlideError: missing, damaged, of another format, or with a class that has no id.
    """
    left_out: list[str] = []
    try:
        drawn = read_xml(path, left_out) if path.suffix.lower() == ".xml" else read_geojson(path, left_out)
    except FileNotFoundError:
        raise SlideError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    if kind == "inside":
        ids: list[int | None] = [0 if 0 in map(_by_name, thing.names) else 1 for thing in drawn]
    else:
        ids = _default_ids(path, drawn) if classes is None else _mapped_ids(path, drawn, classes)
    shapes, notes = [], _left_out_note(left_out)
    for thing, class_id in zip(drawn, ids, strict=True):
        if kind in ("viable", "whole"):
            if class_id != (VIABLE if kind == "viable" else WHOLE):
                continue
            class_id = 1
        if class_id is not None:
            shapes.append(Shape(class_id, thing.rings))
            if thing.number:  # a layer of ImageScope; elsewhere rings beyond the first are holes
                notes += overlap_note(thing.names[0] if thing.names else thing.number, thing.rings)
    return Polygons(shapes, notes)


def _mapped_ids(path: Path, drawn: Sequence[Drawn], classes: Mapping[str, int | None]) -> list[int | None]:
    wanted = {name.strip().casefold(): class_id for name, class_id in classes.items()}
    for name, class_id in classes.items():
        if class_id is not None and not 0 <= class_id <= 255:
            raise SlideError(f"{path}: class {name!r} has id {class_id}; ids are 0 to 255")
    ids: list[int | None] = []
    missing: list[str] = []
    for thing in drawn:
        keys = [key.casefold() for key in (*thing.names, thing.number, thing.colour) if key] or [""]
        found = next((key for key in keys if key in wanted), None)
        if found is None:
            missing.append(thing.names[0] if thing.names else thing.number)
        else:
            ids.append(wanted[found])
    if missing:
        raise SlideError(f"{path}: no class id was given for {_listed(missing)}; ids are known for {_listed(classes)}")
    return ids


def _default_ids(path: Path, drawn: Sequence[Drawn]) -> list[int | None]:
    ids = [next((found for name in thing.names if (found := _by_name(name)) is not None), None) for thing in drawn]
    layers = [thing for thing in drawn if thing.number]
    paip = len(layers) == 2 and {thing.colour for thing in layers} == {_YELLOW, _RED}
    missing: list[str] = []
    for i, thing in enumerate(drawn):
        if ids[i] is not None:
            continue
        if thing.number and paip:
            ids[i] = WHOLE if thing.colour == _YELLOW else VIABLE
        elif thing.number.isdecimal() and 1 <= int(thing.number) <= 255:
            ids[i] = int(thing.number)
        elif not thing.names:
            ids[i] = 1
        else:
            missing.append(thing.names[0])
    if missing:
        raise SlideError(
            f"{path}: class {_listed(missing)} has no class id of its own;"
            " give one with --mask-classes NAME=ID, or convert --class NAME=ID"
        )
    return list(ids)


def _by_name(name: str) -> int | None:
    name = name.casefold()
    if "viable" in name:
        return None if any(no in name for no in ("non-viable", "nonviable", "non viable")) else VIABLE
    if "whole" in name:
        return WHOLE
    if name.isdecimal() and int(name) <= 255:
        return int(name)
    return _KNOWN.get(name)


def _listed(names: Sequence[str] | Mapping[str, int | None]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(repr(name) for name in unique[:8]) + (", ..." if len(unique) > 8 else "")


def _left_out_note(left_out: Sequence[str]) -> list[str]:
    """One line about drawn things without area; [] if there are none."""
    if not left_out:
        return []
    many = len(left_out)
    what = "1 thing drawn has no area and is" if many == 1 else f"{many} things drawn have no area and are"
    shown = "; ".join(left_out[:_SHOWN]) + ("; ..." if len(left_out) > _SHOWN else "")
    return [f"{what} left out: {shown}"]


def overlap_note(name: str, rings: Sequence[Ring]) -> list[str]:
    """One line if rings of one ImageScope layer overlap that are not marked as negative, else [].

    ImageScope's files ask for the even-odd rule: what lies in two rings is outside.
    """
    positive = [ring.xy for ring in rings if not ring.negative and len(ring.xy) >= 3]
    if len(positive) < 2:
        return []
    low = np.array([xy.min(axis=0) for xy in positive])
    high = np.array([xy.max(axis=0) for xy in positive])
    order = np.argsort(low[:, 0])
    looked_at = 0
    for place, i in enumerate(order.tolist()):
        later = order[place + 1 :]
        later = later[: int(np.searchsorted(low[later, 0], high[i, 0]))]  # boxes that begin before this one ends
        near = later[(low[later, 1] < high[i, 1]) & (high[later, 1] > low[i, 1])]
        for j in near.tolist():
            looked_at += 1
            if looked_at > _PAIRS:
                return []
            box = np.maximum(low[i], low[j]), np.minimum(high[i], high[j])
            if _share(Ring(positive[i]), Ring(positive[j]), *box):
                x, y = (int(v) for v in box[0])
                where = f"regions of annotation {name} overlap (first near x={x} y={y})"
                return [f"{where}: by the even-odd rule the common part is outside; join them if that is not meant"]
    return []


def _share(a: Ring, b: Ring, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether two rings share a point of a grid inside a box."""
    scale = _GRID_PX / np.maximum(high - low, 1e-9)
    inside = [
        Polygons([Shape(1, [Ring((ring.xy - low) * scale)])]).draw(0, 0, _GRID_PX, _GRID_PX) != 0 for ring in (a, b)
    ]
    return bool((inside[0] & inside[1]).any())
