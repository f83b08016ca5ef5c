"""Files that HDF5 writes to the disk itself, too large to be made in memory first: `store` uses it for large slides.

HDF5 crashes the process when the disk fills under it, so it gets a file object that never fails, and what went wrong
is raised when it has done. Must not import h5py or anything of the slides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from data_prep.system.files import replacing

_BLOCK = 1 << 20


class Spill:
    """A binary file for HDF5 to write, which never sees it fail: the first error is kept, and what follows it dropped.

    Attributes:
        error: the first error, or None.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop after an error."""
        self._guarded(lambda: self._file.write(data))
        return len(data)

    def truncate(self, size: int) -> int:
        """Set the length of the file."""
        self._guarded(lambda: self._file.truncate(size))
        return size

    def flush(self) -> None:
        """Hand everything to the system."""
        self._guarded(self._file.flush)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; that may write what was held back."""
        self._guarded(lambda: self._file.seek(offset, whence))
        return self._file.tell() if self.error is None else offset

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell() if self.error is None else 0

    def read(self, size: int = -1) -> bytes:
        """Read what was written before; nothing after an error. HDF5 takes only objects that have this for files."""
        return self._file.read(size) if self.error is None else b""

    def readinto(self, buffer: Any) -> int:
        """Read what was written before; zeros after an error."""
        memoryview(buffer).cast("B")[:] = bytes(len(buffer))
        if self.error is None:
            self._file.readinto(buffer)  # type: ignore[attr-defined]
        return len(buffer)

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error


def write_spilled(path: Path, fill: Callable[[Any], None], head_bytes: int, head: Callable[[int, str], bytes]) -> None:
    """Write a file whose first bytes tell of the rest, readable whole or not at all.

    Args:
        path: The file.
        fill: Writes all but the head into a binary file object.
        head_bytes: Length of the head.
        head: The head, from the number of bytes after it and their SHA-256.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    with replacing(path) as out:
        spill = Spill(out)
        try:
            fill(spill)
        except Exception:  # what HDF5 makes of zeros where it wrote something is of no interest
            if spill.error is None:
                raise
        if spill.error is not None:
            raise spill.error
        digest, size = hashlib.sha256(), 0
        out.seek(head_bytes)
        while block := out.read(_BLOCK):
            digest.update(block)
            size += len(block)
        out.seek(0)
        out.write(head(size, digest.hexdigest()))
