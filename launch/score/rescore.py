"""`python -m launch rescore RUN --at DIR`: a run's answers, scored on frames of another size.

Dice at 1024 px and Dice at 4096 px count different pixels, so runs at different resolutions cannot be compared by their
own scores. Here a finished run's logits are enlarged to the frame of other token files of the same slides, and counted
there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from data_prep.system.progress import Progress
from launch.config.config import Config, ConfigError
from launch.records.record import RECORD_KEYS, new_record, now, read_record

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launch.data.token_files import TokenFiles

LARGEST_PX = 16_384  # the enlarged logits of a frame lie in memory as a whole
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
TOLERANCE = 0.002  # a few pixels change side on another device or with other threads

# What a finished run's record must have.
_NEEDED = ("run_id", "experiment", "config_sha256", "split_sha256", "started_at", "dice", "dice_per_slide")
# What a record measures in images of the run's own size.
_OF_OWN_FRAMES = """
    seconds_per_image images_per_s epochs timed_steps mfu preprocessing_seconds dice_ceiling dice_val score_val
""".split()


class UnfinishedError(ConfigError):
    """A run that has not finished; one of many may be left out."""


@dataclass(frozen=True)
class Rescored:
    """Test slides of one run, at its own pixels and at others."""

    own: dict[str, float]  # Dice per slide at the run's own pixels
    other: dict[str, float]  # Dice per slide at the pixels of the other files
    pooled: float  # Dice of all slides of the other files as one picture
    everything: float  # mean Dice there of a prediction that is foreground everywhere
    nothing: float  # mean Dice there of a prediction that is background everywhere


def enlarged(logits: torch.Tensor, from_wh: tuple[int, int], to_wh: tuple[int, int]) -> torch.Tensor:
    """Logits of a frame's content at another size: bilinear between pixel centres, or pooled to fewer pixels.

    Pooling is torch's adaptive mean over all pixels that a new one touches, each with full weight.

    Args:
        logits: (K, R, R) float, of a frame whose content is its upper left corner.
        from_wh: Width and height of the content in that frame.
        to_wh: Width and height of the content in the other frame.

    Returns:
        (K, height, width) of the other content.
    """
    import torch.nn.functional as F

    inside = logits[None, :, : from_wh[1], : from_wh[0]]
    size = (to_wh[1], to_wh[0])
    if to_wh[0] < from_wh[0] or to_wh[1] < from_wh[1]:
        return F.interpolate(inside, size, mode="area")[0]
    return F.interpolate(inside, size, mode="bilinear", align_corners=False)[0]


def read_run(run_dir: Path, folder: str | None) -> tuple[Config, dict[str, Any]]:
    """Settings and record of a finished segmentation run; `folder` is where its token files are now, if they moved.

    Raises:
        ConfigError: Not a run, or no segmentation.
        UnfinishedError: The run has not finished.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no run directory (it has no config.yaml)")
    record = read_record(run_dir)
    if record is None or record["status"] != "ok":
        raise UnfinishedError(f"{run_dir}: the run has not finished; only finished ones are scored")
    if lacks := [key for key in _NEEDED if not record.get(key) and record.get(key) != 0]:
        raise ConfigError(f"{run_dir / 'record.json'}: has no {lacks[0]}")
    try:
        tree = yaml.safe_load((run_dir / "config.yaml").read_text())
        if folder is not None:
            tree["data"]["dir"] = folder
        config = Config.model_validate(tree)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = str(error).splitlines()[0] if first is None else f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{run_dir / 'config.yaml'}: not settings of this version: {reason}") from None
    if config.model.task != "segmentation":
        raise ConfigError(f"{run_dir}: the run classifies; only segmentations have pixels")
    return config, record


def own_files(config: Config, record: dict[str, Any]) -> TokenFiles:
    """The run's token files of its test slides, checked.

    Raises:
        ConfigError: They do not fit the settings, or the test slides are others by now.
    """
    from launch.data.token_files import TokenFiles

    if config.data.resolution > LARGEST_PX:
        raise ConfigError(f"{config.experiment}: frames beyond {LARGEST_PX:,} px are not painted, they fill the memory")
    files = TokenFiles(config.data)
    names = files.split["test"]
    if files.split_sha256 != record["split_sha256"] or set(names) != set(record["dice_per_slide"]):
        raise ConfigError(f"{config.experiment}: data.split is another one by now than when the run was tested")
    return _of_slides(files, names)


