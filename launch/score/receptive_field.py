"""`python -m launch erf`: effective receptive field of an experiment's model on its pictures, written as one npz file.

Importing it must import neither torch nor what reads pictures.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.system.files import write_atomic
from data_prep.system.progress import Progress
from launch.config.config import Config, ConfigError
from launch.engines.ranks import EXIT_CRASH, EXIT_OK, find_ranks, pick_device
from launch.experiments.load import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hpc_models.training.receptive_field import Field
    from launch.data.batches import Sample

_TEXT = """\
Mean absolute gradient of the output map's centre by the input's pixels (Luo et al. 2016), over pictures of a split.
Give trained weights as train.init_from=RUN_DIR; without them the model is as initialised. Writes DIR/EXPERIMENT.npz:
map (H, W), profile_row (H,), profile_col (W,) and about, a JSON text that says what was measured.
Of token sets it is the field in the frame, by the pixels that the tokens were made from; the map's longest side is at
most 2048, and about.pixel_px says how many pixels of the frame lie along a side of one of its own."""
LARGEST_MAP = 2048


def pictures(config: Config, split: str, count: int, noise: bool) -> Iterator[NDArray[np.float32]]:
    """Pictures (C, H, W) of a split in an order drawn from the run's seed, or noise of their size.

    Args:
        config: Of the run; data.kind must be images or tiles.
        split: train, val or test.
        count: How many, at most as many as there are.
        noise: Uniform noise in [0, 1) instead; no data is needed.

    Raises:
        ConfigError: No such data, or token sets.
    """
    import numpy as np

    from launch.data.pictures import ImageFiles, open_files

    data, rng = config.data, np.random.default_rng(config.train.seed)
    if noise:
        square = data.crop_px if data.kind == "tiles" else data.resolution
        hw = (data.image_hw if data.kind == "images" else None) or (square, square)
        yield from (rng.random((data.channels, *hw), dtype=np.float32) for _ in range(count))
        return
    files = open_files(data)
    names = files.split[split]
    if isinstance(files, ImageFiles):
        for index in rng.permutation(len(names))[:count]:
            yield np.ascontiguousarray(files.load(names[index]).transpose(2, 0, 1))
        return
    starts = range(0, data.resolution - data.crop_px + 1, data.crop_px)
    places = [(name, y, x) for name in names for y in starts for x in starts]
    for index in rng.permutation(len(places))[:count]:
        name, y, x = places[index]
        crop = files.load_raster(name).image[y : y + data.crop_px, x : x + data.crop_px]
        yield np.ascontiguousarray(crop.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def token_sets(config: Config, split: str, count: int, noise: bool) -> Iterator[Sample]:
    """Token sets of a split as batches of one, in an order drawn from the run's seed.

    Args:
        config: Of the run, with data.kind=tokens.
        split: See `pictures`.
        count: See `pictures`.
        noise: Refused: tokens come from a picture.

    Raises:
        ConfigError: No such data, or noise.
    """
    import numpy as np

    from launch.data.batches import token_sample
    from launch.data.pictures import open_files

    if noise:
        raise ConfigError("--noise needs data.kind=images or tiles: token sets are made from pictures")
    data, rng = config.data, np.random.default_rng(config.train.seed)
    files = open_files(data)
    names = files.split[split]
    for index in rng.permutation(len(names))[:count]:
        sample = token_sample(files.load(names[index]), data.length, None, False, 0.0)  # type: ignore[arg-type]
        yield {key: sample[key][None] for key in ("tokens", "leaf_xy", "leaf_size", "valid")}


def measure(config: Config, split: str, count: int, noise: bool = False, layer: str | None = None) -> Field:
    """The field of an experiment's model (`hpc_models.training.receptive_field`).

    Args:
        config: Of the run; `train.init_from` names trained weights.
        split: See `pictures`.
        count: See `pictures`.
        noise: See `pictures`.
        layer: Layer whose output is the map, None: the model's own map.

    Raises:
        ConfigError: No pictures, a model without a map, weights that do not fit.
    """
    import torch

    from hpc_models.training.receptive_field import effective_receptive_field, token_field
    from launch.train.trainer import build_model
    from launch.train.weights import load_weights

    torch.manual_seed(config.train.seed)
    try:
        model = build_model(config)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from None
    if config.train.init_from is not None:
        load_weights(model, config.train.init_from)
    device = pick_device(config.engine.device, find_ranks())
    model.to(device)
    tokens = config.data.kind == "tokens"
    given: Iterator[Any] = (token_sets if tokens else pictures)(config, split, count, noise)
    first = next(given, None)  # what is wrong with the data is told before a progress bar is drawn
    if first is None:
        raise ConfigError(f"data.dir={config.data.dir}: no picture in {split}")

    def on_device(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: on_device(value) for key, value in values.items()}
        return torch.from_numpy(values).to(device)

    def told() -> Iterator[Any]:
        with Progress(count, "erf", "pictures") as bar:
            for values in chain((first,), given):
                yield on_device(values)
                bar.update(1)

    try:
        if tokens:
            side = config.data.resolution
            return token_field(model, told(), side, min(side, LARGEST_MAP), layer)
        return effective_receptive_field(model, told(), layer)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"erf of {config.experiment}: {error}") from None


def to_npz(field: Field, about: dict[str, Any]) -> bytes:
    """The file's bytes: map, profile_row, profile_col (float64) and about (JSON text)."""
    import numpy as np

    out = io.BytesIO()
    np.savez_compressed(
        out,
        map=field.map.numpy(),
        profile_row=field.profile_row.numpy(),
        profile_col=field.profile_col.numpy(),
        about=np.array(json.dumps(about)),
    )
    return out.getvalue()


def run(asked: argparse.Namespace) -> int:
    """The command: measure, write, and print one line."""
    config = load(asked.experiment, asked.overrides)
    out = Path(asked.out)
    field = measure(config, asked.split, asked.images, asked.noise, asked.layer)
    std, support = field.std_hw(), field.support_hw()
    about = {
        "experiment": config.experiment,
        "model": config.model_dump(mode="json")["model"],
        "weights": config.train.init_from,
        "pictures": "noise" if asked.noise else f"{config.data.dir} ({asked.split})",
        "images": field.images,
        "layer": asked.layer,
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
        return EXIT_CRASH
    height, width = (side * field.pixel_px for side in field.map.shape)
    print(
        f"{target}: {field.images} pictures of {height} x {width} px, support {support[0]} x {support[1]} px "
        f"({field.share_nonzero():.2%} of the pixels), std {std[0]:.1f} x {std[1]:.1f} px"
    )
    return EXIT_OK


def add_erf_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `erf` to the parser."""
    command = commands.add_parser(
        "erf",
        help="measure a model's effective receptive field",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("experiment", metavar="EXPERIMENT", help="a name from `python -m launch experiments`")
    command.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings to change, e.g. train.init_from=runs/..."
    )
    command.add_argument("--out", required=True, metavar="DIR", help="folder for EXPERIMENT.npz")
    command.add_argument("--images", type=_positive, default=100, metavar="N", help="pictures (default 100)")
    command.add_argument("--split", choices=("train", "val", "test"), default="test", help="default test")
    command.add_argument("--noise", action="store_true", help="noise instead of pictures; needs no data")
    command.add_argument(
        "--layer",
        metavar="NAME",
        help="output of this layer (a map, or tokens; not a layer norm) instead of the model's own map",
    )
    command.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
