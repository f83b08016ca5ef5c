"""`python -m data_prep build`: slides to token files. Imports MPI only for ranks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from data_prep.build.options import BuildOptions, OptionError, add_options, options_of
from data_prep.system.command_line import BAD_ARGUMENTS, DONE, FAILED

HELP = "slides to token files, adaptive or uniform patches"
GOES_ON = "the same command goes on where this one stopped"
ALL_RANKS = True
_DESCRIPTION = """Cut slides into token files, one OUT/<slide>.tokens.h5 each.

Every slide is placed in a frame of R x R pixels (scaled down, never up, padded with white).
Adaptive patching (apf) splits the frame as a quadtree where it has edges and shrinks every leaf to
p x p pixels; uniform patching cuts (R/p)^2 equal squares.

A run that was stopped is simply started again: files that are complete, valid and made from the
same slide, mask and parameters are skipped, all others are built. A bad slide does not stop the rest."""

_EXAMPLES = """examples:
  # 256 adaptive tokens of 16 x 16 pixels for every image of a folder, with masks of the same names
  python -m data_prep build slides/ --masks masks/ --out tokens/apf --resolution 1024 --patch 16 --length 256

  # the same images uniformly, 4096 tokens each
  python -m data_prep build slides/ --masks masks/ --out tokens/uni --resolution 1024 --patch 16 --patching uniform

  # as in the paper: split while a square holds more than 100 edge pixels, fixed Canny thresholds
  python -m data_prep build a.svs --out tokens/paper --resolution 8192 --patch 8 --split-value 100 --thresholds 100,200

  # on many cores, or on many ranks (slides are shared; same files either way)
  python -m data_prep build slides/ --out tokens/apf --resolution 16384 --patch 16 --length 16384 --jobs 8
  mpiexec -n 8 python -m data_prep build slides/ --out tokens/apf --resolution 16384 --patch 16 --length 16384

  # one slide of 64K on many ranks: they share its regions; stopped and started again, it goes on
  mpiexec -n 8 python -m data_prep build big.svs --out tokens/64k --resolution 65536 --patch 32 --length 4096

exit code: 0 all built or skipped, 1 some slide failed, 64 bad arguments."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    kinds = "slides (.svs and all OpenSlide reads, TIFF, PNG, JPEG) or folders of them"
    add("slides", nargs="+", type=Path, metavar="SLIDE_OR_DIR", help=kinds)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the token files")
    add_options(parser)
    processes = "processes on this machine, 0 for one per core allowed; not under mpiexec (default 1)"
    add("--jobs", type=int, default=1, metavar="N", help=processes)
    add("--rebuild", action="store_true", help="build again what is complete and valid")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code, the same on all ranks. Raises OptionError and LaunchError."""
    from data_prep.parallel.mpi import check_world, lonely, wants_mpi

    options = options_of(args)
    if args.jobs < 0:
        raise OptionError(f"--jobs {args.jobs}: must be 0 (one per core) or more")
    if not wants_mpi():
        if args.jobs == 1 and (hint := lonely()) is not None:
            print(f"warning: {hint}", file=sys.stderr, flush=True)
        return _build(args, options, None)
    if args.jobs != 1:
        raise OptionError("--jobs: only in a plain run; under an MPI launcher start more ranks instead")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise OptionError(
            "started under an MPI launcher, but mpi4py does not load: install the extra `mpi`, or use --jobs "
            f"({str(error).splitlines()[0]})"
        ) from error
    check_world(MPI.COMM_WORLD.size)
    return _build(args, options, MPI.COMM_WORLD)


def _build(args: argparse.Namespace, options: BuildOptions, comm: Any) -> int:
    """Rank 0 checks the slides and the folder; what it finds wrong ends every rank with the same code."""
    from data_prep.build.run import build, prepare_out, summary
    from data_prep.slides.open import find_slides
    from data_prep.system.files import remove_stale
    from data_prep.token_files.token_file import SUFFIX

    # Find the slides and clear the folder, on rank 0.
    started_s = time.perf_counter()
    slides: list[Path] = []
    wrong: str | None = None
    first = comm is None or comm.rank == 0
    if first:
        try:
            slides = find_slides(args.slides)
            for path in prepare_out(args.out):
                print(f"removed {path}, left by a run that was killed", file=sys.stderr)
        except (ValueError, OSError) as error:
            wrong = str(error)
    if comm is not None:
        slides, wrong = comm.bcast((slides, wrong))
    if wrong is not None:
        if first:
            raise OptionError(wrong)
        return BAD_ARGUMENTS

    # Build, and say what became of every slide.
    jobs = args.jobs or len(os.sched_getaffinity(0))
    try:
        outcomes = build(slides, options, args.out, jobs=jobs, comm=comm, rebuild=args.rebuild)
    except KeyboardInterrupt:
        if comm is None:  # what workers were writing when they were stopped
            remove_stale(args.out, [SUFFIX])
        raise
    code = FAILED if any(outcome.status == "failed" for outcome in outcomes) else DONE
    if first:
        print(summary(outcomes, args.out, time.perf_counter() - started_s), flush=True)
    return int(comm.bcast(code)) if comm is not None else code
