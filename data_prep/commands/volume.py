"""`python -m data_prep volume`: CT volumes to token files, one per slice. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_VOLUME = """Cut CT volumes into token files, one OUT/<case>_slice<NNN>.tokens.h5 per slice, with a sidecar
OUT/<case>.volume.json that says how the slices lie. Reads NIfTI (.nii, .nii.gz), folders of DICOM files, and
the .npz / .h5 arrays `image` and `label` of common BTCV code.

Slices are shown with the patient's right at the left and the front at the top, whatever the file's order. Values are
windowed to 8 bit; arrays between 0 and 1 are taken as windowed. Complete and valid slices are skipped."""

_EXAMPLES = """examples:
  # the 13 organs of BTCV, 512 x 512 slices, 1024 tokens of 4 x 4 pixels each
  python -m data_prep volume imagesTr/ --labels labelsTr/ --out tokens/btcv --resolution 512 --patch 4 --length 1024

  # a DICOM series without labels, lung window, coronal
  python -m data_prep volume series/ --out tokens/lung --resolution 512 --patch 8 --length 256 --window=-1000,400 \\
      --axis coronal"""


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
        "volume", help="CT volumes to token files", description=_VOLUME, epilog=_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    add("--window", type=_window, default=(-125.0, 275.0), metavar="LOW,HIGH",
        help="HU shown as black and white; write --window=LOW,HIGH if LOW is negative (default -125,275)")
    add("--axis", choices=("axial", "coronal", "sagittal"), default="axial", help="axis of the slices (default axial)")
    add("--rebuild", action="store_true", help="build also what is complete and valid")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from data_prep.build import messages, prepare_out, summary
    from data_prep.build_log import BuildLog
    from data_prep.options import BuildOptions, OptionError
    from data_prep.progress import Progress
    from data_prep.slide_base import SlideError
    from data_prep.volume_build import VolumeOptions, build_volume
    from data_prep.volume_io import find_volumes

    if args.labels is not None and not args.labels.is_dir():
        raise OptionError(f"--labels {args.labels}: no such folder")
    options = VolumeOptions(
        BuildOptions(args.resolution, args.patch, patching=args.patching, length=args.length,
                     split_value=args.split_value, classes=args.classes),
        args.axis, args.window, args.labels,
    )  # fmt: skip
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
    print(summary(outcomes, args.out, sum(outcome.seconds for outcome in outcomes)), flush=True)
    return int(any(outcome.status == "failed" for outcome in outcomes))
