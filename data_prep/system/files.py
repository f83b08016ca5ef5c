"""Writes files whole or not at all, finds what a killed run left, hashes files, and words errors.

All rooms, `launch` and `analysis` write through it, so it imports nothing of this project.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_HASH_BLOCK = 1 << 20
_WRITE_BLOCK = 1 << 24
_STALE_AFTER_S = 900.0


def temporary_name(path: Path) -> Path:
    """The hidden name under which `path` is written, in the same folder, with host and process in it.

    The rename then stays inside one file system, two ranks never share a temporary file, and a later run can tell
    whether the writer still lives.
    """
    return path.with_name(f".{path.name}.tmp-{writer_name()}")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A new file to write and read, which replaces `path` as a whole at the end of the block.

    `durable`: it also survives a power cut, which costs a wait for the disk.

    Raises:
        OSError: The disk is full, the folder is not writable, ...; nothing is left of the new file.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("w+b") as out:
            yield out
            if durable:
                out.flush()
                os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk fails in write(), which does not know the name
        temporary.unlink(missing_ok=True)
        of_another_file = error.filename not in (None, temporary, str(temporary))
        raise OSError(error.errno, error.strerror, error.filename if of_another_file else str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` so that readers see the old file or all of the new one, also after a power cut.

    Raises:
        OSError: The disk is full, the folder is not writable, ...; nothing is left of the new file.
    """
    with replacing(path) as out:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _WRITE_BLOCK):
            out.write(view[start : start + _WRITE_BLOCK])


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the file system allows it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_stale(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Remove and return temporary files that a killed run left in `folder`; see `writer_lives`.

    `suffixes` are endings of the finished names, e.g. ".tokens.h5". Two runs into one folder do not take each other's
    files away.
    """
    removed = []
    for suffix in suffixes:
        for path in sorted(folder.glob(f".*{suffix}.tmp-*")):
            try:
                if writer_lives(path.name.rpartition(".tmp-")[2], path.stat().st_mtime):
                    continue
                path.unlink()
            except FileNotFoundError:  # its writer finished just now
                continue
            removed.append(path)
    return removed


def writer_name() -> str:
    """This process, as `writer_lives` understands it."""
    return f"{_host()}-{os.getpid()}"


def writer_lives(writer: str, touched_s: float) -> bool:
    """Whether the process `writer` (from `writer_name`) that last wrote at `touched_s` may still be writing.

    That is another live process of this host, or a process of another host (which cannot be asked) within 15 minutes.
    """
    host, _, pid = writer.rpartition("-")
    maybe_alive = host != _host() or (pid.isdigit() and int(pid) != os.getpid() and _alive(int(pid)))
    return maybe_alive and time.time() - touched_s < _STALE_AFTER_S


def same_host(writer: str) -> bool:
    """Whether `writer`, from `writer_name`, is a process of this host."""
    return writer.rpartition("-")[0] == _host()


def _host() -> str:
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a dead process that nobody has waited for yet still takes signals
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return not Path("/proc/self").exists()  # gone since; without /proc there is no telling


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of the bytes of `path`."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """An exception's text for people, with the file's name if known; its class name if it has no text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if lines else type(error).__name__
