"""Keeps results of finished steps of one slide in a hidden folder beside its token file, for the next build.

The folder's name tells what the results belong to (slide, mask, parameters, code, side of the regions). So builds that
differ in any of these never see each other's results, even at the same time in one folder. The same build on several
hosts shares the folder without talking: any host's result is the same, and one rename puts it in place. The first build
with a token file removes the folder. The others then fail with one line, and find the token file when they are started
again.
Every result is one file, renamed from a temporary name when it is complete. Nothing is flushed to the disk: a killed
process loses nothing by that, and after a power cut the checksums tell. A file is a line of JSON, {name: [type, shape,
CRC-32]}, then the arrays, each from a multiple of 64 bytes on. An .npz would copy every array once more and check it at
every look, a tenth of a build's time.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from data_prep.system.files import remove_stale, replacing, same_host, writer_lives, writer_name

_MANIFEST = "manifest.json"
_SUFFIX = ".arrays"
_ALIGN = 64


class ScratchError(ValueError):
    """A step's result that is missing or damaged; one line that names the file."""


class BusyError(ValueError):
    """Another build is working on the same; one line says who."""


def scratch_key(about: dict[str, Any], side_px: int) -> str:
    """The key of a scratch folder: a hash of what decides the results, and the regions' side."""
    return f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}-{side_px}"


def scratch_sides(out: Path, stem: str, about: dict[str, Any]) -> list[int]:
    """Sides of the regions for which an earlier build with the same `about` left results."""
    start = f".{stem}.{scratch_key(about, 0)[:-1]}"
    found = (path.name[len(start) : -len(".work")] for path in out.glob(".*.work") if path.name.startswith(start))
    return sorted(int(side) for side in found if side.isdigit())


def remove_scratch(out: Path, stem: str, but: Path | None = None) -> list[Path]:
    """Remove a slide's scratch folders, except `but`, whose build does not live (`files.writer_lives`); return them."""
    removed = []
    for folder in out.glob(".*.work"):
        if folder == but or folder.name[1 : -len(".work")].rpartition(".")[0] != stem:
            continue
        owner, newest_s = _owner(folder) or ("", 0.0)  # without a manifest it is of no use to anyone
        if not writer_lives(owner, newest_s):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def discard(folder: Path) -> None:
    """Remove a scratch folder that other ranks may still write to; its name goes first, so that nothing new gets in."""
    gone = folder.with_name(f"{folder.name.removesuffix('.work')}-gone.work")
    try:
        folder.rename(gone)
    except FileNotFoundError:  # another rank was first
        return
    except OSError:
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)


def _owner(folder: Path) -> tuple[str, float] | None:
    """Who began or took over a folder, and when it was last written to; None without a manifest."""
    try:
        owner = str(json.loads((folder / _MANIFEST).read_text())["owner"])
        return owner, max(path.stat().st_mtime for path in folder.iterdir())
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Scratch:
    """The scratch folder of one slide, `OUT/.<stem>.<key>.work`."""

    def __init__(self, out: Path, stem: str, key: str) -> None:
        self.folder = out / f".{stem}.{key}.work"

    def begin(self) -> None:
        """Start, or go on with the whole results of an earlier build. Raises OSError if it cannot write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / _MANIFEST, durable=False) as out:
            out.write(json.dumps({"owner": writer_name()}).encode())
        remove_stale(self.folder, [_SUFFIX, ".json"])
        for result in self.folder.glob(f"*{_SUFFIX}"):
            if not _whole(result):
                result.unlink(missing_ok=True)

    def worked_on_by(self) -> str | None:
        """The process of this host that builds from this folder now, None if none does.

        A process of another host cannot be asked, and need not be: see the top of this file. So the next job of a chain
        goes on at once, on whatever host.
        """
        owner, newest_s = _owner(self.folder) or ("", 0.0)
        if not same_host(owner) or not writer_lives(owner, newest_s):
            return None
        host, _, pid = owner.rpartition("-")
        return f"process {pid} on {host}"

    def stamp(self, name: str) -> int:
        """When the result `name` was made, in ns; 0 if it is not there."""
        try:
            return self._path(name).stat().st_mtime_ns
        except OSError:
            return 0

    def has(self, name: str) -> bool:
        """Whether the result `name` is there."""
        return self._path(name).exists()

    def save(self, name: str, **arrays: Any) -> None:
        """Keep a result, whole or not at all. Raises OSError, which names the file, if it cannot be written."""
        with replacing(self._path(name), durable=False) as out:
            _write(out, {key: np.asarray(value, order="C") for key, value in arrays.items()})

    def load(self, name: str, *keys: str) -> dict[str, NDArray[Any]]:
        """Arrays of a result, all or only the named ones. Raises ScratchError if it is missing or damaged."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                places = _places(file)
                return {key: _read(file, places[key]) for key in (keys or places) if key in places}
        except (OSError, ValueError) as error:
            raise ScratchError(f"{path}: not a whole result of an earlier step ({error}): build again") from error

    def drop(self, name: str) -> None:
        """Remove a result that no step needs any more."""
        self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder with all results."""
        discard(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


@dataclass(frozen=True)
class _Place:
    """Where an array lies in a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    checksum: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)


def _write(out: IO[bytes], arrays: dict[str, NDArray[Any]]) -> None:
    about = {key: [array.dtype.str, array.shape, _checksum(array)] for key, array in arrays.items()}
    out.write(json.dumps(about).encode() + b"\n")
    for array in arrays.values():
        out.write(bytes(-out.tell() % _ALIGN))
        out.write(_bytes(array).data)


def _places(file: BinaryIO) -> dict[str, _Place]:
    """Where the arrays of a file are. Raises ValueError if the file is not one of these, or ends early."""
    try:
        about = json.loads(file.readline(1 << 16))
        at, places = file.tell(), dict[str, _Place]()
        for key, (dtype, shape, checksum) in about.items():
            places[key] = _Place(np.dtype(dtype), tuple(map(int, shape)), int(checksum), at + -at % _ALIGN)
            at = places[key].end
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError("no list of arrays") from error
    if file.seek(0, 2) < at:
        raise ValueError("it ends early")
    return places


def _read(file: BinaryIO, place: _Place) -> NDArray[Any]:
    array = np.empty(place.shape, place.dtype)
    file.seek(place.start)
    if file.readinto(_bytes(array)) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it ends early")
    return array


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


def _checksum(array: NDArray[Any]) -> int:
    return int(imagecodecs.deflate_crc32(cast(Any, _bytes(array)))) if array.nbytes else 0


def _whole(path: Path) -> bool:
    """Whether a result is complete and its checksums hold."""
    try:
        with path.open("rb") as file:
            return all(_checksum(_read(file, place)) == place.checksum for place in _places(file).values())
    except (OSError, ValueError):
        return False
