"""The pack format: files one after another in a few aligned shards, with one checked index.

Thousands of readers on a parallel file system get one small index, a few large files that never change, and any packed
file by one read at a known place. The index is written last and atomically, so a folder without one is no pack. Names
are sorted, and nothing in a pack depends on when it was made.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.system.files import replacing, sha256_of, write_atomic

INDEX = "pack.json"
ALIGN = 4096
SCHEMA = 1
_BLOCK = 1 << 20


class PackError(ValueError):
    """A pack that cannot be made or read; one line that names the file."""


class PackArgumentError(PackError):
    """A folder or name that was asked for and does not fit; nothing was read or written."""


class Entry(NamedTuple):
    """Where one file lies: `size` bytes from `offset` of shard `shard`, with their SHA-256."""

    name: str
    shard: int
    offset: int
    size: int
    sha256: str


class Shard(NamedTuple):
    """One large file of a pack."""

    size: int
    sha256: str


class Index(NamedTuple):
    """What is in a pack: entries by name, the shards, and SHA-256 of the small files beside them by name."""

    entries: dict[str, Entry]
    shards: list[Shard]
    beside: dict[str, str]


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number `shard` of the pack `folder` lies."""
    return folder / f"shard-{shard:05d}.pack"


def is_pack(folder: Path) -> bool:
    """Whether a folder is a finished pack."""
    return (folder / INDEX).is_file()


def write_pack(
    files: dict[str, Path],
    folder: Path,
    shard_bytes: int,
    beside: dict[str, Path] | None = None,
    tell: Callable[[int], None] | None = None,
) -> Index:
    """Write a pack; after a kill the next call keeps whole shards of the same files.

    Args:
        files: Name to path of what is packed.
        shard_bytes: Size at which a shard is full; a larger file has a shard to itself.
        beside: Name to path of small files that are copied as they are.
        tell: Called with the bytes of every shard that is done.

    Raises:
        PackArgumentError: `folder` already holds a pack, or something else.
        PackError: An impossible name; a file that changes meanwhile.
        OSError: A file, which is named, cannot be read or written; no index and no temporary file is left.
    """
    # Check the names and the folder.
    beside = beside or {}
    for name in (*files, *beside):
        _check_name(folder, name)
    if is_pack(folder):
        raise PackArgumentError(f"{folder}: already holds a pack")
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".shard-", ".pack.json")) and ".tmp-" in entry.name:
            entry.unlink()
        elif not entry.name.startswith("shard-") and entry.name not in beside:
            raise PackArgumentError(f"{entry}: is in the way; a pack needs a folder of its own")

    # Write what is not there yet, the index last.
    plan = _plan({name: path.stat().st_size for name, path in files.items()}, shard_bytes)
    entries: dict[str, Entry] = {}
    shards: list[Shard] = []
    for number, names in enumerate(plan):
        found = _kept(files, names, number, folder) or _write_shard(files, names, number, folder)
        entries |= {entry.name: entry for entry in found[0]}
        shards.append(found[1])
        if tell is not None:
            tell(sum(entry.size for entry in found[0]))
    copied = {}
    for name, path in sorted(beside.items()):
        data = path.read_bytes()
        write_atomic(folder / name, data)
        copied[name] = hashlib.sha256(data).hexdigest()
    index = Index(entries, shards, copied)
    write_atomic(folder / INDEX, _encode(index))
    for left in folder.glob("shard-*"):
        if left.suffix == ".json" or left not in {shard_path(folder, n) for n in range(len(shards))}:
            left.unlink()
    return index


def _check_name(folder: Path, name: str) -> None:
    if not name or name in (".", "..", INDEX) or "/" in name or "\0" in name or name.startswith("shard-"):
        raise PackError(f"{folder}: {name!r} cannot be the name of a packed file")


def _plan(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Names of every shard."""
    plan: list[list[str]] = []
    filled = 0
    for name in sorted(sizes):
        size = -(-sizes[name] // ALIGN) * ALIGN
        if not plan or (filled and filled + size > shard_bytes):
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def _note_path(folder: Path, number: int) -> Path:
    return shard_path(folder, number).with_suffix(".json")


def _kept(files: dict[str, Path], names: list[str], number: int, folder: Path) -> tuple[list[Entry], Shard] | None:
    """A shard of an earlier try, if it is whole and holds these files as they are now."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note_path(folder, number).read_text())
        entries, shard = [Entry(*row) for row in note["entries"]], Shard(*note["shard"])
        same = [entry.name for entry in entries] == names and note["stamps"] == [_stamp(files[name]) for name in names]
        path = shard_path(folder, number)
        if same and path.stat().st_size == shard.size and sha256_of(path) == shard.sha256:
            return entries, shard
    return None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _write_shard(files: dict[str, Path], names: list[str], number: int, folder: Path) -> tuple[list[Entry], Shard]:
    path = shard_path(folder, number)
    entries, whole, offset = [], hashlib.sha256(), 0
    stamps = [_stamp(files[name]) for name in names]
    with replacing(path) as out:  # durable: the index must never be there before its shards
        for name in names:
            digest, start = hashlib.sha256(), offset
            with files[name].open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    whole.update(block)
                    offset += out.write(block)
            entries.append(Entry(name, number, start, offset - start, digest.hexdigest()))
            fill = bytes(-offset % ALIGN)
            whole.update(fill)
            offset += out.write(fill)
    for name, stamp in zip(names, stamps, strict=True):
        if _stamp(files[name]) != stamp:
            raise PackError(f"{files[name]}: changed while it was packed")
    shard = Shard(offset, whole.hexdigest())
    note = {"entries": entries, "shard": shard, "stamps": stamps}
    write_atomic(_note_path(folder, number), json.dumps(note).encode())
    return entries, shard


def _encode(index: Index) -> bytes:
    body = {"entries": list(index.entries.values()), "shards": index.shards, "beside": index.beside}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"schema": SCHEMA, "sha256": digest, **body}, sort_keys=True).encode()


