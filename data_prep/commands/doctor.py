"""`python -m data_prep doctor`: check slides and masks before a build."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

HELP = "check slides and masks"
_DESCRIPTION = """Check slides and masks before a long build: decode every tile of every level, in parallel, and check
micrometres per pixel, pyramid factors and names, and with --masks (and --fov) that every slide has a mask (and a field
of view) of its size. Prints what is wrong and what to do about it. Changes nothing.

exit code: 0 no errors (warnings and notes may be), 1 errors, 64 bad arguments."""

_EXAMPLES = """examples:
  python -m data_prep doctor slides/ --masks masks/ --jobs 8
  python -m data_prep doctor retina/images --masks retina/masks --fov retina/fov
  python -m data_prep doctor paip/ --masks paip/ --burden Phase_1_tumor_burden.csv --burden-column "pixel ratio" \\
      --json findings.json"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE_OR_DIR", help="slides, or folders of them")
    add("--masks", type=Path, metavar="DIR", help="folder of the masks, PAIP's _whole and _viable pairs included")
    add("--fov", type=Path, metavar="DIR", help="folder of the fields of view, as build --fov takes it")
    table = "table of tumour burdens (viable over whole area) to compare with the masks; may be given twice"
    add("--burden", type=Path, action="append", default=[], metavar="CSV", help=table)
    column = "column of the burdens in the tables; may be given once per table (default: the only column of numbers)"
    add("--burden-column", action="append", default=[], metavar="NAME", help=column)
    add("--jobs", type=int, default=0, metavar="N", help="processes, 0 for one per core allowed (default 0)")
    add("--json", type=Path, metavar="FILE", help="also write the findings there")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    import json
    from dataclasses import asdict
    from functools import partial

    from data_prep.build.options import OptionError, check_fov
    from data_prep.inspect.burdens import read_burdens
    from data_prep.inspect.doctor import ORDER, check_burden, decode, died, over_the_folder, slides_of
    from data_prep.parallel.pool import run_pool
    from data_prep.slides.base import SlideError
    from data_prep.system.files import write_atomic
    from data_prep.system.progress import Progress, counted

    # Check the arguments.
    if args.jobs < 0:
        raise OptionError(f"--jobs {args.jobs}: must be 0 (one per core) or more")
    if args.masks is not None and not args.masks.is_dir():
        raise OptionError(f"--masks {args.masks}: no such folder")
    if args.fov is not None:
        check_fov(args.fov, args.masks)
    if args.json is not None and not args.json.parent.is_dir():
        raise OptionError(f"--json {args.json}: no such folder")
    if args.burden_column and not args.burden:
        raise OptionError("--burden-column: needs --burden")
    if args.burden and args.masks is None:
        raise OptionError("--burden: needs --masks")
    try:
        slides = slides_of(args.slides)
        burdens: dict[str, float] = {}
        for path in args.burden:
            burdens |= read_burdens(path, args.burden_column)
    except SlideError as error:
        raise OptionError(str(error)) from error

    # Look at the headers and the masks. A header that ends a reader's process must not end this one.
    jobs = args.jobs or len(os.sched_getaffinity(0))
    findings, bands, examined = [], [], {}
    with Progress(len(slides), "look", "slides") as progress:

        def gone(path: Path, cause: str) -> Any:
            return path, (died(path, cause), [], None)

        look = partial(_examined, masks=args.masks, fov=args.fov)
        for path, found in run_pool(look, slides, jobs, gone, idle=lambda: progress.update(0)):
            examined[path] = found
            progress.update(1, path.name)
    for path in slides:
        findings += examined[path][0]
        bands += examined[path][1]
        if burdens:
            findings += check_burden(path, args.masks, burdens)
    findings += over_the_folder(slides, {path: examined[path][2] for path in slides})

    # Decode every tile.
    with Progress(len(bands), "decode", "parts") as progress:
        for found in run_pool(decode, bands, jobs, died, idle=lambda: progress.update(0)):
            findings += found
            progress.update(1)

    # Report.
    findings = sorted(set(findings), key=lambda finding: (ORDER.index(finding.severity), finding.slide, finding.text))
    for finding in findings:
        print(f"{finding.severity:<8} {finding.slide}: {finding.text}\n         -> {finding.remedy}")
    count = {kind: sum(finding.severity == kind for finding in findings) for kind in ORDER}
    print(f"{counted(len(slides), 'slide')}: {', '.join(counted(count[kind], kind) for kind in ORDER)}")
    if args.json is not None:
        write_atomic(args.json, json.dumps([asdict(finding) for finding in findings], indent=1).encode())
    return int(count["error"] > 0)


def _examined(path: Path, masks: Path | None, fov: Path | None) -> tuple[Path, Any]:
    from data_prep.inspect.doctor import examine

    return path, examine(path, masks, fov)
