"""Real slides with one fault put in: a tile that cannot be decoded, a directory entry that lies."""

import struct
from pathlib import Path

import numpy as np
import tifffile

from tests.helpers.slide_files import CMU


def damaged_slide(path: Path) -> list[int]:
    """A tiled TIFF of real texture with one tile of zeros; returns the tile."""
    rgb = np.asarray(tifffile.imread(CMU, key=0))[:1024, :1024]
    tifffile.imwrite(path, rgb, tile=(128, 128), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[8 * 3 + 5]
    data = bytearray(path.read_bytes())
    data[at : at + 60] = bytes(60)
    path.write_bytes(data)
    return [0, 5 * 128, 3 * 128, 128, 128]


def retagged(source: Path, target: Path, directory: int, tag: int, new: tuple[int, int, int, int]) -> Path:
    """A copy with one entry (tag, type, count, value) of a directory exchanged."""
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        start = tiff.pages[directory].offset
    count = struct.unpack_from("<H", data, start)[0]
    at = next(at for at in range(start + 2, start + 2 + 12 * count, 12) if struct.unpack_from("<H", data, at)[0] == tag)
    struct.pack_into("<HHII", data, at, *new)
    target.write_bytes(data)
    return target
