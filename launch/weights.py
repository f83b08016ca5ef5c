"""Start a model from the weights of another run or of a file; must not import MPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from launch.checkpoint import newest_complete
from launch.config import ConfigError


def check_weights(model: nn.Module, source: str) -> None:
    """Does the source hold weights of this model? Looks at names and shapes only; the model may be on meta.

    Raises:
        ConfigError: Nothing there, or weights of another model; the line names the first that differs.
    """
    path = Path(source)
    if path.is_dir():
        stored = FileSystemReader(str(_checkpoint(source))).read_metadata().state_dict_metadata
        found = {k[6:]: tuple(getattr(v, "size", ())) for k, v in stored.items() if k.startswith("model.")}
    else:
        found = {k: tuple(v.shape) for k, v in _read(source).items()}
    asked = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for names, what in ((asked.keys() - found.keys(), "lacks"), (found.keys() - asked.keys(), "has the unknown")):
        if names:
            raise ConfigError(f"train.init_from={source}: {what} {sorted(names)[0]} ({len(names)} such weights)")
    for name in sorted(asked):
        if asked[name] != found[name]:
            raise ConfigError(
                f"train.init_from={source}: {name} is {list(found[name])}, the model's {list(asked[name])}"
            )


def load_weights(model: nn.Module, source: str) -> None:
    """Fill a bare model, before an engine wraps it; every rank does the same.

    Args:
        model: The model.
        source: A run directory (its newest complete checkpoint) or a file with a plain state dict.

    Raises:
        ConfigError: See `check_weights`, or files that cannot be read.
    """
    check_weights(model, source)
    if Path(source).is_dir():
        state = {"model": model.state_dict()}
        try:
            load_shards(state, checkpoint_id=str(_checkpoint(source)), no_dist=True)
        except (RuntimeError, ValueError, OSError, CheckpointException) as error:
            raise ConfigError(f"train.init_from={source}: {str(error).splitlines()[0]}") from None
        model.load_state_dict(state["model"])
    else:
        model.load_state_dict(_read(source))


def _checkpoint(source: str) -> Path:
    checkpoint = newest_complete(Path(source) / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"train.init_from={source}: no complete checkpoint in it")
    return checkpoint


def _read(source: str) -> dict[str, Any]:
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its pickle runs into
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"train.init_from={source}: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ConfigError(f"train.init_from={source}: holds no state dict")
    return weights
