"""Reads annotations drawn in Aperio ImageScope (PAIP) and in ASAP, from XML.

defusedxml parses the file as a stream: files come from strangers, and a slide can have millions of vertices, so no tree
of elements is built.
"""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

import numpy as np
import numpy.typing as npt
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from data_prep.masks.polygons import Ring
from data_prep.slides.base import SlideError
from data_prep.system.files import one_line

_ROOTS = ("Annotations", "ASAP_Annotations")
_BLOCK_BYTES = 1 << 20
_ASAP_AREAS = ("", "polygon", "spline", "rectangle")
_ELLIPSE = "2"  # ImageScope's Region/@Type
LIMIT_PX = 1e9  # no slide is as large; beyond it a coordinate is damage


class Drawn(NamedTuple):
    """One thing that somebody drew, before it has a class.

    Attributes:
        names: its possible names, best first; none where it has no class.
        number: ImageScope's layer number, "" elsewhere.
        colour: "#rrggbb" of its line, "" where the file does not say.
        rings: its rings, in the order of the file.
    """

    names: tuple[str, ...]
    number: str
    colour: str
    rings: list[Ring]


def read_xml(path: Path, left_out: list[str] | None = None) -> list[Drawn]:
    """Return what an ImageScope or ASAP file holds, in the order of the file, without lines, dots and rulers.

    `left_out` gets a few words about each of these.

    Raises:
        SlideError: not such a file, damaged, or with coordinates that are no numbers.
    """
    reader = _Reader(path, [] if left_out is None else left_out)
    try:
        parser = DefusedXMLParser(target=reader)
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                parser.feed(block)
        parser.close()
    except ParseError as error:
        raise SlideError(f"{path}: damaged or truncated XML: {one_line(error)}") from error
    except DefusedXmlException as error:
        raise SlideError(f"{path}: XML that defines entities is not read: {one_line(error)}") from error
    except (LookupError, UnicodeError) as error:
        raise SlideError(f"{path}: XML in an unknown encoding: {one_line(error)}") from error
    return reader.drawn


def check_coordinates(path: Path, xy: npt.NDArray[np.float64], what: str) -> npt.NDArray[np.float64]:
    """Return `xy`; raise SlideError where a value is not finite or larger than any slide."""
    if len(xy) and not float(np.abs(xy).max()) <= LIMIT_PX:  # also where the maximum is nan
        raise SlideError(f"{path}: {what}: coordinate {float(np.abs(xy).max()):g} is no pixel of a slide")
    return xy


class _Reader:
    """The events of one file, as xml.etree calls them on a parser's target."""

    def __init__(self, path: Path, left_out: list[str]) -> None:
        self._path = path
        self._left_out = left_out
        self.drawn: list[Drawn] = []
        self._tags: list[str] = []
        self._asap = False
        self._layer: dict[str, str] = {}
        self._names: list[str] = []
        self._rings: list[Ring] = []
        self._region: dict[str, str] = {}
        self._points = array("d")
        self._orders: list[float] = []

    def start(self, tag: str, attrib: dict[str, str]) -> None:
        """An element begins."""
        if not self._tags and tag not in _ROOTS:
            raise SlideError(f"{self._path}: <{tag}> is no annotation of ImageScope or ASAP")
        self._asap = self._asap or tag == "ASAP_Annotations"
        self._tags.append(tag)
        if tag == "Vertex":
            self._point(attrib, "Region")
        elif tag == "Coordinate":
            self._point(attrib, "Coordinates")
            self._orders.append(_number(attrib.get("Order", "")))
        elif tag == "Annotation":
            self._layer, self._rings = attrib, []
            self._names = [attrib.get("Name", ""), attrib.get("Description", "")]
        elif tag == "Region":
            self._region, self._points = attrib, array("d")
        elif tag == "Coordinates":
            self._points, self._orders = array("d"), []
        elif tag == "Attribute" and "Region" not in self._tags:
            self._names.append(attrib.get("Value", ""))

    def end(self, tag: str) -> None:
        """An element ends."""
        if tag == "Region":
            self._end_region()
        elif tag == "Coordinates":
            self._end_coordinates()
        elif tag == "Annotation" and self._rings:
            self.drawn.append(self._annotation())
        self._tags.pop()

    def close(self) -> None:
        """The file ends."""

    def _point(self, attrib: dict[str, str], inside: str) -> None:
        if inside not in self._tags:
            raise SlideError(f"{self._path}: {self._where()}: a vertex outside of any <{inside}>")
        for axis in "XY":
            text = attrib.get(axis, attrib.get(axis.lower()))
            try:
                self._points.append(float(text))  # type: ignore[arg-type]
            except (TypeError, ValueError):
                said = "lacks" if text is None else f"has {text!r} as"
                raise SlideError(f"{self._path}: {self._where()}: a vertex {said} {axis}") from None

    def _where(self) -> str:
        if "Region" in self._tags:
            return f"annotation {self._layer.get('Id', '?')}, region {self._region.get('Id', '?')}"
        return f"annotation {self._layer.get('Name') or self._layer.get('Id', '?')}"

    def _xy(self) -> npt.NDArray[np.float64]:
        xy = np.frombuffer(self._points, np.float64).reshape(-1, 2) if self._points else np.zeros((0, 2))
        self._points = array("d")  # the old one lives on in `xy`
        return check_coordinates(self._path, xy, self._where())

    def _end_region(self) -> None:
        xy = self._xy()
        if self._region.get("Type") == _ELLIPSE and 1 < len(xy) <= 4:
            raise SlideError(f"{self._path}: {self._where()} is an ellipse, known by its box only; draw it as a line")
        negative = self._region.get("NegativeROA", "0").strip().lower() not in ("", "0", "false")
        if len(xy) >= 3:  # two vertices are a ruler or an arrow
            self._rings.append(Ring(xy, negative))
        else:
            self._left_out.append(f"{self._where()} ({_vertices(len(xy))})")

    def _end_coordinates(self) -> None:
        xy = self._xy()
        if not any(math.isnan(order) for order in self._orders):
            xy = xy[np.argsort(self._orders, kind="stable")]
        if self._layer.get("Type", "").lower() in _ASAP_AREAS and len(xy) >= 3:
            self._rings.append(Ring(xy))
        else:
            kind = self._layer.get("Type", "") or "no type"
            self._left_out.append(f"{self._where()} ({kind}, {_vertices(len(xy))})")

    def _annotation(self) -> Drawn:
        if "PartOfGroup" in self._layer or self._asap:  # ASAP: the group is the class, the name only a running number
            group = self._layer.get("PartOfGroup", "").strip()
            colour = self._layer.get("Color", "").strip().lower()
            return Drawn((group,) if group and group != "None" else (), "", colour, self._rings)
        names = tuple(name.strip() for name in self._names if name.strip())
        line = _number(self._layer.get("LineColor", ""))
        colour = ""
        if 0 <= line < 2**24:  # Windows: 0xBBGGRR
            value = int(line)
            colour = f"#{value & 255:02x}{value >> 8 & 255:02x}{value >> 16:02x}"
        return Drawn(names, self._layer.get("Id", "").strip(), colour, self._rings)


def _vertices(count: int) -> str:
    return "1 vertex" if count == 1 else f"{count} vertices"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
