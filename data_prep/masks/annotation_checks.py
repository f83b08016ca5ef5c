"""What a reader of annotations should be told about them: things left out, and rings that cut holes into each other.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.masks.polygons import Polygons, Ring, Shape

_SHOWN = 3
_GRID_PX = 256  # both rings are drawn on so many pixels of what their boxes share
_PAIRS = 500


def left_out_note(left_out: Sequence[str]) -> list[str]:
    """One line about things that were drawn but have no area; [] if there are none.

    Args:
        left_out: what each of them is, e.g. "annotation 1, region 4 (2 vertices)".
    """
    if not left_out:
        return []
    many = len(left_out)
    what = "1 thing drawn has no area and is" if many == 1 else f"{many} things drawn have no area and are"
    shown = "; ".join(left_out[:_SHOWN]) + ("; ..." if len(left_out) > _SHOWN else "")
    return [f"{what} left out: {shown}"]


def overlap_note(name: str, rings: Sequence[Ring]) -> list[str]:
    """One line if rings of one ImageScope layer overlap that are not marked as negative, else [].

    By the even-odd rule, which ImageScope's files ask for, what lies in two of them is outside.

    Args:
        name: what the layer is called.
        rings: its rings.
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
    """Whether two rings share any of a grid of points inside a box."""
    scale = _GRID_PX / np.maximum(high - low, 1e-9)
    inside = [
        Polygons([Shape(1, [Ring((ring.xy - low) * scale)])]).draw(0, 0, _GRID_PX, _GRID_PX) != 0 for ring in (a, b)
    ]
    return bool((inside[0] & inside[1]).any())
