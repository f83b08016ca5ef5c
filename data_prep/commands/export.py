"""`python -m data_prep export`: leaves of token files for QuPath, TRIDENT and CLAM."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.build.options import OptionError

HELP = "leaves to GeoJSON or TRIDENT/CLAM coords"
_DESCRIPTION = """Write the leaves of token files in a form that other tools read, in level-0 pixels.

  geojson  OUT/<slide>.geojson for QuPath (drag it onto the slide): one detection per leaf, coloured by
           its side, with its depth in the tree, its size, and the share of each class if there are masks
  coords   OUT/<mag>x_<side>px_0px_overlap/patches/<slide>_patches.h5 for TRIDENT and CLAM readers: these
           know one patch size per file, so every side of leaves has a folder of its own. <side> is in
           level-0 pixels, <mag> is 10 / mpp (0 where the slide has no mpp). `token_index` in
           each file tells the row of the token file, to join features again.

Leaves that lie in the padding only are left out. With --uniform SIZE the slides of the token files are
covered with equal squares instead, to compare with."""

_EXAMPLES = """examples:
  python -m data_prep export tokens/apf/a.tokens.h5 --out qupath/ --format geojson
  python -m data_prep export tokens/apf/ --out trident/ --format coords
  python -m data_prep export tokens/apf/ --out uniform/ --format coords --uniform 512

exit code: 0 all written, 1 some file bad, 64 bad arguments."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("tokens", type=Path, metavar="TOKENS_OR_DIR", help="token file, or a folder of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--format", choices=("geojson", "coords"), required=True, help="what to write")
    kinds = "geojson: class of all objects (default: one per side, such as 'leaf 64 px')"
    add("--classification", metavar="NAME", help=kinds)
    squares = "instead of leaves: equal squares of SIZE level-0 pixels over the whole slide"
    add("--uniform", type=int, metavar="SIZE", help=squares)


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.system.progress import Progress, counted
    from data_prep.token_files.export import export
    from data_prep.token_files.token_file import StoreError
    from data_prep.token_files.verify import token_files

    if args.uniform is not None and args.uniform < 1:
        raise OptionError(f"--uniform {args.uniform}: must be at least 1 pixel")
    if args.classification is not None and args.format != "geojson":
        raise OptionError("--classification: only with --format geojson; coords files have no classes")
    try:
        files = token_files(args.tokens)
        args.out.mkdir(parents=True, exist_ok=True)
    except (StoreError, OSError) as error:
        raise OptionError(str(error)) from error
    written = bad = 0
    with Progress(len(files), "export", "files") as progress:
        for path in files:
            try:
                more = {"classification": args.classification, "uniform_px": args.uniform}
                written += len(export(path, args.out, args.format, **more))
            except (ValueError, OSError) as error:
                bad += 1
                progress.write(f"error: {error}")
            progress.update(1, path.name)
    made = f"{counted(written, 'file')} of {counted(len(files) - bad, 'token file')} written to {args.out}"
    print(made + (f", {bad} bad" if bad else ""))
    return 1 if bad else 0
