"""`python -m data_prep volume`: CT volumes to token files, one per slice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.build.options import OptionError, add_options, options_of

HELP = "CT volumes to token files"
_DESCRIPTION = """Cut CT volumes into token files, one OUT/<case>_slice<NNN>.tokens.h5 per slice, with a sidecar
OUT/<case>.volume.json that says how the slices lie. Reads NIfTI (.nii, .nii.gz), folders of DICOM files, and
the .npz / .h5 arrays `image` and `label` of common BTCV code.

Slices are shown with the patient's right at the left and the front at the top, whatever the file's order. Values are
windowed to 8 bit; arrays between 0 and 1 are taken as windowed. Complete and valid slices are skipped."""

_EXAMPLES = """examples:
  # the 13 organs of BTCV, 512 x 512 slices, 1024 tokens of 4 x 4 pixels each
  python -m data_prep volume imagesTr/ --labels labelsTr/ --out tokens/btcv --resolution 512 --patch 4 --length 1024

  # a DICOM series without labels, lung window, coronal
  python -m data_prep volume series/ --out tokens/lung --resolution 512 --patch 8 --length 256 --window=-1000,400 \\
      --axis coronal

  # Dice of predictions on the slices in three dimensions, and the predictions as label volumes
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


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("volumes", nargs="+", type=Path, metavar="VOLUME_OR_DIR", help="volumes, or folders of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the token files")
    add("--labels", type=Path, metavar="DIR", help="folder of labels with the volumes' names (or label for img)")
    changed: dict[str, dict[str, Any]] = {
        "classes": {"default": 13, "help": "number of organs, labels 1..K (default 13, BTCV)"},
        "resolution": {"help": "side of the frame in pixels"},
        "patch": {"help": "side of a patch in pixels, a power of two"},
        "patching": {"help": "as in build (default apf)"},
        "length": {"help": "tokens per slice"},
        "split_value": {"help": "instead of --length, as in build"},
    }
    add_options(parser, changed, changed, grouped=False)
    window = "HU shown as black and white; write --window=LOW,HIGH if LOW is negative (default -125,275)"
    add("--window", type=_window, default=(-125.0, 275.0), metavar="LOW,HIGH", help=window)
    add("--axis", choices=("axial", "coronal", "sagittal"), default="axial", help="axis of the slices (default axial)")
    add("--rebuild", action="store_true", help="build again what is complete and valid")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.build.log import BuildLog
    from data_prep.build.run import messages, prepare_out, summary
    from data_prep.slides.base import SlideError
    from data_prep.system.progress import Progress
    from data_prep.volumes.build import VolumeOptions, build_volume
    from data_prep.volumes.read import find_volumes

    if args.labels is not None and not args.labels.is_dir():
        raise OptionError(f"--labels {args.labels}: no such folder")
    options = VolumeOptions(options_of(args), args.axis, args.window, args.labels)
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
