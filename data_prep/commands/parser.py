"""The command line: `python -m data_prep build|verify|inspect`, and those of `commands/`. Exit codes: 0 good, 1 some
slide or file bad, 64 bad arguments, 130 interrupted.

Heavy imports happen inside the commands, so that `--help` is quick; MPI only in `build`, and only under a launcher.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn

from data_prep.build.options import BuildOptions, OptionError, class_ids
from data_prep.commands import add_commands
from data_prep.edges import AUTO_PERCENT
from data_prep.system.ctrl_c import INTERRUPTED, launcher_rank, let_rank_0_be_first, loading

BAD_ARGUMENTS = 64
SOME_FAILED = 1
CRASHED = 70
_PASS_ON_S = 0.3

_TOP = """Cut slides into token files for transformers.

Start with:  python -m data_prep inspect SLIDE --out look.png
Help of one: python -m data_prep build --help
How it works, and why it is exact: data_prep/README.md"""

_BUILD = """Cut slides into token files, one OUT/<slide>.tokens.h5 each.

Every slide is placed in a frame of R x R pixels (scaled down, never up, padded with white).
Adaptive patching (apf) splits the frame as a quadtree where it has edges and shrinks every leaf to
p x p pixels; uniform patching cuts (R/p)^2 equal squares.

A run that was stopped is simply started again: files that are complete, valid and made from the
same slide, mask and parameters are skipped, all others are built. A bad slide does not stop the rest."""

_BUILD_EXAMPLES = """examples:
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

_INSPECT = """Draw what the quadtree makes of one slide: frame, edges, leaves, token sequence, patches, and
the mask with what a prediction per cell must get wrong (its ceiling). Choose --patch and --length by
eye before a long build. With --patching uniform it says in how many patches a boundary of the mask lies:
about those that a tree with this smallest patch has to keep; the rest is what it could save at most."""


