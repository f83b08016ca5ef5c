"""Weights of a run directory, or of a file that torch.load reads, as a plain state dict."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from launch.config.config import Config, ConfigError, differing_keys
from launch.train.checkpoint import newest_complete

Weights = dict[str, torch.Tensor]
UNLEARNED = ("model.checkpointing", "model.prior")  # settings that trained weights do not depend on
READ_ERRORS = (RuntimeError, ValueError, OSError, KeyError, CheckpointException)


def check_weights(model: nn.Module, source: str) -> None:
    """Check by names and shapes that the source holds weights of this model, which may be on meta.

    Raises:
        ConfigError: It does not; the line names the first weight that differs.
    """
    found = {k: tuple(v.shape) for k, v in _read(source, shapes_only=True).items()}
    asked = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for names, what in ((asked.keys() - found.keys(), "lacks"), (found.keys() - asked.keys(), "has the unknown")):
        if names:
            raise ConfigError(f"train.init_from={source}: {what} {sorted(names)[0]} ({len(names)} such weights)")
    for name in sorted(asked):
        if asked[name] != found[name]:
            raise ConfigError(
                f"train.init_from={source}: {name} is {list(found[name])}, the model's {list(asked[name])}"
            )


def other_settings(config: Config) -> list[str]:
    """Model settings that differ between the run behind `train.init_from` and this one, as `key: there -> here`.

    Names and shapes alone do not tell them: filters may be standardised or not. A file of weights says nothing.
    """
    source = Path(config.train.init_from or "")
    try:
        there = yaml.safe_load((source / "config.yaml").read_text())
        found = differing_keys({"model": dict(there["model"])}, {"model": config.model_dump(mode="json")["model"]})
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return []
    return [line for line in found if line.split(":")[0] not in UNLEARNED]


def load_weights(model: nn.Module, source: str) -> None:
    """Fill a bare model before an engine wraps it, from a run's newest complete checkpoint or from a file.

    Raises:
        ConfigError: The weights do not fit (see `check_weights`) or cannot be read.
    """
    check_weights(model, source)
    model.load_state_dict(_read(source))


def checkpoint_weights(checkpoint: Path, average: bool = False, shapes_only: bool = False) -> Weights:
    """The whole model in a checkpoint folder `step-N` of any engine, by the bare model's names; needs no other rank.

    Args:
        average: Give the running average of the weights (train.ema_decay), not the last ones.
        shapes_only: Give tensors on meta, where that is cheaper.

    Raises:
        ConfigError: The checkpoint has no average.
        RuntimeError, ValueError, OSError, KeyError, CheckpointException: It is damaged.
    """
    notes = json.loads((checkpoint / "notes.json").read_text())
    if notes["engine"] == "deepspeed":
        if average:
            raise ConfigError("engine.name=deepspeed keeps no running average of the weights")
        return _zero_weights(checkpoint, int(notes["zero"]))
    stored = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    wanted = ("model", "average") if average else ("model",)
    device = "meta" if shapes_only else "cpu"
    tree: dict[str, Weights] = {}
    for part in wanted:
        tree[part] = {
            key.removeprefix(f"{part}."): torch.empty(value.size, dtype=value.properties.dtype, device=device)
            for key, value in stored.items()
            if key.startswith(f"{part}.") and isinstance(value, TensorStorageMetadata)
        }
    if average and not tree["average"]:
        raise ConfigError("it holds no running average of the weights (train.ema_decay was null)")
    if not shapes_only:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
            load_shards(tree, checkpoint_id=str(checkpoint), no_dist=True)
    return {**tree["model"], **tree.get("average", {})}


def _zero_weights(checkpoint: Path, stage: int) -> Weights:
    """DeepSpeed's shards put together; the fp32 copies of a training in bf16."""
    from launch.engines.deepspeed import TAG, import_deepspeed

    import_deepspeed()
    if stage == 0:  # nothing is sharded, and DeepSpeed's own reader refuses it
        files = sorted((checkpoint / TAG).glob("mp_rank_*_model_states.pt"))
        whole: Weights = torch.load(files[0], map_location="cpu", weights_only=False)["module"]
        return {name: value.float() if value.is_floating_point() else value for name, value in whole.items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    quiet = io.StringIO()  # it has bars and lines of its own
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        state: Weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: value.detach().clone() for name, value in state.items()}


def _read(source: str, shapes_only: bool = False) -> Weights:
    try:
        if Path(source).is_dir():
            checkpoint = newest_complete(Path(source) / "checkpoints")
            if checkpoint is None:
                raise ConfigError(f"train.init_from={source}: no complete checkpoint in it")
            return checkpoint_weights(checkpoint, shapes_only=shapes_only)
    except ConfigError:
        raise
    except READ_ERRORS as error:
        raise ConfigError(f"train.init_from={source}: {str(error).splitlines()[0]}") from None
    try:
        weights: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its pickle runs into
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"train.init_from={source}: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ConfigError(f"train.init_from={source}: holds no state dict")
    return weights