def other_files(config: Config, names: list[str], folder: Path) -> TokenFiles:
    """The token files to score at, checked: the same slides, masks and field of view, one cell per pixel.

    Raises:
        ConfigError: One line names the file that does not fit.
    """
    from data_prep.token_files.token_file import StoreError, read_meta, token_path
    from launch.data.token_files import TokenFiles, check_same_slide

    # Compare each file with the run's own.
    own = config.data
    try:
        for name in names:
            mine, theirs = token_path(Path(own.dir), name), token_path(folder, name)
            one, two = read_meta(mine), read_meta(theirs)
            if one["params"].get("fit") == "drop":
                raise ConfigError(f"{mine}: was built with --fit drop, so that parts of the frame have no answer")
            if two["params"].get("patching") != "uniform":
                raise ConfigError(f"{theirs}: build it with --patching uniform, so that it holds every pixel")
            if two["frame_px"] > LARGEST_PX:
                raise ConfigError(f"{theirs}: frames beyond {LARGEST_PX:,} px are not enlarged, they fill the memory")
            check_same_slide(theirs, two, Path(own.dir), one)
            has, wants = (bool(meta["params"].get("fov")) for meta in (two, one))
            if has != wants:
                raise ConfigError(f"{theirs}: was built with fov {has}, {mine} with {wants}")
    except StoreError as error:
        raise ConfigError(str(error)) from None
    # Read them by the run's settings, as plain uniform tokens.
    patch, px = two["patch"], two["frame_px"]
    frame = {"resolution": px, "patch": patch, "length": (px // patch) ** 2, "patching": "uniform", "resample": "mean"}
    plain = {"kind": "tokens", "part": 1.0, "variants": (), "split_on": "edges", "thresholds": None}
    other = {"dir": str(folder), "cache_gib": 0.0, "foreground_crops": 0.0, **frame, **plain}
    return _of_slides(TokenFiles(own.model_copy(update=other)), names)


def _of_slides(files: TokenFiles, names: list[str]) -> TokenFiles:
    files.split = {part: names if part == "test" else [] for part in files.split}
    files.check()
    return files


def load_model(config: Config, run_dir: Path, device: torch.device) -> nn.Module:
    """The model of a run with the weights that its scores come from.

    Raises:
        ConfigError: There is no sound checkpoint.
    """
    from launch.train.checkpoint import find_sound
    from launch.train.trainer import build_model
    from launch.train.weights import READ_ERRORS, checkpoint_weights

    which = "best" if config.eval.select == "best" else "last"
    source = find_sound(run_dir / "checkpoints", which, lambda text: print(text, file=sys.stderr))
    if source is None:
        raise ConfigError(f"{run_dir}: no sound checkpoint ({which}); was it removed to save space?")
    model = build_model(config)
    try:
        model.load_state_dict(checkpoint_weights(source, average=config.train.ema_decay is not None))
    except READ_ERRORS as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())[:300]}") from None
    return model.to(device).eval()


def rescore(config: Config, model: nn.Module, own: TokenFiles, other: TokenFiles, device: torch.device) -> Rescored:
    """Predict the test slides at the run's own resolution; count there, and enlarged at the other one.

    Raises:
        StoreError: A token file is damaged.
    """
    import torch

    from hpc_models.training import metrics

    names = own.split["test"]
    counts = []
    with torch.no_grad(), Progress(len(names), f"rescore {config.experiment}", "slides") as bar:
        for name in names:
            counts.append(list(_slide(config, model, own, other, name, device)))
            bar.update(1)
    here, there, everything, nothing = (torch.stack(each) for each in zip(*counts, strict=True))
    return Rescored(
        own=dict(zip(names, metrics.dice_per_slide(here).tolist(), strict=True)),
        other=dict(zip(names, metrics.dice_per_slide(there).tolist(), strict=True)),
        pooled=float(metrics.dice_pooled(there)),
        everything=float(metrics.dice_per_slide(everything).mean()),
        nothing=float(metrics.dice_per_slide(nothing).mean()),
    )


def _slide(
    config: Config, model: nn.Module, own: TokenFiles, other: TokenFiles, name: str, device: torch.device
) -> Iterator[torch.Tensor]:
    """Counts (K, 3) of a slide: at its own pixels, at the others, of everything, of nothing."""
    import numpy as np
    import torch

    from data_prep.tokens.ceiling import pixel_dice_from_cells
    from data_prep.tokens.token_set import rebuild
    from launch.train.segmentation import raster_counts, raster_logits, token_logits

    def forward(inputs: Any) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            logits: torch.Tensor = model(inputs)
        return logits.float()

    # Predict and count at the run's own pixels.
    if config.data.kind == "tiles":
        raster = own.load_raster(name)
        logits, from_wh = raster_logits(forward, config, raster, device).cpu(), raster.content_wh
        mine = raster_counts((logits > 0).permute(1, 2, 0).numpy(), raster)
    else:
        tokens = own.load(name)
        assert tokens.mask_counts is not None
        cells, from_wh = token_logits(forward, config, tokens, device).numpy(), tokens.content_wh
        mine = np.stack(pixel_dice_from_cells(cells > 0, tokens.mask_counts, tokens.content_counts), axis=-1)
        mine[:, 2] = own.truth_pixels(name, tokens)
        painted = rebuild(cells, tokens.leaf_xy, tokens.leaf_size, tokens.size_px)
        logits = torch.from_numpy(painted).permute(2, 0, 1)
    yield torch.from_numpy(mine)
    # Enlarge and count at the others.
    raster = other.load_raster(name)
    width, height = raster.content_wh
    predicted = np.zeros(raster.masks.shape, bool)
    predicted[:height, :width] = (enlarged(logits, from_wh, raster.content_wh) > 0).permute(1, 2, 0).numpy()
    counts = raster_counts(predicted, raster)
    truth = counts[:, 2]
    yield torch.from_numpy(counts)
    yield torch.from_numpy(np.stack((truth, np.full_like(truth, raster.content.sum()), truth), axis=-1))
    yield torch.from_numpy(np.stack((np.zeros_like(truth), np.zeros_like(truth), truth), axis=-1))


def rescored_record(record: dict[str, Any], found: Rescored, name: str, other: TokenFiles) -> dict[str, Any]:
    """The run's record as experiment `name`, with the scores at the other pixels.

    Numbers about its own pixels alone are null.
    """
    kept = {key: value for key, value in record.items() if key in RECORD_KEYS}
    changed = {
        "experiment": name,
        "resolution": other.config.resolution,
        "data": other.config.dir,
        "dice": sum(found.other.values()) / len(found.other),
        "dice_pooled": found.pooled,
        "dice_per_slide": found.other,
        "floors": {"all_foreground": found.everything, "all_background": found.nothing},
        "finished_at": now(),
    }
    return new_record(**{**kept, **dict.fromkeys(_OF_OWN_FRAMES), **changed})
