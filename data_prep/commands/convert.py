"""`python -m data_prep convert`: masks and annotations of every kind to tiled TIFF."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.build.options import OptionError, class_ids
from data_prep.system.files import one_line

HELP = "masks and annotations to tiled TIFF"
_DESCRIPTION = """Convert masks to tiled BigTIFF with a pyramid, OUT/<name>.tif each, which every tool reads by region.

Worth it for masks in one piece or in strips, such as PAIP's (each read decodes the whole file, and
OpenSlide cannot open them), and to look at what polygons become: ImageScope XML (PAIP), ASAP XML
and GeoJSON in level-0 pixels. Class ids stay as they are; memory stays small whatever the size
(only PNG is decoded whole). A mask that is there, whole and from the same file, is skipped.

Polygons: a pixel belongs to a class when its centre lies inside by the even-odd rule; higher ids lie
over lower ones, id 0 erases. Names that need no --class: whole or tumor (1), viable (2), a number,
ImageScope's layer number, and CAMELYON's groups _0, _1 (1) and _2 (erases)."""

_EXAMPLES = """examples:
  # PAIP masks in strips
  python -m data_prep convert paip/masks/ --out masks/

  # ImageScope or ASAP annotations, whose size is that of their slides
  python -m data_prep convert annotations/ --slides slides/ --out masks/

  # GeoJSON from QuPath with classes of one's own; what is called Ignore is left out
  python -m data_prep convert a.geojson --slides slides/ --out masks/ --class Tumor=1 --class Stroma=2 \\
      --class Ignore=none

exit code: 0 all converted or skipped, 1 some mask failed, 64 bad arguments."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    kinds = "masks (.png, .tif, .tiff, .xml, .geojson, .json) or folders of them"
    add("masks", nargs="+", type=Path, metavar="MASK_OR_DIR", help=kinds)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the converted masks")
    add(
        "--slides",
        type=Path,
        metavar="DIR",
        help="folder of the slides, of the same names: needed for polygons; gives other masks their "
        "resolution, and sizes are compared",
    )
    add(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME=ID",
        help="class id (0 to 255, none to leave out) of polygons called NAME: class name, ImageScope "
        "layer number or colour #rrggbb; may be repeated, then every class needs one",
    )
    add(
        "--mask-kind",
        choices=("viable", "whole", "both"),
        default="both",
        help="which polygons to take: whole or viable tumour, as class 1, or both, as 1 and 2 (default both)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.masks.convert import convert_mask, plan
    from data_prep.system.files import remove_stale
    from data_prep.system.progress import Progress

    # List the masks, and clear what a killed run left.
    classes = class_ids(args.classes, "--class") if args.classes is not None else None
    try:
        jobs = plan(args.masks, args.out, args.slides)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise OptionError(str(error)) from error
    for path in remove_stale(args.out, [".tif"]):
        print(f"removed {path}, left by a run that was killed", file=sys.stderr)

    # Convert them one by one.
    counts = {"converted": 0, "skipped": 0, "failed": 0}
    with Progress(len(jobs), "convert", "masks") as progress:
        for job in jobs:
            name = job.source.name

            def beat(part: float, name: str = name) -> None:
                progress.update(0, f"{name} {part:.0%}")

            try:
                new = convert_mask(job, classes, args.mask_kind, beat, lambda text: progress.write(f"note: {text}"))
                done = "converted" if new else "skipped"
            except (ValueError, OSError, MemoryError) as error:
                done, text = "failed", one_line(error)
                progress.write(f"error: {text if str(job.source) in text else f'{job.source}: {text}'}")
            counts[done] += 1
            progress.update(1, name)
    print(", ".join(f"{count} {done}" for done, count in counts.items() if count) + f", in {args.out}")
    return 1 if counts["failed"] else 0
