"""`python -m data_prep volume`: CT volumes to token files, one per slice. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from data_prep.system.progress import counted

_VOLUME = """Cut CT volumes into token files, one OUT/<case>_slice<NNN>.tokens.h5 per slice, with a sidecar
OUT/<case>.volume.json that says how the slices lie. Reads NIfTI (.nii, .nii.gz), folders of DICOM files, and
the .npz / .h5 arrays `image` and `label` of common BTCV code.

Slices are shown with the patient's right at the left and the front at the top, whatever the file's order. Values are
windowed to 8 bit; arrays between 0 and 1 are taken as windowed. Complete and valid slices are skipped."""

_SCORE = """Dice in three dimensions of predictions on the slices of volumes: per organ, and the mean over the organs
that a volume holds. With --labels in the volume's own voxels, against the label files; without, in the pixels of the
frames, exact from the counts in the token files (the same where frames are as fine as the slices).

Predictions are class ids per cell, (N, p, p), 0 for none: PRED/<case>_slice<NNN>.npy, or PRED/<case>.npz with an array
per slice. Without --predictions each cell has its most frequent class: what is lost by the cells alone.

exit code: 0 all scored, 1 some could not be, 64 bad arguments."""

_REASSEMBLE = """Put predictions on the slices of volumes (see volume score --help) together to label volumes,
OUT/<case>.nii.gz each, in the volume's grid and at its place in space.

