"""Whole files or none: writing through a temporary name, finding what a killed run left, hashing, words for errors.

Imports nothing of this project: all rooms stand on it, and `launch` and `analysis` write through it too.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_HASH_BLOCK = 1 << 20
_WRITE_BLOCK = 1 << 24
_STALE_AFTER_S = 900.0


def temporary_name(path: Path) -> Path:
    """The name under which `path` is written: same folder, hidden, with host and process in it.

    The same folder, so that the rename stays inside one file system; host and process, so that two ranks never share a
    temporary file and a later run can tell whether its writer is still alive.
    """
    return path.with_name(f".{path.name}.tmp-{writer_name()}")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A new file to write and read, which takes the place of `path` at the end of the block, whole.

    Args:
        path: The file.
        durable: Also after a power cut; costs a wait for the disk.

    Raises:
        OSError: The disk is full, the folder is not writable, ...; then nothing is left of the new file.
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
    """Write `data` to `path` so that readers see the old file, or all of the new one, whenever the power goes.

    Raises:
        OSError: The disk is full, the folder is not writable, ...; then nothing is left of the new file.
    """
    with replacing(path) as out:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _WRITE_BLOCK):
            out.write(view[start : start + _WRITE_BLOCK])


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; some file systems refuse it, and then there is nothing better to do."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_stale(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Remove temporary files that a killed run left in `folder`; returns them.

    A file is stale when its writer ran on this host and lives no more, or when it was not written to for 15 minutes (no
    way to ask another host). So two runs into one folder do not take each other's files away.

    Args:
        folder: Folder of the finished files.
        suffixes: Endings of the finished names, e.g. ".tokens.h5".
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
    """Whether the process that wrote something may still be at it: another one that lives on this host, or one of
    another host (no way to ask it) if what it wrote was touched within 15 minutes.

    Args:
        writer: From `writer_name`, in that process.
        touched_s: When it last wrote, as `time.time()`.
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
    """An exception's text for people, with the file's name where the system gave one; its class name if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if lines else type(error).__name__
