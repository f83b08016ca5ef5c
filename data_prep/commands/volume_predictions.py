"""`python -m data_prep volume score` and `volume reassemble`: predictions on slices, in three dimensions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from data_prep.build.options import OptionError
from data_prep.system.command_line import Command
from data_prep.system.progress import counted

_SCORE = """Dice in three dimensions of predictions on the slices of volumes: per organ, and the mean over the organs
that a volume holds. With --labels in the volume's own voxels, against the label files; without, in the pixels of the
frames, exact from the counts in the token files (the same where frames are as fine as the slices).

Predictions are class ids per cell, (N, p, p), 0 for none: PRED/<case>_slice<NNN>.npy, or PRED/<case>.npz with an array
per slice. Without --predictions each cell has its most frequent class: this shows what the cells alone lose.

exit code: 0 all scored, 1 some could not be, 64 bad arguments."""

_REASSEMBLE = """Put predictions on the slices of volumes (see volume score --help) together to label volumes,
OUT/<case>.nii.gz each, in the volume's grid and at its place in space.

exit code: 0 all written, 1 some could not be, 64 bad arguments."""


def _add_both(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokens", type=Path, metavar="TOKENS_DIR", help="folder that volume wrote")
    parser.add_argument("--predictions", type=Path, metavar="PRED", help="folder of the predictions")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="names of volumes (default: all)")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.description = _SCORE
    _add_both(parser)
    parser.add_argument("--labels", type=Path, metavar="DIR", help="folder of labels with the volumes' names")
    parser.add_argument("--classes", type=int, default=13, metavar="K", help="with --labels: labels 1..K (default 13)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")


def _add_reassemble(parser: argparse.ArgumentParser) -> None:
    parser.description = _REASSEMBLE
    _add_both(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the label volumes")


def _cases(args: argparse.Namespace) -> list[str]:
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

    from data_prep.system.files import write_atomic
    from data_prep.volumes.score import score_cells, score_labels

    if args.json is not None and not args.json.parent.is_dir():
        raise OptionError(f"--json {args.json}: no such folder")
    scores: dict[str, Any] = {}
    cases = _cases(args)
    # Score the volumes one by one.
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


COMMANDS = {
    "volume score": Command("3-D Dice of predictions on slices", _add_score, _run_score),
    "volume reassemble": Command("predictions on slices to label volumes", _add_reassemble, _run_reassemble),
}
