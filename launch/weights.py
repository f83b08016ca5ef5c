"""Start a model from the weights of another run or of a file; must not import MPI."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from launch.checkpoint import newest_complete
from launch.config import ConfigError


def load_weights(model: nn.Module, source: str) -> None:
    """Fill a bare model, before an engine wraps it; every rank does the same.

    Args:
        model: The model.
        source: A run directory (its newest complete checkpoint) or a file with a plain state dict.

    Raises:
        ConfigError: Nothing there, or weights of another model; the line names the first that differ.
    """
    path = Path(source)
    if path.is_dir():
        checkpoint = newest_complete(path / "checkpoints")
        if checkpoint is None:
            raise ConfigError(f"train.init_from={source}: no complete checkpoint in it")
        stored = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
        found = {k.removeprefix("model.") for k in stored if k.startswith("model.")}
        _compare(found, model, source)
        state = {"model": model.state_dict()}
        try:
            load_shards(state, checkpoint_id=str(checkpoint), no_dist=True)
        except (RuntimeError, ValueError, CheckpointException) as error:
            raise ConfigError(f"train.init_from={source}: {str(error).splitlines()[0]}") from None
        weights = state["model"]
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ConfigError(f"train.init_from={source}: {reason}") from None
        if not isinstance(weights, dict):
            raise ConfigError(f"train.init_from={source}: holds no state dict")
        _compare(set(weights), model, source)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConfigError(f"train.init_from={source}: {lines[min(1, len(lines) - 1)].strip()}") from None


def _compare(found: set[str], model: nn.Module, source: str) -> None:
    asked = set(model.state_dict())
    for names, what in ((asked - found, "lacks"), (found - asked, "has the unknown")):
        if names:
            raise ConfigError(f"train.init_from={source}: {what} {sorted(names)[0]} ({len(names)} such weights)")
