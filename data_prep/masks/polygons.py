"""Draws polygons in level-0 pixels as class ids, rectangle by rectangle.

A pixel belongs to a shape when its centre does, by the even-odd rule over the shape's rings. Crossings are computed in
slide coordinates, so no pixel depends on the rectangle that was asked for. A centre on a ring is inside where the ring
bounds the shape on the left or from above. So shapes with a common border share no pixel and leave none out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_CHUNK = 64  # edges that share an entry of the index
_AREA_PX = 4 * 2**20  # pixels drawn at once
_EVENTS = 1 << 20  # crossings of rings and rows held at once


class Ring(NamedTuple):
    """One closed line.

    Attributes:
        xy: (n, 2) float64 vertices in level-0 pixels; the last is joined to the first.
        negative: True for a line around what is left out.
    """

    xy: npt.NDArray[np.float64]
    negative: bool = False


class Shape(NamedTuple):
    """Rings that are filled together, by the even-odd rule; what lies in negative rings only is not filled.

    The class id is 0 to 255; 0 erases.
    """

    class_id: int
    rings: Sequence[Ring]


class Polygons:
    """Shapes ready to be drawn: a class is the union of its shapes, higher ids lie over lower ones, 0 lies over all.

    Vertices stay in memory (16 bytes each), with one index entry per 64 edges: their rows, and the columns of the ring.
    A rectangle touches only rings whose bounding box it meets, and of these only the edges of its rows. `notes` are one
    line each for the reader of the file.
    """

    def __init__(self, shapes: Sequence[Shape], notes: Sequence[str] = ()) -> None:
        """Index the shapes; rings of fewer than three vertices have no area and are dropped."""
        self.notes = tuple(notes)
        ordered = sorted(shapes, key=lambda shape: shape.class_id or 256)
        rings = [(i, ring) for i, shape in enumerate(ordered) for ring in shape.rings if len(ring.xy) >= 3]
        self._shape_class = np.array([shape.class_id for shape in ordered], np.int64)
        self._ring_shape = np.array([i for i, _ in rings], np.int64)
        self._ring_negative = np.array([ring.negative for _, ring in rings], np.bool_)
        self._shape_mixed = np.zeros(len(ordered), np.bool_)  # has negative rings
        self._shape_mixed[self._ring_shape[self._ring_negative]] = True
        edges = np.array([len(ring.xy) for _, ring in rings], np.int64)
        starts = np.concatenate([[0], np.cumsum(edges + 1)])[:-1].astype(np.int64)
        closed = [part for _, ring in rings for part in (ring.xy, ring.xy[:1])]
        self._xy = np.ascontiguousarray(np.concatenate(closed).T) if closed else np.zeros((2, 0))
        self._index(starts, edges)

    def _index(self, starts: Ints, edges: Ints) -> None:
        """Bounding columns per ring, rows per chunk of edges; edge e joins vertices e and e + 1."""
        chunks = -(-edges // _CHUNK)
        ring = np.repeat(np.arange(len(edges)), chunks)
        local = np.arange(len(ring)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._chunk_ring = ring
        self._chunk_start = starts[ring] + _CHUNK * local
        self._chunk_edges = np.minimum(_CHUNK, edges[ring] - _CHUNK * local)
        xs, ys = self._xy
        if not len(edges):
            self._ring_x = self._chunk_y = np.zeros((2, 0))
            return
        self._ring_x = np.stack([np.minimum.reduceat(xs, starts), np.maximum.reduceat(xs, starts)])
        low, high = np.minimum(ys[:-1], ys[1:]), np.maximum(ys[:-1], ys[1:])
        joints = starts[1:] - 1  # from the end of one ring to the next: no edge
        low[joints], high[joints] = np.inf, -np.inf
        at = self._chunk_start
        self._chunk_y = np.stack([np.minimum.reduceat(low, at), np.maximum.reduceat(high, at)])

    def draw(self, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        """Return the class ids of a rectangle as (h, w) uint8; 0 where no shape is."""
        out = np.zeros((h_px, w_px), np.uint8)
        rows = max(1, _AREA_PX // w_px)
        for top in range(0, h_px, rows):
            self._draw(out[top : top + rows], x_px, y_px + top)
        return out

    def _draw(self, out: npt.NDArray[np.uint8], x: int, y: int) -> None:
        height, width = out.shape
        edge, ring = self._edges(x, y, width, height)
        if not len(edge):
            return
        ys = self._xy[1]
        ends = np.ceil(np.stack([ys[edge], ys[edge + 1]]) - 0.5)  # rows whose centres lie at or below each end
        ends = np.clip(ends, y, y + height).astype(np.int64)
        first = ends.min(axis=0)
        count = ends.max(axis=0) - first
        if count.sum() > _EVENTS and height > 1:
            half = height // 2
            self._draw(out[:half], x, y)
            self._draw(out[half:], x, y + half)
            return
        kept = count > 0
        if kept.any():
            self._fill(out, x, y, edge[kept], ring[kept], first[kept], count[kept])

    def _edges(self, x: int, y: int, w: int, h: int) -> tuple[Ints, Ints]:
        """Edges that may cross rows of the rectangle, and the ring of each."""
        meets = (self._chunk_y[0] <= y + h) & (self._chunk_y[1] >= y)
        reaches = (self._ring_x[0] <= x + w) & (self._ring_x[1] >= x)
        chosen = np.flatnonzero(meets & reaches[self._chunk_ring])
        many = self._chunk_edges[chosen]
        offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        return np.repeat(self._chunk_start[chosen], many) + offset, np.repeat(self._chunk_ring[chosen], many)

    def _fill(
        self, out: npt.NDArray[np.uint8], x: int, y: int, edge: Ints, ring: Ints, first: Ints, count: Ints
    ) -> None:
        """Fill between the crossings of edges with the centre lines of rows.

        A crossing at xc acts from the first pixel whose centre is at or right of it, ceil(xc - 1/2). Crossings left of
        the rectangle act from its first column. A ring has an even number of crossings in a row. So in every rectangle
        the n-th crossing of a shape's row enters it (n odd) or leaves it.
        """
        # Where edges cross the centre lines, as places in the rectangle.
        height, width = out.shape
        which = np.repeat(np.arange(len(edge)), count)
        row = np.arange(len(which)) - np.repeat(np.cumsum(count) - count - first, count)
        column = np.ceil(self._crossings(edge, which, row) - 0.5) - x
        area = height * (width + 1)
        flat = (row - y) * (width + 1) + np.clip(column, 0, width).astype(np.int64)
        of_ring = ring[which]

        # Entries and exits of every shape in order, then one class after the other.
        if self._shape_mixed[self._ring_shape[np.unique(ring)]].any():
            key, change = self._with_negative(of_ring * area + flat, area)
        else:
            key = np.sort(self._ring_shape[of_ring] * area + flat)
            change = np.ones(len(key), np.int32)
            change[1::2] = -1
        classes = self._shape_class[key // area]
        edges_of_runs = np.flatnonzero(np.diff(classes)) + 1
        for start, stop in zip([0, *edges_of_runs], [*edges_of_runs, len(key)], strict=True):
            depth = np.zeros(area, np.int32)
            np.add.at(depth, key[start:stop] % area, change[start:stop])
            inside = np.cumsum(depth.reshape(height, width + 1)[:, :width], axis=1) > 0
            out[inside] = classes[start]

    def _crossings(self, edge: Ints, which: Ints, row: Ints) -> npt.NDArray[np.float64]:
        """Where edge[which] meets the centre line of `row`, from its upper end so that direction does not matter."""
        xs, ys = self._xy
        upper = np.where(ys[edge] <= ys[edge + 1], edge, edge + 1)
        lower = 2 * edge + 1 - upper
        slope = (xs[lower] - xs[upper]) / (ys[lower] - ys[upper])
        return np.asarray(xs[upper][which] + (row + 0.5 - ys[upper][which]) * slope[which])

    def _with_negative(self, key: Ints, area: int) -> tuple[Ints, npt.NDArray[Any]]:
        """Crossings in order of shape, row and column, with +1 where the shape begins and -1 where it ends.

        A place is inside if an odd number of the shape's rings holds it, at least one of them not negative. `key` is
        ring * area + place of each crossing, in any order. Returns sorted shape * area + place, and the changes, (n,)
        each.
        """
        key = np.sort(key)
        ring, place = np.divmod(key, area)
        leaves = np.arange(len(key)) & 1
        negative = self._ring_negative[ring].astype(np.int64)
        order = np.sort(4 * (self._ring_shape[ring] * area + place) + 2 * negative + leaves)
        step = 1 - 2 * (order & 1)
        negative = order >> 1 & 1
        positives, negatives = np.cumsum(step * (1 - negative)), np.cumsum(step * negative)
        inside = ((positives + negatives) & 1) * (positives > 0)
        return order >> 2, np.diff(inside, prepend=0)
