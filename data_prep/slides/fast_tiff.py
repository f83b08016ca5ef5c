"""Reads tiled TIFF and SVS several times as fast as OpenSlide: tifffile lists the tiles, imagecodecs decodes them.

`open_fast` first compares a fixed choice of the slide's tiles with OpenSlide, pixel for pixel. Where a level differs,
OpenSlide reads it: it interpolates levels of odd factors. Files of another kind stay with OpenSlide too.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from data_prep.slides.base import Box, ClosedError, Slide, SlideError, cells_under, paste
from data_prep.slides.memory import check_memory
from data_prep.slides.tiff import open_tiff
from data_prep.slides.vendors import OpenSlideSlide
from data_prep.system.files import one_line

CACHE_BYTES = 256 * 2**20  # decoded tiles: the sides of the last regions, which the next ones look at again
_ALIKE_BYTES = 8192  # tiles compressed to less are mostly background, of which many are the same
_ALIKE_KEPT = 32
_JPEG = 7
_OTHERS = (1, 5, 8, 32946, 33003, 33005, 50000)  # none, LZW, deflate, JPEG 2000 as Aperio writes it, zstd
_EOI = b"\xff\xd9"
_BLOCK = 8  # sides of a JPEG block
_MIDDLE = 128


class UnsuitableError(SlideError):
    """A sound slide that this reader does not show as OpenSlide does."""


class FastSlide(Slide):
    """The tiled levels of a TIFF, as OpenSlide shows them.

    Attributes:
        levels: where the tiles of each level lie.
        decoded_px: pixels decoded so far.
        decoded_tiles: file tiles decoded so far.
        read_bytes: bytes of tiles read so far.
    """

    reader = "fast"

    def __init__(self, path: Path, level_sizes_wh: list[tuple[int, int]], mpp: float | None) -> None:
        """Open the file; levels and mpp are what OpenSlide sees.

        Raises:
            UnsuitableError: some level is no tiled page of a kind that is read here.
            SlideError: no readable TIFF.
        """
        self.path = path
        self.level_sizes_wh = level_sizes_wh
        self.size_wh = level_sizes_wh[0]
        self.mpp = mpp
        self.decoded_px = self.decoded_tiles = self.read_bytes = 0
        self._slow: OpenSlideSlide | None = None
        self._slow_levels: set[int] = set()
        with open_tiff(path) as tiff:
            pages: list[Any] = list(tiff.pages)
            self.levels = [_TiledPage(path, _page_of(path, pages, size_wh)) for size_wh in level_sizes_wh]
        self._file: int | None = os.open(path, os.O_RDONLY)
        self._cache: OrderedDict[tuple[int, int], npt.NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._alike: OrderedDict[tuple[int, bytes], npt.NDArray[np.uint8]] = OrderedDict()

    def close(self) -> None:
        """Close the file and drop decoded tiles."""
        if self._slow is not None:
            self._slow.close()
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self.forget()

    def forget(self) -> None:
        """Drop decoded tiles and count from 0 again."""
        self._cache.clear()
        self._alike.clear()
        self._cached_bytes = 0
        self.decoded_px = self.decoded_tiles = self.read_bytes = 0

    def leave(self, levels: set[int], to: OpenSlideSlide) -> None:
        """Leave some levels to another reader, which is closed with this one."""
        self._slow, self._slow_levels = to, levels

    def tile_wh(self, level: int) -> tuple[int, int]:
        """As `Slide.tile_wh`."""
        self._check_level(level)
        if self._slow is not None and level in self._slow_levels:
            return self._slow.tile_wh(level)
        return self.levels[level].tile_wh

    def _tile_grid(self, level: int) -> tuple[int, int]:
        return self.tile_wh(level)

    def _read(self, level: int, x_px: int, y_px: int, w_px: int, h_px: int) -> npt.NDArray[np.uint8]:
        if self._file is None:
            raise ClosedError(f"{self.path}: read after close")
        if self._slow is not None and level in self._slow_levels:
            return self._slow.read(level, x_px, y_px, w_px, h_px)
        tile_w, tile_h = self.levels[level].tile_wh
        out = np.empty((h_px, w_px, 3), np.uint8)
        for column, row in cells_under(x_px, y_px, w_px, h_px, (tile_w, tile_h)):
            left, top = column * tile_w, row * tile_h
            tile = self._tile(level, row * self.levels[level].across + column)
            if not tile.strides[0] and len(set(tile[0, 0].tolist())) == 1:  # one shade of gray: quicker to fill
                rows = slice(max(0, top - y_px), top + tile_h - y_px)
                out[rows, max(0, left - x_px) : left + tile_w - x_px] = tile[0, 0, 0]
            else:
                paste(out, x_px, y_px, tile, left, top)
        return out

    def parts(
        self, level: int, x_px: int, y_px: int, w_px: int, h_px: int, done: Box | None = None
    ) -> Iterator[tuple[npt.NDArray[np.uint8], int, int]]:
        """Yield the file's tiles as they were decoded; tiles of one colour are broadcast. See `Slide.parts`.

        Tiles that nobody will ask for again are not kept. The next one is then decoded into memory that is still in the
        processor's cache, which saves a fifth of the time.
        """
        if self._file is None or (self._slow is not None and level in self._slow_levels):
            yield from super().parts(level, x_px, y_px, w_px, h_px)
            return
        x0, y0, x1, y1 = done or (0, 0, 0, 0)
        self._check_level(level)
        self._check_region(self.level_sizes_wh[level], x_px, y_px, w_px, h_px)
        tile_w, tile_h = self.levels[level].tile_wh
        for column, row in cells_under(x_px, y_px, w_px, h_px, (tile_w, tile_h)):
            x, y = column * tile_w, row * tile_h
            try:
                keep = x < x0 or y < y0 or x + tile_w > x1 or y + tile_h > y1
                tile = self._tile(level, row * self.levels[level].across + column, keep)
            except SlideError:  # `read` knows what to do with damage
                right, bottom = min(x + tile_w, x_px + w_px), min(y + tile_h, y_px + h_px)
                x, y = max(x, x_px), max(y, y_px)
                tile = self.read(level, x, y, right - x, bottom - y)
            yield tile, x, y
            del tile  # so that its memory is free before the next one is decoded

    def _tile(self, level: int, index: int, keep: bool = True) -> npt.NDArray[np.uint8]:
        """A decoded tile at its full size; the last few are kept, since neighbouring reads share them."""
        key = (level, index)
        if key in self._cache:
            if not keep:
                self._cached_bytes -= _size(self._cache[key])
                return self._cache.pop(key)
            self._cache.move_to_end(key)
            return self._cache[key]
        tile = self._decoded(level, index)
        if not keep:
            return tile
        self._cache[key] = tile
        self._cached_bytes += _size(tile)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return tile

    def _decoded(self, level: int, index: int) -> npt.NDArray[np.uint8]:
        # Read and decode, twice if need be.
        where = self.levels[level]
        offset, count = where.offsets[index], where.counts[index]
        if not count:
            return where.gap
        failure: Exception | None = None
        for _ in range(2):  # a network file system may fail once
            try:
                data = self._bytes(offset, count)
                small = (level, data) if count <= _ALIKE_BYTES else None
                if small is not None and small in self._alike:
                    self._alike.move_to_end(small)
                    return self._alike[small]
                tile = where.decode(data, index)
                if where.ends_early(tile):
                    self._ask_openslide(level, index)
            except Exception as error:  # imagecodecs has one exception class per codec
                check_memory(error, 2 * where.gap.nbytes)
                failure = error
                fresh = os.open(self.path, os.O_RDONLY)
                if self._file is not None:
                    os.close(self._file)
                self._file = fresh
                continue

            # Count the tile, and keep a small one: background comes again.
            self.decoded_tiles += 1
            self.decoded_px += tile.shape[0] * tile.shape[1]
            if small is not None:
                if (tile[0] == tile[0, 0]).all() and (tile == tile[0, 0]).all():
                    tile = np.broadcast_to(tile[0, 0].copy(), tile.shape)
                self._alike[small] = tile
                while len(self._alike) > _ALIKE_KEPT:
                    self._alike.popitem(last=False)
            return tile
        row, column = divmod(index, where.across)
        x, y, w, h = column * where.tile_wh[0], row * where.tile_wh[1], *where.tile_wh
        cause = one_line(failure) if failure else "unknown"
        raise SlideError(
            f"{self.path}: cannot read level {level}, region x={x} y={y} w={w} h={h}: {cause}"
        ) from failure

    def _ask_openslide(self, level: int, index: int) -> None:
        """Raise SlideError where OpenSlide, which heeds the decoder's warnings, cannot decode a tile either."""
        tile_w, tile_h = self.levels[level].tile_wh
        width, height = self.level_sizes_wh[level]
        x, y = index % self.levels[level].across * tile_w, index // self.levels[level].across * tile_h
        with OpenSlideSlide(self.path) as trusted:  # rarely needed: not kept
            trusted.read(level, x, y, min(tile_w, width - x), min(tile_h, height - y))

    def _bytes(self, offset: int, count: int) -> bytes:
        assert self._file is not None
        data = os.pread(self._file, count, offset)
        self.read_bytes += len(data)
        if len(data) < count:
            raise ValueError(f"the file ends {count - len(data)} bytes early")
        return data


