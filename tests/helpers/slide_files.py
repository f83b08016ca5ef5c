"""Real slides and small writers that the tests of the readers share."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_prep.slides.base import SlideError
from data_prep.slides.open import open_slide
from tests.helpers.repository import GLOMERULI, WSI

CMU = WSI / "CMU-1-Small-Region.svs"
TCGA = WSI / "TCGA-CR-7395-01A-01-TS1.svs"
KIDNEY = GLOMERULI / "images" / "10003.jpg"


def whole(path: Path, reader: str = "auto") -> np.ndarray:
    with open_slide(path, reader, strict=True) as slide:
        return slide.read(0, 0, 0, *slide.size_wh)


def failure(path: Path, reader: str = "auto") -> str:
    """The one line that opening and reading the file ends with."""
    with pytest.raises(SlideError) as caught:
        whole(path, reader)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def write_png(path: Path, width: int, height: int, bit_depth: int, rows: bytes) -> Path:
    """A gray PNG from its filtered rows; works for sizes that no library would write here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path
