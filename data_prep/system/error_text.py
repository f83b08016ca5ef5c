"""What went wrong, in one line for people. Must not import anything of this project: readers and builds stand on it."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An exception's text, with the file's name where the system gave one; its class name if it has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if lines else type(error).__name__