class _Parser(argparse.ArgumentParser):
    """argparse with this project's exit code, and one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        self.exit(BAD_ARGUMENTS)


def _complain(message: str) -> None:
    """One line on stderr, from one rank of many: all of them find the same fault in the arguments."""
    if launcher_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _interrupted(command: str) -> None:
    """One line. Of many ranks the first says it and ends the others; if it was not interrupted, another one does."""
    let_rank_0_be_first()
    goes_on = ": the same command goes on where this one stopped" if command == "build" else ""
    print(f"interrupted{goes_on}", file=sys.stderr, flush=True)


def _thresholds(text: str) -> Literal["auto"] | tuple[int, int]:
    if text == "auto":
        return "auto"
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor LOW,HIGH such as 100,200") from error
    return low, high


def _percent(text: str) -> int:
    """A quantile such as 0.8 in hundredths, so that thresholds are found with integers."""
    try:
        hundredths = 100 * Fraction(text)
    except (ValueError, ZeroDivisionError):
        hundredths = Fraction(0)
    if hundredths.denominator != 1 or not 1 <= hundredths <= 99:
        raise argparse.ArgumentTypeError(f"{text!r} is no quantile in hundredths, 0.01 to 0.99")
    return int(hundredths)


def _add_tree_options(parser: argparse.ArgumentParser, inspect: bool) -> None:
    frame = parser.add_argument_group("frame and patches")
    frame.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        required=not inspect,
        help="side of the frame in pixels, p times a power of two"
        + (" (default: what fits the slide, at most 4096)" if inspect else ""),
    )
    frame.add_argument(
        "--patch",
        type=int,
        metavar="p",
        required=not inspect,
        default=16 if inspect else None,
        help="side of a patch in pixels, a power of two; also the smallest leaf" + (" (default 16)" if inspect else ""),
    )
    frame.add_argument(
        "--patching",
        choices=("apf", "uniform"),
        default="apf",
        help="apf: adaptive quadtree; uniform: equal squares (default apf)",
    )
    frame.add_argument(
        "--aspect",
        choices=("keep", "squash"),
        default="keep",
        help="keep: pad to the square; squash: stretch to it, as the paper's authors did (default keep)",
    )
    tree = parser.add_argument_group("quadtree (apf only)")
    tree.add_argument(
        "--length",
        type=int,
        metavar="L",
        help="tokens per slide, at least 4: split the square with most edges until L leaves are reached"
        + (" (default 1024)" if inspect else ""),
    )
    tree.add_argument(
        "--split-value",
        type=int,
        metavar="v",
        help="instead of --length: split while a square holds more than v edge pixels (the paper's rule)",
    )
    tree.add_argument(
        "--blur",
        type=int,
        metavar="k",
        help="side of the Gaussian before Canny in pixels, odd, 1 for none "
        "(default by R: 3 up to 1K, 7 at 4K, 9 at 8K, 11 at 16K, 13 at 32K, 15 at 64K)",
    )
    tree.add_argument(
        "--thresholds",
        type=_thresholds,
        default="auto",
        metavar="LOW,HIGH|auto",
        help="Canny thresholds. auto: from each slide's own gradients, also good on faint images; "
        "the paper: 100,200 (default auto)",
    )
    tree.add_argument(
        "--split-on",
        choices=("edges", "variance", "entropy"),
        default="edges",
        help="with --length: what is counted in a square, its edges, or the variance or entropy of its "
        "luma times its pixels (default edges; others for frames built in memory)",
    )
    tree.add_argument(
        "--auto-quantile",
        type=_percent,
        default=AUTO_PERCENT,
        metavar="Q",
        dest="auto_percent",
        help="of auto: quantile of the slide's non-zero gradients that becomes HIGH (LOW is half of it), "
        f"0.01 to 0.99; lower finds more edges (default {AUTO_PERCENT / 100:.2f})",
    )
    tree.add_argument(
        "--resample",
        choices=("mean", "cubic"),
        default="mean",
        help="how a leaf becomes p x p pixels: means of its cells, or OpenCV's bicubic interpolation, "
        "as the paper's code (default mean; cubic for frames built in memory)",
    )
    masks = parser.add_argument_group("annotation")
    masks.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder with a mask per slide, of the same name: .png, .tif, .tiff (same size, pixel "
        "value = class, 0 = background), or polygons, .xml (ImageScope, ASAP), .geojson (level-0 px)",
    )
    masks.add_argument(
        "--mask-kind",
        choices=("viable", "whole", "both"),
        help="of whole and viable tumour, as PAIP has them (<slide>_whole.tif, <slide>_viable.tif, or "
        "layers of an XML): one of them as class 1, or both, whole 1 and viable 2",
    )
    masks.add_argument(
        "--mask-classes",
        metavar="NAME=ID,...",
        help="class ids of polygons by name, as convert --class: class name, ImageScope layer number or "
        "colour #rrggbb; ID 0 erases, none leaves out; then every class needs one (default: by known "
        "names, see convert)",
    )
    masks.add_argument(
        "--fov",
        type=Path,
        metavar="DIR",
        help="folder with a field of view per slide, found and read as masks are: where it is 0 "
        "(outside), nothing is scored or learned, e.g. around the round picture of a retina",
    )
    masks.add_argument(
        "--classes",
        type=int,
        default=1,
        metavar="K",
        help="number of foreground classes, values 1..K of the masks (default 1)",
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="python -m data_prep",
        description=_TOP,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND [ARGUMENTS]", title="commands", required=True)

    build = commands.add_parser(
        "build",
        help="slides to token files, adaptive or uniform patches",
        description=_BUILD,
        epilog=_BUILD_EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    build.add_argument(
        "slides",
        nargs="+",
        type=Path,
        metavar="SLIDE_OR_DIR",
        help="slides (.svs and all OpenSlide reads, TIFF, PNG, JPEG) or folders of them",
    )
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the token files")
    _add_tree_options(build, inspect=False)
    compare = build.add_argument_group("for comparison with the paper's code only")
    compare.add_argument(
        "--fit",
        choices=("budget", "drop"),
        default="budget",
        help="drop: the tree of --split-value, then random tokens dropped or duplicated to reach "
        "--length exactly, as the paper (default budget: never)",
    )
    compare.add_argument(
        "--packing",
        choices=("leaf", "strip"),
        default="leaf",
        help="strip: tokens mix rows of p leaves, as the public code's reshape does; training puts "
        "them back, its own switch is model.packing=strip (default leaf)",
    )
    compare.add_argument("--seed", type=int, default=0, help="seed of --fit drop (default 0)")
    build.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help="side of the regions of a frame that ranks share, rounded down to a power of two, at most "
        "64 x 64 regions: smaller needs less memory, larger reads less twice; never changes the result "
        "(default: frames up to 4096 at once, else 4096, or 8192 for 32K and more on up to 16 ranks)",
    )
    build.add_argument(
        "--strict",
        action="store_true",
        help="refuse a slide with a tile that cannot be decoded (default: such tiles are white, and are "
        "listed in the token file and in the log)",
    )
    build.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, 0 for one per core allowed; not under mpiexec (default 1)",
    )
    build.add_argument("--rebuild", action="store_true", help="build also what is complete and valid")
    build.set_defaults(run=_run_build)

    verify = commands.add_parser(
        "verify",
        help="check token files, or a pack",
        formatter_class=raw,
        allow_abbrev=False,
        description="Check every token file under DIR: whole, unchanged since it was written, "
        "leaves tile\nthe frame in Morton order, counts add up. One line per fault; "
        "exit code 1 if there is any.",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="folder of token files, one file, or a pack")
    verify.set_defaults(run=_run_verify)

    inspect = commands.add_parser(
        "inspect",
        help="draw one slide: edges, leaves, patches, mask",
        description=_INSPECT,
        formatter_class=raw,
        allow_abbrev=False,
    )
    inspect.add_argument("slide", type=Path, metavar="SLIDE")
    inspect.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write (.png or .pdf)")
    _add_tree_options(inspect, inspect=True)
    inspect.add_argument("--dpi", type=int, default=200, help="dots per inch of the picture (default 200)")
    inspect.set_defaults(run=_run_inspect)
    add_commands(commands)
    return parser


def _options(args: argparse.Namespace, **changed: Any) -> BuildOptions:
    names = (
        "resolution",
        "patch",
        "patching",
        "length",
        "split_value",
        "blur",
        "thresholds",
        "aspect",
        "fit",
        "packing",
        "classes",
        "seed",
        "masks",
        "mask_kind",
        "strict",
        "split_on",
        "auto_percent",
        "fov",
        "resample",
    )
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.mask_classes is not None:
        values["mask_classes"] = tuple(class_ids(args.mask_classes.split(","), "--mask-classes").items())
    return BuildOptions(**{**values, "tile_px": getattr(args, "tile", None), **changed})


def _run_build(args: argparse.Namespace) -> int:
    from data_prep.parallel.mpi import check_world, lonely, wants_mpi

    options = _options(args)
    if args.jobs < 0:
        raise OptionError(f"--jobs {args.jobs}: must be 0 (one per core) or more")
    if not wants_mpi():
        if args.jobs == 1 and (hint := lonely()) is not None:
            print(f"warning: {hint}", file=sys.stderr, flush=True)
        return _build(args, options, None)
    if args.jobs != 1:
        raise OptionError("--jobs: only in a plain run; under an MPI launcher start more ranks instead")
    try:
        with loading():
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise OptionError(
            "started under an MPI launcher, but mpi4py does not load: install the extra `mpi`, or use --jobs "
            f"({str(error).splitlines()[0]})"
        ) from error
    comm = MPI.COMM_WORLD
    check_world(comm.size)
    try:
        return _build(args, options, comm)
    except OptionError:  # found on rank 0 and told to all
        raise
    except BaseException as error:
        # One rank that left would let the others wait for ever.
        if isinstance(error, KeyboardInterrupt):
            _interrupted(args.command)
            return _abort(comm, INTERRUPTED)
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return _abort(comm, CRASHED)


def _abort(comm: Any, code: int) -> int:
    """End all ranks. The launcher is given time to pass on what was said: told to abort, it drops the rest."""
    sys.stderr.flush()
    time.sleep(_PASS_ON_S)
    comm.Abort(code)
    return code  # the call above may come back before this process is ended


def _build(args: argparse.Namespace, options: BuildOptions, comm: Any) -> int:
    """Rank 0 looks at the slides and the folder; what it finds wrong ends every rank with the same code."""
    with loading():
        from data_prep.build.run import build, prepare_out, summary
        from data_prep.slides.open import find_slides
        from data_prep.system.files import remove_stale
        from data_prep.token_files.token_file import SUFFIX

    started_s = time.perf_counter()
    slides: list[Path] = []
    wrong: str | None = None
    if comm is None or comm.rank == 0:
        try:
            slides = find_slides(args.slides)
            for path in prepare_out(args.out):
                print(f"removed {path}, left by a run that was killed", file=sys.stderr)
        except (ValueError, OSError) as error:
            wrong = str(error)
    if comm is not None:
        slides, wrong = comm.bcast((slides, wrong))
    if wrong is not None:
        if comm is None or comm.rank == 0:
            raise OptionError(wrong)
        return BAD_ARGUMENTS
    jobs = args.jobs or len(os.sched_getaffinity(0))
    try:
        outcomes = build(slides, options, args.out, jobs=jobs, comm=comm, rebuild=args.rebuild)
    except KeyboardInterrupt:
        if comm is None:  # what workers were writing when they were stopped
            remove_stale(args.out, [SUFFIX])
        raise
    code = SOME_FAILED if any(outcome.status == "failed" for outcome in outcomes) else 0
    if comm is None or comm.rank == 0:
        print(summary(outcomes, args.out, time.perf_counter() - started_s), flush=True)
    return int(comm.bcast(code)) if comm is not None else code


def _run_verify(args: argparse.Namespace) -> int:
    with loading():
        from data_prep.system.progress import Progress
        from data_prep.token_files.pack_format import PackError, check_pack, is_pack
        from data_prep.token_files.token_file import StoreError
        from data_prep.token_files.verify import token_files, verify_file

    try:
        files = token_files(args.folder)
        faults = check_pack(args.folder) if is_pack(args.folder) else []
    except (StoreError, PackError) as error:
        raise OptionError(str(error)) from error
    bad = 0
    for fault in faults:
        print(fault, flush=True)
    with Progress(len(files), "verify", "files") as progress:
        for path in files:
            wrong = verify_file(path)
            bad += bool(wrong)
            for fault in wrong:
                print(f"{path}: {fault}", flush=True)
            progress.update(1)
    rest = f", {bad} {'is' if bad == 1 else 'are'} not" if bad else ""
    print(f"{len(files) - bad} of {len(files)} token files are good{rest}")
    return SOME_FAILED if bad or faults else 0


def _run_inspect(args: argparse.Namespace) -> int:
    with loading():
        from data_prep.inspect.look import default_resolution
        from data_prep.inspect.view import inspect_slide

    changed: dict[str, Any] = {}
    if not args.slide.is_file():
        raise OptionError(f"{args.slide}: " + ("a folder, not a slide" if args.slide.is_dir() else "no such file"))
    if not 10 <= args.dpi <= 1200:
        raise OptionError(f"--dpi {args.dpi}: must be 10 to 1200")
    if args.resolution is None:
        changed["resolution"] = default_resolution(args.slide, args.patch)
    if args.patching == "apf" and args.length is None and args.split_value is None:
        changed["length"] = 1024
    print(inspect_slide(args.slide, _options(args, **changed), args.out, dpi=args.dpi))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; default those of the process.

    Returns:
        The exit code. argparse itself leaves with `SystemExit` on `--help` and on unknown flags.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["volume"] and words[1:2] in (["score"], ["reassemble"]):  # a folder of that name is ./score
        words[:2] = [" ".join(words[:2])]
    with loading():
        args = make_parser().parse_args(words)
    if args.command != "build" and launcher_rank():  # rank 0 does it, once
        return 0
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        _interrupted(args.command)
        return INTERRUPTED
    except Exception as error:
        from data_prep.parallel.mpi import LaunchError

        if isinstance(error, (OptionError, LaunchError)):
            _complain(str(error))
            return BAD_ARGUMENTS
        if isinstance(error, (ValueError, OSError)) and args.command != "build":
            _complain(str(error))
            return SOME_FAILED
        raise
