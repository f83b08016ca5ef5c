"""Draws one slide as the quadtree sees it, for people who choose R, p and L by eye."""

from __future__ import annotations

from pathlib import Path

from data_prep.build.options import BuildOptions, OptionError
from data_prep.inspect.look import look_at


def inspect_slide(slide_path: Path, options: BuildOptions, out: Path, dpi: int = 200) -> str:
    """Draw one slide to `out` (.png or .pdf) and return the caption, one line.

    `options` are those of a build; `fit` and `packing` are ignored. `dpi` is dots per inch.

    Raises:
        SlideError: The slide or its mask cannot be read.
        OptionError: `out` has another suffix or cannot be written.
    """
    if out.suffix.lower() not in (".png", ".pdf"):
        raise OptionError(f"--out {out}: must end in .png or .pdf")
    from data_prep.inspect.figure import caption, save_figure  # loads matplotlib

    look = look_at(slide_path, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(look, out, dpi)
    except OSError as error:
        raise OptionError(f"--out {out}: cannot be written ({error.strerror})") from error
    return f"{out}: {caption(look)}"