def read_index(folder: Path) -> Index:
    """The index of a pack, kept in memory so that thousands of reads cost one.

    Raises:
        PackArgumentError: No pack.
        PackError: Its index is not what was written.
    """
    path = folder / INDEX
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        what = "not a pack" if folder.exists() else "no such folder"
        raise PackArgumentError(f"{folder}: {what}" + (f" (no {INDEX} in it)" if folder.is_dir() else "")) from None
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}") from None
    return _read_index(path, (stat.st_size, stat.st_mtime_ns))


@lru_cache(8)
def _read_index(path: Path, stamp: tuple[int, int]) -> Index:  # noqa: ARG001
    try:
        found: Any = json.loads(path.read_bytes())
        body = {key: found[key] for key in ("entries", "shards", "beside")}
        if found["schema"] != SCHEMA:
            raise PackError(f"{path}: schema {found['schema']}, this code reads {SCHEMA}: pack again")
        if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != found["sha256"]:
            raise PackError(f"{path}: does not match its checksum")
        entries = [Entry(*row) for row in body["entries"]]
        shards = [Shard(*row) for row in body["shards"]]
        beside = dict(body["beside"])
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}") from None
    except PackError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PackError(f"{path}: not the index of a pack") from None
    for name in (*(entry.name for entry in entries), *beside):
        _check_name(path, name)
    if len({entry.name for entry in entries}) < len(entries):
        raise PackError(f"{path}: a name is listed twice")
    return Index({entry.name: entry for entry in entries}, shards, beside)


def check_pack(folder: Path) -> list[str]:
    """Faults of a pack's shards and small files, one line each. Raises PackError if the index is damaged."""
    index = read_index(folder)
    faults = []
    for number, shard in enumerate(index.shards):
        path = shard_path(folder, number)
        if not path.is_file():
            faults.append(f"{path}: is missing")
        elif path.stat().st_size != shard.size:
            faults.append(f"{path}: has {path.stat().st_size} of {shard.size} bytes")
        elif sha256_of(path) != shard.sha256:
            faults.append(f"{path}: content does not match its checksum")
    return faults + [fault for name, digest in index.beside.items() if (fault := fault_of(folder / name, digest))]


def fault_of(path: Path, sha256: str) -> str | None:
    """The fault of a small file beside the shards, None if it is as it was packed."""
    return None if path.is_file() and sha256_of(path) == sha256 else f"{path}: is missing or changed"


class PackedFile(io.RawIOBase):
    """One packed file, opened for reading as if it lay by itself. It reads at its own position (pread)."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        """Open the shard. Raises PackError if it is missing or cut off."""
        super().__init__()
        self._path, self._entry, self._at = shard_path(folder, entry.shard), entry, 0
        self._file = -1
        try:
            self._file = os.open(self._path, os.O_RDONLY)
            size = os.fstat(self._file).st_size
        except OSError as error:
            raise PackError(f"{self._path}: {error.strerror}") from None
        if size < entry.offset + entry.size:
            self.close()
            end = entry.offset + entry.size
            raise PackError(f"{self._path}: cut off, {entry.name} reaches to byte {end} of {size}")

    def readable(self) -> bool:
        """Always."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        view = memoryview(buffer).cast("B")
        want = max(0, min(len(view), self._entry.size - self._at))
        data = os.pread(self._file, want, self._entry.offset + self._at) if want else b""
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        """The rest, in one read where the system gives it at once."""
        parts = []
        while self._at < self._entry.size:
            part = os.pread(self._file, self._entry.size - self._at, self._entry.offset + self._at)
            if not part:
                break
            parts.append(part)
            self._at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the shard."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def open_packed(path: Path) -> PackedFile | None:
    """The packed file that `path` names in its folder's pack, or None. Raises PackError for a damaged pack."""
    if not is_pack(path.parent):
        return None
    entry = read_index(path.parent).entries.get(path.name)
    return None if entry is None else PackedFile(path.parent, entry)


def unpack_file(folder: Path, entry: Entry, target: Path) -> None:
    """Write one packed file out again, whole or not at all. Raises PackError if it is damaged, OSError if it cannot."""
    digest = hashlib.sha256()
    with replacing(target, durable=False) as out, PackedFile(folder, entry) as source:
        while block := source.read(_BLOCK):
            digest.update(block)
            out.write(block)
        if digest.hexdigest() != entry.sha256:
            raise PackError(f"{shard_path(folder, entry.shard)}: {entry.name} does not match its checksum")
