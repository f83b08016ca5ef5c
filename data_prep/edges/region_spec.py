"""What regions of a frame have in common, and what a scan of one keeps until thresholds are known. Data only.

Must not import readers, files or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.edges import AUTO_PERCENT
from data_prep.edges.canny import MAX_MAGNITUDE, REACH_PX
from data_prep.edges.kernels.components import pixels_of
from data_prep.system.powers_of_two import is_power_of_two

__all__ = ["BYTE", "WHITE", "Maxima", "Parts", "Reader", "Rectangle", "RegionSpec", "base_px"]

Reader = Callable[[int, int, int, int], NDArray[np.uint8]]
Rectangle = tuple[int, int, int, int]
# As a reader, in pieces: (C-contiguous pixels or one colour broadcast, x, y of their top left). They may reach beyond
# the rectangle and cover it, each pixel once. The last argument is a rectangle (x0, y0, x1, y1) whose pixels are not
# asked for again.
Parts = Callable[[int, int, int, int, Rectangle], Iterable[tuple[NDArray[np.uint8], int, int]]]

WHITE = 255
BYTE = 255
_SMALL_FRAME_PX = 16384
_UNIT_PX = 512  # what is white and without edges is known in steps of this, or of a cell if that is smaller


@dataclass(frozen=True)
class RegionSpec:
    """What the regions of one frame have in common.

    Attributes:
        size_px: side R of the frame.
        content_wh: width and height of the content at the frame's top left; the rest is white padding.
        patch: side p of the smallest leaf, a power of two.
        blur: side of the Gaussian in pixels, odd, 1 for none; None where no edges are wanted (uniform patching).
        thresholds: Canny's (lo, hi), or "auto".
        side_px: side of the regions, a power of two, at least `patch`, at most `size_px`.
        classes: K, foreground classes of the mask; 0 without one.
        auto_percent: of "auto", see `edges.auto_thresholds`.
    """

    size_px: int
    content_wh: tuple[int, int]
    patch: int
    blur: int | None
    thresholds: tuple[int, int] | Literal["auto"]
    side_px: int
    classes: int = 0
    auto_percent: int = AUTO_PERCENT

    def __post_init__(self) -> None:
        if not is_power_of_two(self.side_px) or not self.patch <= self.side_px <= self.size_px:
            raise ValueError(f"a region of {self.side_px} px is no power of two from {self.patch} to {self.size_px}")

    @property
    def halo(self) -> int:
        """Pixels around a region that its edges depend on."""
        return 0 if self.blur is None else self.blur // 2 + REACH_PX

    @property
    def end_wh(self) -> tuple[int, int]:
        """Beyond this corner all is white and without edges: content, halo, and the rest of the last cell."""
        unit = min(self.patch, _UNIT_PX)
        ends = (-(-(content + self.halo) // unit) * unit for content in self.content_wh)
        width, height = (min(self.size_px, end) for end in ends)
        return width, height


def base_px(spec: RegionSpec) -> int:
    """Side of the squares whose sums a scan keeps: 8, or 4 in frames whose leaves are small; less in tiny regions.

    Leaves with smaller cells have their pixels read again. Squares of 4 take four times the room on the disk.
    """
    return min(8 if spec.size_px > _SMALL_FRAME_PX else 4, spec.side_px)


@dataclass(frozen=True)
class Maxima:
    """Pixels of a region that Canny keeps above a low enough threshold, until the thresholds are known.

    Attributes:
        blocks: (n, 4) int64, rectangle (x, y, w, h) of each block in the frame.
        start: (n + 1,) int64, where the blocks' pixels begin in what follows.
        ahead: (m,) uint8, see `kernel_components.steps_of`, of y * w + x in the block.
        far_start: (n + 1,) int64, where the blocks' rows begin in `far`.
        far: (k, 2) uint32.
        magnitude: (b,) uint8, block by block either the L1 magnitudes, 2 bytes each, or 1 byte each: what is above
            `least`, 255 for 255 and more.
        least: (n,) int64, -1 for blocks with 2 bytes a pixel.
        above: () int64, all with larger magnitudes than this are there.
    """

    blocks: NDArray[np.int64]
    start: NDArray[np.int64]
    ahead: NDArray[np.uint8]
    far_start: NDArray[np.int64]
    far: NDArray[np.uint32]
    magnitude: NDArray[np.uint8]
    least: NDArray[np.int64]
    above: NDArray[np.int64]

    def serves(self, lo: int, hi: int) -> bool:
        """Whether these thresholds can be told from what is there."""
        narrow = self.least[self.least >= 0]
        return lo >= int(self.above) and hi < BYTE + int(narrow.min(initial=MAX_MAGNITUDE))

    def block(self, i: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16], int]:
        """Pixels (y * w + x, ascending) of a block, their magnitudes less a number, and that number."""
        here = slice(*self.start[i : i + 2].tolist())
        pixel = np.empty(here.stop - here.start, np.uint32)
        pixels_of(self.ahead[here], self.far[slice(*self.far_start[i : i + 2].tolist())], pixel)
        begin = int((np.diff(self.start[: i + 1]) * np.where(self.least[:i] < 0, 2, 1)).sum())
        if self.least[i] < 0:
            return pixel, self.magnitude[begin : begin + 2 * len(pixel)].copy().view(np.uint16), 0
        return pixel, self.magnitude[begin : begin + len(pixel)].astype(np.uint16), int(self.least[i])
