"""Lossless JPEG and JPEG-LS for pydicom through imagecodecs; what else scanners use pydicom decodes by itself.

`register` makes this module a plugin of pydicom's decoders, which asks for the names `is_available`,
`DECODER_DEPENDENCIES` and `decode_frame`. Never imports torch.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless

_NAME = "imagecodecs"
_SYNTAXES = (JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless)
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, (_NAME,))


def is_available(uid: str) -> bool:
    """Whether pydicom can decode a transfer syntax with this module."""
    return uid in _SYNTAXES


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """Return the samples of one frame as bytes, in words of the size that the data set allocates.

    Raises:
        ValueError: Not a gray frame of the size that the data set says.
    """
    lossless = runner.transfer_syntax in (JPEGLossless, JPEGLosslessSV1)
    frame: Any = imagecodecs.ljpeg_decode(src) if lossless else imagecodecs.jpegls_decode(src)
    if frame.shape != (runner.rows, runner.columns):
        raise ValueError(f"a frame of {frame.shape} samples instead of {(runner.rows, runner.columns)}")
    return bytes(np.ascontiguousarray(frame, dtype=f"<u{runner.bits_allocated // 8}").tobytes())


def register() -> None:
    """Let pydicom use this module for what it has no decoder for; safe to call again."""
    for decoder in map(get_decoder, _SYNTAXES):
        if not decoder.is_available:
            decoder.add_plugin(_NAME, (__name__, "decode_frame"))
