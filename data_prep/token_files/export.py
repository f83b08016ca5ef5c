"""Exports the leaves of token files: GeoJSON for QuPath, coordinate files for TRIDENT and CLAM readers.

Everything is in level-0 pixels, x and y from the top left. No slide is opened.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.system.files import write_atomic
from data_prep.token_files.token_file import level0_xy, magnification, read_tokens, reader_attributes, scale_xy
from data_prep.tokens.token_set import TokenSet

FORMATS = ("geojson", "coords")
# Of leaves of side p, 2p, 4p, ...: from warm (fine) to cool (coarse).
_COLOURS = tuple(map(bytes.fromhex, ("d62728", "ff7f0e", "f1c40f", "2ca02c", "17becf", "1f77b4", "9467bd", "7f7f7f")))


def export(
    path: Path, out: Path, form: str, *, classification: str | None = None, uniform_px: int | None = None
) -> list[Path]:
    """Write the leaves of one token file, or equal squares over its slide, in another form; return the files written.

    Args:
        path: the token file.
        out: folder to write to; made if it is not there.
        form: "geojson" or "coords".
        classification: class of all GeoJSON objects; None: one class per side of leaves.
        uniform_px: write squares of this side in level-0 pixels from the top left on, as uniform patching of the slide
            would; the last column and row may reach beyond the slide.

    Raises:
        StoreError: not a whole token file.
        OSError: a file cannot be written; nothing is left of it.
        ValueError: another `form`, or a side below 1.
    """
    # Check and read.
    if uniform_px is not None and uniform_px < 1:
        raise ValueError(f"squares of {uniform_px} pixels: must be at least 1")
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; choose from {', '.join(FORMATS)}")
    token_set, meta = read_tokens(path)
    name = meta["slide"]

    # One GeoJSON file, or a file of coordinates per side.
    if form == "geojson":
        target = out / f"{name}.geojson"
        out.mkdir(parents=True, exist_ok=True)
        if uniform_px is None:
            features = leaf_features(token_set, meta, classification)
        else:
            features = square_features(meta, uniform_px, classification)
        write_atomic(target, b"".join(collection(features)))
        return [target]
    if uniform_px is not None:
        files = [(uniform_px, coords_file(meta, uniform_px, squares_level0(meta, uniform_px)))]
    else:
        more = {
            "adaptive": bool(len(np.unique(token_set.leaf_size)) > 1),
            "order": "morton",
            "apf_params": json.dumps(meta["params"], sort_keys=True),
        }
        files = [
            (side, coords_file(meta, side, level0_xy(meta, token_set.leaf_xy[rows]), rows, more))
            for side, rows in by_side(token_set, meta)
        ]
    written = []
    for side0_px, data in files:
        folder = out / f"{round(magnification(meta))}x_{side0_px}px_0px_overlap" / "patches"
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}_patches.h5")
        write_atomic(written[-1], data)
    return written


def _shown(token_set: TokenSet) -> NDArray[np.int64]:
    """Rows of leaves that show some of the slide, each leaf once (`--fit drop` may repeat some), in Morton order."""
    content = token_set.content_counts.sum(axis=(1, 2), dtype=np.int64) > 0
    _, first = np.unique(token_set.leaf_xy, axis=0, return_index=True)
    return np.intersect1d(np.flatnonzero(content), first).astype(np.int64)


def boxes_level0(token_set: TokenSet, meta: dict[str, Any]) -> NDArray[np.float64]:
    """Left, top, right, bottom (N, 4) of every leaf in level-0 pixels, cut off where the slide ends."""
    ends = []
    size0_wh = meta["size0_wh"] or meta["content_wh"]
    for axis, scale in enumerate(scale_xy(meta)):
        low = token_set.leaf_xy[:, axis].astype(np.int64)
        for edge in (low, low + token_set.leaf_size):
            ends.append(np.minimum(edge * scale.denominator / scale.numerator, float(size0_wh[axis])))
    return np.stack(ends, axis=1)[:, [0, 2, 1, 3]]


def squares_level0(meta: dict[str, Any], side_px: int) -> NDArray[np.int64]:
    """Top left (N, 2) of squares of `side_px` level-0 pixels over the whole slide, row by row."""
    width, height = meta["size0_wh"] or meta["content_wh"]
    y, x = np.mgrid[0:height:side_px, 0:width:side_px]
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)


def collection(features: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Yield a GeoJSON FeatureCollection, one feature a line."""
    yield b'{"type": "FeatureCollection", "features": [\n'
    for i, feature in enumerate(features):
        yield (",\n" if i else "").encode() + json.dumps(feature).encode()
    yield b"\n]}\n"