def _size(tile: npt.NDArray[np.uint8]) -> int:
    """Bytes of a tile in memory. One broadcast colour takes next to none, but its cache entry does."""
    return tile.nbytes if tile.strides[0] else 1024


class _TiledPage:
    """Where the tiles of one page lie, and how they are decoded."""

    def __init__(self, path: Path, page: Any) -> None:
        self.tile_wh = (int(page.tilewidth), int(page.tilelength))
        width, height = int(page.imagewidth), int(page.imagelength)
        self.across = -(-width // self.tile_wh[0])
        down = -(-height // self.tile_wh[1])
        self.offsets = [int(offset) for offset in page.dataoffsets]
        self.counts = [int(count) for count in page.databytecounts]
        if len(self.offsets) != self.across * down or len(self.counts) != self.across * down:
            raise UnsuitableError(f"{path}: {len(self.offsets)} tiles are listed, {self.across * down} are needed")
        self._page = page
        self._tables = page.jpegtables
        self._jpeg = int(page.compression) == _JPEG
        # What the page says the stored colours are; both kinds are found in slides.
        self._stored = {6: "YCBCR", 2: "RGB"}[int(page.photometric)]
        self.gap = np.full((self.tile_wh[1], self.tile_wh[0], 3), 255, np.uint8)

    def decode(self, data: bytes, index: int) -> npt.NDArray[np.uint8]:
        """A tile of full size, (h, w, 3) uint8 RGB. Raises what the codec raises; ValueError for another shape."""
        tile: Any
        if self._jpeg:
            # The decoder makes up what is missing of a stream that ends early, so its end must be there.
            if _EOI not in data[-16:]:
                raise ValueError("its JPEG stream has no end")
            tile = imagecodecs.jpeg8_decode(data, tables=self._tables, colorspace=self._stored, outcolorspace="RGB")
        else:
            found: Any = self._page.decode(data, index, _fullsize=True)[0]
            tile = None if found is None else found[0]
        if tile is None or tile.shape != self.gap.shape or tile.dtype != np.uint8:
            shape = None if tile is None else tile.shape
            raise ValueError(f"a tile of shape {shape} instead of {self.gap.shape}")
        return np.asarray(tile)

    def ends_early(self, tile: npt.NDArray[np.uint8]) -> bool:
        """Whether a decoded JPEG tile looks as if its data ended before the last block.

        libjpeg then fills the rest with middle gray, and imagecodecs drops its warning. Flat gray in a sound tile looks
        the same, so this is a reason to look, not a verdict.
        """
        return self._jpeg and bool((tile[-_BLOCK:, -_BLOCK:] == _MIDDLE).all())


def _page_of(path: Path, pages: list[Any], size_wh: tuple[int, int]) -> Any:
    """The tiled page of that size. Raises UnsuitableError for none, several, or one of a kind that is not read here."""
    found = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == size_wh]
    if len(found) != 1:
        raise UnsuitableError(f"{path}: {len(found)} tiled pages of {size_wh[0]} x {size_wh[1]} pixels")
    page = found[0]
    photometric, compression = int(page.photometric), int(page.compression)
    plain = (
        page.dtype == np.uint8
        and page.samplesperpixel == 3
        and int(page.planarconfig) == 1
        and page.imagedepth == 1
        and photometric in (2, 6)
        and int(page.tags.valueof(274, 1)) == 1
    )
    if not plain or not (compression == _JPEG or (compression in _OTHERS and photometric == 2)):
        raise UnsuitableError(f"{path}: pages of compression {compression}, photometric {photometric} are left alone")
    return page


def open_fast(path: Path) -> FastSlide:
    """Open a slide if this reader shows it as OpenSlide does.

    It compares the levels, nine tiles of level 0, three of every other level, and the first tile that the file leaves
    out. The choice is fixed, so every rank decides alike.

    Raises:
        UnsuitableError: another kind of file, or one whose level 0 looks different.
        SlideError: it cannot be opened at all.
    """
    trusted = OpenSlideSlide(path)
    slide: FastSlide | None = None
    try:
        slide = FastSlide(path, trusted.level_sizes_wh, trusted.mpp)
        levels = range(len(slide.level_sizes_wh))
        different = {level for level in levels if not _agrees(trusted, slide, level)}
        if 0 in different:
            raise UnsuitableError(f"{path}: pixels of level 0 differ from OpenSlide's")
    except BaseException:
        trusted.close()
        if slide is not None:
            slide.close()
        raise
    if different:
        slide.leave(different, trusted)
    else:
        trusted.close()
    slide.forget()
    return slide


def _agrees(trusted: OpenSlideSlide, slide: FastSlide, level: int) -> bool:
    """Whether all tiles that both readers show are the same, and this reader misses at most half of them.

    One damaged tile that OpenSlide can show must not send the whole level, with its other damage, to OpenSlide.
    """
    verdicts = [_alike(trusted, slide, level, where) for where in _samples(slide, level)]
    return False not in verdicts and 2 * verdicts.count(None) <= len(verdicts)


def _alike(trusted: OpenSlideSlide, slide: FastSlide, level: int, where: Box) -> bool | None:
    """Whether both show the same, or neither shows anything; None where only OpenSlide does."""
    shown: list[npt.NDArray[np.uint8] | None] = []
    for reader in (trusted, slide):  # both strict: a class has that default
        try:
            shown.append(reader.read(level, *where))
        except SlideError:
            shown.append(None)
    a, b = shown
    if a is None or b is None:
        return True if a is b else None if b is None else False
    return np.array_equal(a, b)


def _samples(slide: FastSlide, level: int) -> list[Box]:
    """Rectangles (x, y, w, h) of the tiles that are compared."""
    tile_w, tile_h = slide.tile_wh(level)
    width, height = slide.level_sizes_wh[level]
    across, down = -(-width // tile_w), -(-height // tile_h)
    if level == 0:
        chosen = {(c, r) for c in (0, across // 2, across - 1) for r in (0, down // 2, down - 1)}
    else:
        chosen = {(0, 0), (across // 2, down // 2), (across - 1, down - 1)}
    counts = slide.levels[level].counts
    if 0 in counts:  # the first tile that the file leaves out
        chosen.add((counts.index(0) % across, counts.index(0) // across))
    return [
        (c * tile_w, r * tile_h, min(tile_w, width - c * tile_w), min(tile_h, height - r * tile_h))
        for c, r in sorted(chosen)
    ]
