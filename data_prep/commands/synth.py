"""`python -m data_prep synth`: make a test slide of any size with a mask."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "make a test slide"
_DESCRIPTION = """Make a slide to try things on: tissue-like fragments of real kidney texture on a white background,
as a pyramidal, JPEG-tiled BigTIFF that OpenSlide and QuPath open, and a mask of the glomeruli in it.

Written tile by tile in bounded memory; the same seed gives the same bytes. 65536 x 65536 pixels take about two to
three minutes on one core and 0.7 GB on disk."""

_EXAMPLES = """examples:
  python -m data_prep synth --size 8192 --out small.tif --mask-out masks/small.tif
  python -m data_prep synth --size 65536 --out big.tif --seed 7
  python -m data_prep synth --size 40000,25000 --tissue 0.6 --mpp 0.25 --out wide.tif"""


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [int(part) for part in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side nor WIDTH,HEIGHT in pixels")
    return sides[0], sides[-1]


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("--size", type=_size, required=True, metavar="PX", help="side of the slide in pixels, or WIDTH,HEIGHT")
    add("--out", type=Path, required=True, metavar="TIF", help="file of the slide")
    add("--mask-out", type=Path, metavar="TIF", help="file of the mask: 1 = glomerulus, 0 = the rest (default: none)")
    add("--seed", type=int, default=0, metavar="S", help="another seed, another slide (default 0)")
    add("--tissue", type=float, default=0.35, metavar="SHARE", help="share of the area that is tissue (default 0.35)")
    add("--tile", type=int, default=512, metavar="PX", help="side of the file's tiles, a multiple of 16 (default 512)")
    add("--quality", type=int, default=87, metavar="Q", help="JPEG quality, 1 to 100 (default 87)")
    add("--mpp", type=float, default=0.5, metavar="UM", help="micrometres per pixel to write down (default 0.5)")
    add("--force", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.build.options import OptionError
    from data_prep.synth.pictures import SynthSlide
    from data_prep.synth.tiff import write_slide

    for path in filter(None, (args.out, args.mask_out)):
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise OptionError(f"{path}: the file's name must end in .tif")
        if path.exists() and not args.force:
            raise OptionError(f"{path}: is there already; --force replaces it")
    if args.mask_out is not None and args.mask_out.resolve() == args.out.resolve():
        raise OptionError(f"{args.out}: slide and mask need two files")
    try:
        slide = SynthSlide(args.size, args.seed, args.tissue)
        for path in filter(None, (args.out, args.mask_out)):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_slide(slide, args.out, args.mask_out, tile_px=args.tile, quality=args.quality, mpp=args.mpp)
    except ValueError as error:
        raise OptionError(str(error)) from error
    return 0