def _feature(
    box: Sequence[float], name: str, kind: str, colour: bytes, properties: dict[str, int], measured: dict[str, float]
) -> dict[str, Any]:
    """A QuPath detection, which QuPath draws fast: thousands are fine."""
    left, top, right, bottom = (_number(v) for v in box)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "detection",
            "name": name,
            "classification": {"name": kind, "color": list(colour)},
            **properties,
            "measurements": measured,
        },
    }


def leaf_features(
    token_set: TokenSet, meta: dict[str, Any], classification: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a GeoJSON feature for each leaf that shows some of the slide.

    Colours tell the sides apart; the class is `classification`, or one per side. Properties: `depth` in the quadtree,
    and `size`, the side in frame pixels. Measurements: row of the token file, depth, sides in pixels of the frame and
    of level 0, and with masks the share of each class.
    """
    boxes = boxes_level0(token_set, meta)
    patch = token_set.tokens.shape[1]
    shares = None
    if token_set.mask_counts is not None:
        content = np.maximum(1, token_set.content_counts.sum(axis=(1, 2), dtype=np.int64))
        shares = token_set.mask_counts.sum(axis=(1, 2), dtype=np.int64) / content[:, None]
    for row in _shown(token_set).tolist():
        box, side = boxes[row].tolist(), int(token_set.leaf_size[row])
        colour = _COLOURS[min((side // patch).bit_length() - 1, len(_COLOURS) - 1)]
        depth = (token_set.size_px // side).bit_length() - 1
        measured = {"token": row, "depth": depth, "side frame px": side, "side level-0 px": _number(box[2] - box[0])}
        if shares is not None:
            measured |= {f"share of class {k + 1}": round(v, 6) for k, v in enumerate(shares[row].tolist())}
        name = classification or f"leaf {side} px"
        yield _feature(box, f"leaf {row}", name, colour, {"depth": depth, "size": side}, measured)


def square_features(meta: dict[str, Any], side_px: int, classification: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a GeoJSON feature for each of `squares_level0`, cut off where the slide ends; `size` is their side."""
    width, height = meta["size0_wh"] or meta["content_wh"]
    kind = classification or f"square {side_px} px"
    for n, (x, y) in enumerate(squares_level0(meta, side_px).tolist()):
        box = (float(x), float(y), float(min(x + side_px, width)), float(min(y + side_px, height)))
        yield _feature(box, f"square {n}", kind, _COLOURS[-1], {"size": side_px}, {})


def _number(value: float) -> float:
    return int(value) if value.is_integer() else value


def by_side(token_set: TokenSet, meta: dict[str, Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each side of leaves in level-0 pixels (rounded), and the rows of its leaves that are shown."""
    scale = max(scale_xy(meta))
    rows = _shown(token_set)
    for side in np.unique(token_set.leaf_size[rows]).tolist():
        yield max(1, round(side / scale)), rows[token_set.leaf_size[rows] == side]


def coords_file(
    meta: dict[str, Any],
    side0_px: int,
    coords: NDArray[np.int64],
    rows: NDArray[np.int64] | None = None,
    more: dict[str, Any] | None = None,
) -> memoryview:
    """The bytes of a `<slide>_patches.h5`: squares of one side, as TRIDENT and CLAM readers expect patches.

    Those readers know one patch size per file, so each side of leaves has a file of its own. The attributes say "read
    side x side pixels at level 0" in TRIDENT's and in CLAM's words, so both read exactly the leaf. An encoder resizes
    it as it likes.

    Args:
        meta: metadata of the token file.
        side0_px: side of the squares in level-0 pixels.
        coords: (N, 2) their top left in level-0 pixels.
        rows: (N,) the token file's rows of leaves.
        more: further attributes of `coords`.

    Returns:
        HDF5 with `coords` (N, 2) int64 and their attributes; with `rows` also `token_index` (N,), to join features
            again.
    """
    attributes = reader_attributes(meta, side0_px, side0_px, Fraction(1))
    attributes["target_magnification"] = attributes["level0_magnification"]
    attributes["downsampled_level_dim"] = attributes["level_dim"]
    image = io.BytesIO()
    with h5py.File(image, "w") as out:
        chunk = max(1, min(len(coords), 1024))
        made = out.create_dataset("coords", data=coords, chunks=(chunk, 2), track_times=False)
        if rows is not None:
            out.create_dataset("token_index", data=rows, chunks=(chunk,), track_times=False)
        made.attrs.update({**attributes, **(more or {})})
    return image.getbuffer()
