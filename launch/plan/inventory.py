"""`python -m launch models`: what every model costs, from shapes alone.

Models are built and run on torch's meta device, which computes nothing: a 64K model is counted on a laptop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from launch.config.config import Config, TrainConfig, model_class
from launch.config.data import DataConfig
from launch.records.text_table import text_table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launch.data.batches import Batch

# Picture (height, width) that a model is made for; others are counted at 224 px.
PICTURES: dict[str, tuple[int, int]] = {
    "def_gmic": (3328, 2560),
    "gmic": (3328, 2560),
    "hct": (3328, 2560),
    "hipt": (4096, 4096),
    "hiri_vit": (448, 448),
    "rivit": (160, 160),
}
GRAY = ("def_gmic", "gmic", "hct")
FRAME_PX, PATCH_PX = 512, 16
GIB = 2**30
NOTES = """\
One forward pass of the whole batch. MACs: multiply-accumulates of convolutions, linear maps and attention; FLOPs = 2 x
MACs (papers often print MACs as "GFLOPs"). Norms, pooling, interpolation and other elementwise work are not counted.
Activations: what the backward pass keeps in fp32, without the weights."""


@dataclass(frozen=True)
class ModelCost:
    """What one forward pass of a batch takes."""

    parameters: int  # all weights
    trainable: int  # weights with a gradient
    macs: int  # multiply-accumulates
    flops: int  # twice that
    activation_bytes: int  # what the backward pass keeps of the forward pass
    weight_bytes: int  # the weights in fp32


def measure(model: nn.Module, inputs: torch.Tensor | Batch) -> ModelCost:
    """ModelCost of `model(inputs)` in training, both on meta: torch counts nothing for attention on CPUs.

    Raises:
        ValueError: The model is not on the meta device.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    weights = list(model.parameters())
    if any(not weight.is_meta for weight in weights):
        raise ValueError("costs are counted on the meta device")
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no key is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        answer = model(inputs)
    flops = int(counter.get_total_flops())
    del answer
    return ModelCost(
        parameters=sum(weight.numel() for weight in weights),
        trainable=sum(weight.numel() for weight in weights if weight.requires_grad),
        macs=flops // 2,
        flops=flops,
        activation_bytes=sum(storage.nbytes() for storage in kept.values()),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
    )


def meta_inputs(config: Config) -> Batch:
    """A batch of `train.batch` inputs as the data section describes them, on the meta device."""
    import torch

    data, b = config.data, config.train.batch
    if data.kind == "images":
        h, w = data.image_hw or (data.resolution, data.resolution)
        return {"image": torch.empty(b, data.channels, h, w, device="meta")}
    side, length = (data.crop_px, 1) if data.kind == "tiles" else (data.patch, data.length)
    return {
        "tokens": torch.empty(b, length, side, side, 3, device="meta"),
        "leaf_xy": torch.empty(b, length, 2, dtype=torch.int64, device="meta"),
        "leaf_size": torch.empty(b, length, dtype=torch.int64, device="meta"),
        "valid": torch.empty(b, length, dtype=torch.bool, device="meta"),
    }


def reference(name: str, batch: int = 1) -> Config:
    """A model with its default settings on a typical input: 512-px frames in 16-px tokens, or pictures.

    Raises:
        ConfigError: No such model.
    """
    settings = model_class(name)
    labels, classes = (None, 1) if settings.task == "segmentation" else ("folders", 2)
    if "images" in settings.inputs:
        hw = PICTURES.get(name, (224, 224))
        channels: Literal[1, 3] = 1 if name in GRAY else 3
        size: dict[str, Any] = {"resolution": max(hw), "image_hw": hw, "channels": channels}
        data = DataConfig(dir="-", kind="images", labels="folders", classes=classes, **size)
    else:
        kind: Literal["tokens", "tiles"] = "tokens" if "tokens" in settings.inputs else "tiles"
        size = {"resolution": FRAME_PX, "patch": PATCH_PX, "length": (FRAME_PX // PATCH_PX) ** 2, "crop_px": FRAME_PX}
        data = DataConfig(dir="-", kind=kind, patching="uniform", labels=labels, classes=classes, **size)
    return Config(experiment="-", data=data, model=settings(), train=TrainConfig(batch=batch, max_steps=1))


def describe_input(config: Config) -> str:
    """The input of one forward pass in words."""
    data = config.data
    if data.kind == "images":
        h, w = data.image_hw or (data.resolution, data.resolution)
        return f"{data.channels} x {h} x {w} px"
    if data.kind == "tiles":
        return f"3 x {data.crop_px} x {data.crop_px} px"
    return f"{data.length} tokens of {data.patch} px"


def inventory(configs: dict[str, Config]) -> list[dict[str, Any]]:
    """One row per configuration; a model that cannot be built has an `error` instead of numbers."""
    import torch

    from launch.train.trainer import build_model

    rows = []
    for label, config in configs.items():
        row: dict[str, Any] = {
            "name": label,
            "model": config.model.name,
            "task": config.model.task,
            "inputs": list(config.model.inputs),
            "input": describe_input(config),
            "batch": config.train.batch,
            "reconstruction": config.model.reconstruction,
        }
        try:
            with torch.device("meta"):
                model = build_model(config)
                row |= asdict(measure(model, meta_inputs(config)))
        except ValueError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    head = ["name", "task", "data", "input", "parameters", "GMACs", "GFLOPs", "activations GiB"]
    lines = [head]
    for row in rows:
        name = row["name"] + (" (a reconstruction)" if row["reconstruction"] else "")
        first = [name, row["task"], ",".join(row["inputs"]), row["input"]]
        if "error" in row:
            lines.append([*first, row["error"]])
            continue
        gib = row["activation_bytes"] / GIB
        lines.append(
            [*first, f"{row['parameters']:,}", f"{row['macs'] / 1e9:,.3f}", f"{row['flops'] / 1e9:,.3f}", f"{gib:,.3f}"]
        )
    batches = sorted({row["batch"] for row in rows})
    return f"{text_table(lines, left=4)}\n\nbatch: {', '.join(map(str, batches))}\n{NOTES}"
