"""Polygons as the programs of pathologists write them: ImageScope's XML from squares and other points."""

from pathlib import Path

Points = list[tuple[float, float]]


def square(x: float, y: float, side: float) -> Points:
    """Corners, clockwise from the top left."""
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def region(points: Points, negative: bool = False, number: int = 1) -> str:
    """One polygon of a layer; a negative one is a hole."""
    vertices = "".join(f'<Vertex X="{x!r}" Y="{y!r}" Z="0"/>' for x, y in points)
    return f'<Region Id="{number}" Type="0" NegativeROA="{int(negative)}"><Vertices>{vertices}</Vertices></Region>'


def layer(number: int, *regions: str, colour: int = 65280, name: str = "", value: str = "") -> str:
    """One layer of ImageScope, which is one class."""
    attributes = f'<Attributes><Attribute Name="Description" Id="0" Value="{value}"/></Attributes>'
    head = f'<Annotation Id="{number}" Name="{name}" LineColor="{colour}">{attributes}'
    return head + "<Regions><RegionAttributeHeaders/>" + "".join(regions) + "</Regions></Annotation>"


def image_scope(path: Path, *layers: str) -> Path:
    """Write the layers as one file."""
    path.write_text('<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.5">' + "".join(layers) + "</Annotations>")
    return path