exit code: 0 all written, 1 some could not be, 64 bad arguments."""

_EXAMPLES = """examples:
  # the 13 organs of BTCV, 512 x 512 slices, 1024 tokens of 4 x 4 pixels each
  python -m data_prep volume imagesTr/ --labels labelsTr/ --out tokens/btcv --resolution 512 --patch 4 --length 1024

  # a DICOM series without labels, lung window, coronal
  python -m data_prep volume series/ --out tokens/lung --resolution 512 --patch 8 --length 256 --window=-1000,400 \\
      --axis coronal

  # what predictions on the slices are worth in three dimensions, and as label volumes
  python -m data_prep volume score tokens/btcv --predictions pred/ --labels labelsTr/
  python -m data_prep volume reassemble tokens/btcv --predictions pred/ --out labelsPred/"""


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH in HU, such as -125,275") from error
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW must be below HIGH")
    return low, high


def add_command(commands: Any) -> None:
    """Add the parser of `volume`."""
    parser = commands.add_parser(
        "volume",
        help="CT volumes to token files",
        description=_VOLUME,
        epilog=_EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("volumes", nargs="+", type=Path, metavar="VOLUME_OR_DIR", help="volumes, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the token files")
    add("--labels", type=Path, metavar="DIR", help="folder of labels with the volumes' names (or label for img)")
    add("--classes", type=int, default=13, metavar="K", help="number of organs, labels 1..K (default 13, BTCV)")
    add("--resolution", type=int, required=True, metavar="R", help="side of the frame in pixels")
    add("--patch", type=int, required=True, metavar="p", help="side of a patch in pixels, a power of two")
    add("--patching", choices=("apf", "uniform"), default="apf", help="as in build (default apf)")
    add("--length", type=int, metavar="L", help="tokens per slice")
    add("--split-value", type=int, metavar="v", help="instead of --length, as in build")
    add(
        "--window",
        type=_window,
        default=(-125.0, 275.0),
        metavar="LOW,HIGH",
        help="HU shown as black and white; write --window=LOW,HIGH if LOW is negative (default -125,275)",
    )
    add("--axis", choices=("axial", "coronal", "sagittal"), default="axial", help="axis of the slices (default axial)")
    add("--rebuild", action="store_true", help="build also what is complete and valid")
    parser.set_defaults(run=_run)
    _add_score(commands)


def _add_score(commands: Any) -> None:
    """`cli.main` joins the two words of these commands."""
    raw = argparse.RawDescriptionHelpFormatter
    score = commands.add_parser(
        "volume score",
        help="3-D Dice of predictions on slices",
        description=_SCORE,
        formatter_class=raw,
        allow_abbrev=False,
    )
    join = commands.add_parser(
        "volume reassemble",
        help="predictions on slices to label volumes",
        description=_REASSEMBLE,
        formatter_class=raw,
        allow_abbrev=False,
    )
    for parser in (score, join):
        parser.add_argument("tokens", type=Path, metavar="TOKENS_DIR", help="folder that volume wrote")
        parser.add_argument("--predictions", type=Path, metavar="PRED", help="folder of the predictions")
        parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="names of volumes (default: all)")
    score.add_argument("--labels", type=Path, metavar="DIR", help="folder of labels with the volumes' names")
    score.add_argument("--classes", type=int, default=13, metavar="K", help="with --labels: labels 1..K (default 13)")
    score.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    score.set_defaults(run=_run_score)
    join.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the label volumes")
    join.set_defaults(run=_run_reassemble)


def _cases(args: argparse.Namespace) -> list[str]:
    from data_prep.build.options import OptionError
    from data_prep.slides.base import SlideError
    from data_prep.volumes.score import find_cases

    for flag, folder in (("--predictions", args.predictions), ("--labels", getattr(args, "labels", None))):
        if folder is not None and not folder.is_dir():
            raise OptionError(f"{flag} {folder}: no such folder")
    try:
        return find_cases(args.tokens, args.case)
    except SlideError as error:
        raise OptionError(str(error)) from error


def _run_score(args: argparse.Namespace) -> int:
    import json

    from data_prep.build.options import OptionError
    from data_prep.system.files import write_atomic
    from data_prep.volumes.score import score_cells, score_labels

    if args.json is not None and not args.json.parent.is_dir():
        raise OptionError(f"--json {args.json}: no such folder")
    scores: dict[str, Any] = {}
    cases = _cases(args)
    for case in cases:
        try:
            if args.labels is None:
                found = score_cells(case, args.tokens, args.predictions)
            else:
                found = score_labels(case, args.tokens, args.predictions, args.labels, args.classes)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        scores[case] = found
        organs = " ".join("-" if value is None else f"{value:.4f}" for value in found["dice"])
        print(f"{case}: mean {_shown(found['mean'])}, {found['absent']} absent, per class {organs}", flush=True)
    means = [found["mean"] for found in scores.values() if found["mean"] is not None]
    mean = sum(means) / len(means) if means else None
    print(f"mean over {counted(len(means), 'volume')}: {_shown(mean)}")
    if args.json is not None:
        write_atomic(args.json, json.dumps({"mean": mean, "volumes": scores}, indent=1).encode())
    return int(len(scores) < len(cases))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _run_reassemble(args: argparse.Namespace) -> int:
    from data_prep.volumes.score import write_labels

    cases = _cases(args)
    args.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for case in cases:
        try:
            write_labels(case, args.tokens, args.predictions, args.out)
            written += 1
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
    print(f"{counted(written, 'volume')} -> {args.out}")
    return int(written < len(cases))


def _run(args: argparse.Namespace) -> int:
    from data_prep.build.log import BuildLog
    from data_prep.build.options import BuildOptions, OptionError
    from data_prep.build.run import messages, prepare_out, summary
    from data_prep.slides.base import SlideError
    from data_prep.system.progress import Progress
    from data_prep.volumes.build import VolumeOptions, build_volume
    from data_prep.volumes.read import find_volumes

    if args.labels is not None and not args.labels.is_dir():
        raise OptionError(f"--labels {args.labels}: no such folder")
    options = VolumeOptions(
        BuildOptions(
            args.resolution,
            args.patch,
            patching=args.patching,
            length=args.length,
            split_value=args.split_value,
            classes=args.classes,
        ),
        args.axis,
        args.window,
        args.labels,
    )
    try:
        volumes = find_volumes(args.volumes)
    except SlideError as error:
        raise OptionError(str(error)) from error
    prepare_out(args.out)
    log, outcomes = BuildLog(args.out), []
    with Progress(len(volumes), "volume", "volumes") as progress:

        def tell(outcome: Any) -> None:
            log.append(outcome.entry())
            for line in messages(outcome):
                progress.write(line)
            progress.update(0, outcome.slide)

        for path in volumes:
            outcomes += build_volume(path, args.out, options, rebuild_all=args.rebuild, tell=tell)
            progress.update(1)
    print(summary(outcomes, args.out, sum(outcome.seconds for outcome in outcomes), "slice"), flush=True)
    return int(any(outcome.status == "failed" for outcome in outcomes))
