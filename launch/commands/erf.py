"""`python -m launch erf`: effective receptive field of an experiment's model, written as one npz file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.system.command_line import DONE, FAILED, positive
from data_prep.system.files import write_atomic
from launch.commands.train import add_experiment
from launch.experiments.load import load
from launch.score.receptive_field import measure, to_npz

HELP = "measure a model's effective receptive field"
_DESCRIPTION = """\
Mean absolute gradient of the output map's centre by the input's pixels (Luo et al. 2016), over pictures of a split.
Give trained weights as train.init_from=RUN_DIR; without them the model is as initialised. Writes DIR/EXPERIMENT.npz:
map (H, W), profile_row (H,), profile_col (W,) and about, a JSON text that says what was measured.
The field of token sets is in pixels of the frame. The map's longest side is at most 2048; about.pixel_px says how many
pixels of the frame lie along a side of one of the map's pixels."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    add_experiment(parser, "settings to change, e.g. train.init_from=runs/...")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for EXPERIMENT.npz")
    parser.add_argument("--images", type=positive, default=100, metavar="N", help="pictures (default 100)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default test")
    parser.add_argument("--noise", action="store_true", help="noise instead of pictures; needs no data")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="output of this layer (a map, or tokens; not a layer norm) instead of the model's own map",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write, print one line."""
    config = load(args.experiment, args.overrides)
    out = Path(args.out)
    field = measure(config, args.split, args.images, args.noise, args.layer)
    std, support = field.std_hw(), field.support_hw()
    about = {
        "experiment": config.experiment,
        "model": config.model_dump(mode="json")["model"],
        "weights": config.train.init_from,
        "pictures": "noise" if args.noise else f"{config.data.dir} ({args.split})",
        "images": field.images,
        "layer": args.layer,
        "seed": config.train.seed,
        "support_hw_px": list(support),
        "share_nonzero": field.share_nonzero(),
        "pixel_px": field.pixel_px,
        "std_hw_px": [None if s != s else s for s in std],
    }
    target = out / f"{config.experiment}.npz"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(target, to_npz(field, about))
    except OSError as error:
        print(f"error: --out {out}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    height, width = (side * field.pixel_px for side in field.map.shape)
    print(
        f"{target}: {field.images} pictures of {height} x {width} px, support {support[0]} x {support[1]} px "
        f"({field.share_nonzero():.2%} of the pixels), std {std[0]:.1f} x {std[1]:.1f} px"
    )
    return DONE
