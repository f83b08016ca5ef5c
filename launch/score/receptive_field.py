"""`python -m launch erf`: effective receptive field of an experiment's model on its pictures, as one npz file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from data_prep.system.progress import Progress
from launch.config.config import Config, ConfigError
from launch.engines.ranks import find_ranks, pick_device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hpc_models.training.receptive_field import Field
    from launch.data.batches import Sample

LARGEST_MAP = 2048


def inputs_of(config: Config, split: str, count: int, noise: bool) -> Iterator[NDArray[np.float32] | Sample]:
    """At most `count` pictures (C, H, W) or token sets of a split, in an order drawn from the run's seed.

    `noise` gives pictures of uniform noise in [0, 1) and needs no data. A token set is a batch of one.

    Raises:
        ConfigError: No such data, or noise for tokens, which come from a picture.
    """
    import numpy as np

    from launch.data.batches import token_sample
    from launch.data.pictures import ImageFiles, open_files

    data, rng = config.data, np.random.default_rng(config.train.seed)
    if noise:
        if data.kind == "tokens":
            raise ConfigError("--noise needs data.kind=images or tiles: token sets are made from pictures")
        square = data.crop_px if data.kind == "tiles" else data.resolution
        hw = (data.image_hw if data.kind == "images" else None) or (square, square)
        yield from (rng.random((data.channels, *hw), dtype=np.float32) for _ in range(count))
        return
    files = open_files(data)
    names = files.split[split]
    if data.kind == "tiles":
        assert not isinstance(files, ImageFiles)
        starts = range(0, data.resolution - data.crop_px + 1, data.crop_px)
        places = [(name, y, x) for name in names for y in starts for x in starts]
        for index in rng.permutation(len(places))[:count]:
            name, y, x = places[index]
            crop = files.load_raster(name).image[y : y + data.crop_px, x : x + data.crop_px]
            yield np.ascontiguousarray(crop.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
        return
    for index in rng.permutation(len(names))[:count]:
        if isinstance(files, ImageFiles):
            yield np.ascontiguousarray(files.load(names[index]).transpose(2, 0, 1))
        else:
            sample = token_sample(files.load(names[index]), data.length, None, False, 0.0)
            yield {key: sample[key][None] for key in ("tokens", "leaf_xy", "leaf_size", "valid")}


def measure(config: Config, split: str, count: int, noise: bool = False, layer: str | None = None) -> Field:
    """The field of an experiment's model (`hpc_models.training.receptive_field`) on at most `count` inputs of a split.

    `train.init_from` names trained weights. `layer` is the layer whose output is the map; None is the model's own map.

    Raises:
        ConfigError: No pictures, a model without a map, or weights that do not fit.
    """
    import torch

    from hpc_models.training.receptive_field import effective_receptive_field, token_field
    from launch.train.trainer import build_model
    from launch.train.weights import load_weights

    # The model with its weights.
    torch.manual_seed(config.train.seed)
    try:
        model = build_model(config)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from None
    if config.train.init_from is not None:
        load_weights(model, config.train.init_from)
    device = pick_device(config.engine.device, find_ranks())
    model.to(device)
    # The inputs; the first one is read before a progress bar is drawn, since the data may be wrong.
    given = inputs_of(config, split, count, noise)
    first = next(given, None)
    if first is None:
        raise ConfigError(f"data.dir={config.data.dir}: no picture in {split}")

    def on_device(values: Any) -> Any:
        if isinstance(values, dict):
            return {key: on_device(value) for key, value in values.items()}
        return torch.from_numpy(values).to(device)

    def shown() -> Iterator[Any]:
        with Progress(count, "erf", "pictures") as bar:
            for values in chain((first,), given):
                yield on_device(values)
                bar.update(1)

    try:
        if config.data.kind == "tokens":
            side = config.data.resolution
            return token_field(model, shown(), side, min(side, LARGEST_MAP), layer)
        return effective_receptive_field(model, shown(), layer)
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
