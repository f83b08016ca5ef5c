"""Results of finished steps of one slide, in a hidden folder beside its token file, so that a killed build goes on.

Every result is one .npz under a temporary name, renamed when it is complete. Nothing is flushed to the disk: a process
that is killed loses nothing by that, and after a power cut the checksums inside the .npz tell. Imports files only.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import remove_stale, temporary_name

_MANIFEST = "manifest.json"


class ScratchError(ValueError):
    """A step's result that is missing or damaged; one line that names the file."""


class Scratch:
    """The scratch folder of one slide.

    Attributes:
        folder: `OUT/.<stem>.work`.
    """

    def __init__(self, out: Path, stem: str) -> None:
        self.folder = out / f".{stem}.work"

    def manifest(self) -> dict[str, Any] | None:
        """What the results in the folder belong to; None if there are none."""
        try:
            found = json.loads((self.folder / _MANIFEST).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def begin(self, manifest: dict[str, Any]) -> None:
        """Start, or go on with results that belong to the same manifest; those of another are removed.

        Raises:
            OSError: The folder cannot be written.
        """
        if self.manifest() != manifest:
            self.remove()
            path = self.folder / _MANIFEST
            temporary = temporary_name(path)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(manifest))
                temporary.replace(path)
            except OSError as error:    # a full disk does not name the file
                raise OSError(error.errno, error.strerror, str(path)) from error
        remove_stale(self.folder, [".npz", ".json"])
        for path in self.folder.glob("*.npz"):
            if not _whole(path):
                path.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether the result `name` is there."""
        return self._path(name).exists()

    def save(self, name: str, **arrays: Any) -> None:
        """Keep a result: it is there whole or not at all.

        Raises:
            OSError: It cannot be written (disk full, quota, ...); names the file.
        """
        path = self._path(name)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as out:
                np.savez(out, **arrays)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def load(self, name: str, *keys: str) -> dict[str, NDArray[Any]]:
        """Arrays of a result, all or those named; only what is asked for is read.

        Raises:
            ScratchError: It is missing or damaged.
        """
        path = self._path(name)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in (keys or file.files) if key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ScratchError(f"{path}: not a whole result of an earlier step ({error}): build again") from error

    def drop(self, name: str) -> None:
        """Remove a result that no step needs any more."""
        self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with all results."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _whole(path: Path) -> bool:
    """Whether an .npz is complete and its checksums hold."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, ValueError, EOFError):
        return False
