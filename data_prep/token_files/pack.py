"""Packs folders of token files and unpacks them again, byte for byte."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from data_prep.system.files import sha256_of, write_atomic
from data_prep.system.progress import Progress
from data_prep.token_files.pack_format import (
    Index,
    PackArgumentError,
    PackError,
    fault_of,
    is_pack,
    read_index,
    unpack_file,
    write_pack,
)
from data_prep.token_files.token_file import SUFFIX, check_bytes

BESIDE = ("build_log.jsonl", "split.json", "*.volume.json")  # what goes with token files, small enough to stay as it is


def pack_folder(folder: Path, out: Path, shard_bytes: int) -> Index:
    """Pack all token files of a folder, and the small files that belong to them; `out` is new or from an earlier try.

    Raises:
        PackArgumentError: Nothing to pack, or `out` is in use.
        StoreError: A token file is damaged; nothing is packed.
        OSError: See `write_pack`.
    """
    # Check the folders, and list the files.
    if not folder.is_dir():
        raise PackArgumentError(f"{folder}: no such folder")
    if is_pack(folder):
        raise PackArgumentError(f"{folder}: is a pack already")
    if out.resolve() == folder.resolve():
        raise PackArgumentError(f"{out}: a pack needs a folder of its own")
    files = {path.name: path for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))}
    if not files:
        raise PackArgumentError(f"{folder}: no *{SUFFIX} in it")
    beside = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in BESIDE)
    }

    # Check all files, then pack them.
    with Progress(len(files), "check", "files") as progress:
        for path in files.values():
            check_bytes(path)
            progress.update(1)
    with Progress(_mebibytes(sum(path.stat().st_size for path in files.values())), "pack", "MiB") as progress:
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            progress.update(_mebibytes(done) - _mebibytes(before))

        return write_pack(files, out, shard_bytes, beside, tell)


def _mebibytes(size: int) -> int:
    """Bytes in MiB, rounded up, so that small packs show progress too."""
    return -(-size // 2**20)


def unpack_folder(pack: Path, out: Path, only: Sequence[str] = (), *, force: bool = False) -> list[Path]:
    """Write the files of a pack, or the slides in `only`, out again and return them.

    Files that are there already, as packed, are left alone. `force` replaces files that differ.

    Raises:
        PackArgumentError: No pack, a slide that it does not hold, or without `force` a file that differs; nothing is
            written.
        PackError: Damage.
        OSError: A file cannot be written.
    """
    # Find what is wanted.
    index = read_index(pack)
    names = [f"{stem}{SUFFIX}" for stem in only] or list(index.entries)
    missing = [name for name in names if name not in index.entries]
    if missing:
        raise PackArgumentError(f"{pack}: holds no {missing[0]}")
    if out.resolve() == pack.resolve():
        raise PackArgumentError(f"{out}: unpack into another folder than the pack's")
    wanted = {name: (index.entries[name].size, index.entries[name].sha256) for name in names}
    if not only:
        for name, digest in index.beside.items():
            if fault := fault_of(pack / name, digest):
                raise PackError(fault)
            wanted[name] = ((pack / name).stat().st_size, digest)

    # Keep what is there already, and write the rest.
    there = {name for name in wanted if (out / name).exists()}
    kept = {name for name in there if _is(out / name, *wanted[name])}
    if there - kept and not force:
        first, more = out / min(there - kept), len(there - kept) - 1
        also = f" (and {more} more)" if more else ""
        raise PackArgumentError(f"{first}: differs from what the pack holds{also}; --force replaces it")
    out.mkdir(parents=True, exist_ok=True)
    with Progress(len(wanted), "unpack", "files") as progress:
        for name in wanted:
            if name in index.entries and name not in kept:
                unpack_file(pack, index.entries[name], out / name)
            elif name not in kept:
                write_atomic(out / name, (pack / name).read_bytes())
            progress.update(1)
    return [out / name for name in wanted]


def _is(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256
