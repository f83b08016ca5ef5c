"""`python -m data_prep inspect`: draw one slide and its tree."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.build.options import OPTIONS, OptionError, add_options, options_of
from data_prep.system.command_line import DONE

HELP = "draw one slide: edges, leaves, patches, mask"
_DESCRIPTION = """Draw what the quadtree makes of one slide: frame, edges, leaves, token sequence, patches, and
the mask with what a prediction per cell must get wrong (its ceiling). Choose --patch and --length by
eye before a long build. With --patching uniform it says in how many patches a boundary of the mask lies.
A tree with this smallest patch has to keep about as many; it could save the others at most."""

_NOT_DRAWN = ("fit", "packing", "seed", "tile_px", "strict")
_LENGTH = 1024


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("slide", type=Path, metavar="SLIDE")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write (.png or .pdf)")
    changed: dict[str, dict[str, Any]] = {
        "resolution": {"required": False, "more_help": " (default: what fits the slide, at most 4096)"},
        "patch": {"required": False, "default": 16, "more_help": " (default 16)"},
        "length": {"more_help": f" (default {_LENGTH})"},
    }
    add_options(parser, [name for name in OPTIONS if name not in _NOT_DRAWN], changed)
    parser.add_argument("--dpi", type=int, default=200, help="dots per inch of the picture (default 200)")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.inspect.figure import inspect_slide
    from data_prep.inspect.look import default_resolution

    changed: dict[str, Any] = {}
    if not args.slide.is_file():
        raise OptionError(f"{args.slide}: " + ("a folder, not a slide" if args.slide.is_dir() else "no such file"))
    if not 10 <= args.dpi <= 1200:
        raise OptionError(f"--dpi {args.dpi}: must be 10 to 1200")
    if args.resolution is None:
        changed["resolution"] = default_resolution(args.slide, args.patch)
    if args.patching == "apf" and args.length is None and args.split_value is None:
        changed["length"] = _LENGTH
    print(inspect_slide(args.slide, options_of(args, **changed), args.out, dpi=args.dpi))
    return DONE
