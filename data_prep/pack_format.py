"""The pack: files one after another in a few aligned shards, with one checked index; must not import torch or MPI.

The index is written last and atomically, so a folder without one is no pack. Names go in sorted order and nothing in
a pack depends on when it was made.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import temporary_name, write_atomic

INDEX = "pack.json"
ALIGN = 4096
_BLOCK = 1 << 20


class PackError(ValueError):
    """A pack that cannot be made or read; one line that names the file."""


class Entry(NamedTuple):
    """Where one file lies: `size` bytes from `offset` of shard `shard`, with their SHA-256."""

    name: str
    shard: int
    offset: int
    size: int
    sha256: str


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number `shard` of the pack `folder` lies."""
    return folder / f"shard-{shard:05d}.pack"


def write_pack(files: dict[str, Path], folder: Path, shard_bytes: int) -> list[Entry]:
    """Write a pack of `files` (name to path) into `folder`; a file larger than `shard_bytes` has a shard to itself.

    Raises:
        PackError: `folder` already holds a pack.
        OSError: A file cannot be read or written; then no index and no temporary shard is left.
    """
    if (folder / INDEX).exists():
        raise PackError(f"{folder}: already holds a pack")
    shards: list[list[str]] = []
    filled = 0
    for name in sorted(files):
        size = -(-files[name].stat().st_size // ALIGN) * ALIGN
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[Entry] = []
    for number, names in enumerate(shards):
        entries += _write_shard(files, names, number, shard_path(folder, number))
    body = json.dumps([list(entry) for entry in entries])
    index = {"schema": 1, "sha256": hashlib.sha256(body.encode()).hexdigest(), "entries": entries}
    write_atomic(folder / INDEX, json.dumps(index).encode())
    return entries


def _write_shard(files: dict[str, Path], names: list[str], number: int, path: Path) -> list[Entry]:
    entries = []
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as out:
            for name in names:
                digest, offset = hashlib.sha256(), out.tell()
                with files[name].open("rb") as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
                size = out.tell() - offset
                out.write(bytes(-size % ALIGN))
                entries.append(Entry(name, number, offset, size, digest.hexdigest()))
            out.flush()
            os.fsync(out.fileno())     # the index must never be there before its shards
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return entries


def read_index(folder: Path) -> dict[str, Entry]:
    """The entries of a pack by name.

    Raises:
        PackError: No index, or not what was written.
    """
    path = folder / INDEX
    try:
        index: Any = json.loads(path.read_bytes())
        body = json.dumps(index["entries"])
        if hashlib.sha256(body.encode()).hexdigest() != index["sha256"]:
            raise PackError(f"{path}: does not match its checksum")
        return {row[0]: Entry(*row) for row in index["entries"]}
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise PackError(f"{path}: not the index of a pack") from None


def read_entry(folder: Path, entry: Entry) -> bytes:
    """The bytes of one packed file, compared with their checksum.

    Raises:
        PackError: The shard is missing, cut off or changed.
    """
    path = shard_path(folder, entry.shard)
    try:
        with path.open("rb") as shard:
            shard.seek(entry.offset)
            data = shard.read(entry.size)
    except OSError as error:
        raise PackError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise PackError(f"{path}: {entry.name} does not match its checksum")
    return data
