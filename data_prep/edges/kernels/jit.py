"""How inner loops are compiled, and where the compiled code is kept. Imports Numba only.

The first call compiles for the processor at hand (seconds) and keeps the code in `__pycache__` beside the source, or
in the user's cache folder where that cannot be written, or where NUMBA_CACHE_DIR says. Many processes may do so at
once: files are renamed into place. Where nothing can be kept, every process compiles for itself.
A file's own time stamp tells whether its kept code is fresh, so parts and the kernels made of them share a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

part = numba.njit(error_model="numpy")  # compiled into the kernels that call it


def kernel(function: F) -> F:
    """Compiled at the first call and kept for the next process, if there is a place for it."""
    try:
        compiled: Any = numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder can be written
        return cast(F, part(function))
    save = compiled._cache.save_overload

    def save_if_possible(*args: Any) -> None:
        with contextlib.suppress(OSError):  # the disk is full
            save(*args)

    compiled._cache.save_overload = save_if_possible
    return cast(F, compiled)
