"""`python -m launch bench`: seconds per image of the paper's rows on this machine, with the same kernels for all.

It times training steps (forward, loss, backward, optimiser) and forward passes on random tokens over made-up trees:
arithmetic, not learning. Every row is one JSON line with the machine, the versions and the kernels. Finished rows are
skipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.config.config import Config, ConfigError
from launch.experiments.load import family, load
from launch.records.text_table import text_table

if TYPE_CHECKING:
    import torch
    from torch import nn

FIGURE3 = (19, 43, 61, 84, 104, 118, 127, 139, 160, 182, 214, 290, 511)  # lengths like those of the paper's v = 100
WARMUP = 3


@dataclass(frozen=True)
class BenchRow:
    """One measurement."""

    name: str  # unique
    config: Config  # experiment whose model is built
    batch: int = 1  # images per step
    lengths: tuple[int, ...] = ()  # valid tokens of each image; empty: all of L
    monai: bool = False  # MONAI's UNETR instead of ours
    compiled: bool = False  # torch.compile block by block


def rows(words: list[str]) -> Iterator[BenchRow]:
    """All rows: APF's and UNETR's of Table III, ours against MONAI's at P = 16, packed against padded sequences."""
    for name in family("paip"):
        if not name.endswith(("_transunet", "_unet")):
            config = load(name, words)
            # The convolutional decoder of large frames does not fit a GPU.
            if config.data.patching == "apf" or config.data.resolution <= 1024:
                yield BenchRow(name, config)
                yield BenchRow(f"{name}+compile", config, compiled=True)
    sixteen = load("paip_512_uniform_p16", words)
    yield BenchRow("unetr16-ours", sixteen, batch=4)
    yield BenchRow("unetr16-monai", sixteen, batch=4, monai=True)
    base = [*words, "model.decoder=token", "model.position=geom", "data.length=1024"]
    for kind in ("full", "packed"):
        config = load("paip_512", [*base, f"model.attention={kind}"])
        yield BenchRow(f"lengths-{kind}", config, batch=len(FIGURE3), lengths=tuple(2 * n for n in FIGURE3))


def make_batch(row: BenchRow, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, masks and content over made-up leaves, on the device."""
    import torch

    from launch.plan.step import made_up_leaves

    data, length, p = row.config.data, row.config.data.length, row.config.data.patch
    xy, size = np.zeros((row.batch, length, 2), np.int64), np.zeros((row.batch, length), np.int64)
    for i, asked in enumerate(row.lengths or [length] * row.batch):
        places, sides = (array[:asked] for array in made_up_leaves(data, asked))
        xy[i, : len(places)], size[i, : len(sides)] = places, sides
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(row.batch, length, p, p, data.channels, generator=generator)
    content = torch.from_numpy((size.astype(np.float64) / p) ** 2).float()[..., None, None].expand(-1, -1, p, p)
    share = torch.rand(row.batch, length, p, p, data.classes, generator=generator)
    made = {
        "tokens": tokens,
        "leaf_xy": torch.from_numpy(xy),
        "leaf_size": torch.from_numpy(size),
        "valid": torch.from_numpy(size > 0),
        "content_counts": content.contiguous(),
        "mask_counts": (content[..., None] * share).round(),
    }
    return {key: value.to(device) for key, value in made.items()}


def make_model(row: BenchRow, device: torch.device) -> nn.Module:
    """The row's model on the device.

    Raises:
        ConfigError: MONAI is not installed.
    """
    import torch

    from launch.engines.base import units_of
    from launch.train.trainer import build_model

    torch.manual_seed(0)
    if row.monai:
        try:
            from monai.networks.nets.unetr import UNETR
        except ImportError:
            raise ConfigError("the row unetr16-monai needs MONAI: pip install monai==1.6.1 torch==2.13.0") from None
        data = row.config.data
        model: nn.Module = UNETR(
            in_channels=data.channels, out_channels=data.classes, img_size=data.resolution, spatial_dims=2
        )
    else:
        model = build_model(row.config)
    model = model.to(device).train()
    if row.compiled:
        for unit in units_of(model):
            unit.compile()
    return model


def measure(row: BenchRow, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time one row; returns numbers with units, and `error` in place of times when memory is short."""
    data = row.config.data
    found: dict[str, Any] = {
        "name": row.name,
        "batch": row.batch,
        "precision": row.config.train.precision,
        "model": "unetr (MONAI)" if row.monai else row.config.model.name,
        "patching": data.patching,
        "decoder": row.config.model.decoder_name,
        "resolution": data.resolution,
        "patch": data.patch,
        "length": data.length,
        "compiled": row.compiled,
    }
    try:
        _time_row(row, device, seconds, found)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        found["error"] = str(error).splitlines()[0]
    return found


def _time_row(row: BenchRow, device: torch.device, seconds: float, found: dict[str, Any]) -> None:
    """Fill in what is measured."""
    import torch

    from hpc_models.blocks import sdpa
    from hpc_models.tokens.batch import join_patches
    from hpc_models.training.losses import bce_dice
    from launch.engines.ranks import device_name
    from launch.records.flops import Speed, peak_tflops

    # Model, batch and optimiser.
    sdpa.reset_used()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    precision, side = row.config.train.precision, row.config.data.resolution // row.config.data.patch
    model, batch = make_model(row, device), make_batch(row, device)
    found["tokens_per_image"] = float(batch["valid"].sum()) / row.batch
    found["parameters"] = sum(p.numel() for p in model.parameters())
    image = join_patches(batch["tokens"], side, side) if row.monai else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out: torch.Tensor = model(image if image is not None else batch)
        return out.float()

    def step() -> None:
        logits = forward()
        if image is not None:
            target = join_patches((batch["mask_counts"] > 0).float(), side, side)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        else:
            loss = bce_dice(logits, batch["mask_counts"], batch["content_counts"]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # Count one forward pass, then time steps and forward passes.
    speed = Speed(peak_tflops(device_name(device), precision))
    speed.begin({"valid": batch["valid"].cpu()})
    with speed.forward():
        forward()
    speed.stepped()
    train = _times(step, device, seconds)
    model.eval()
    with torch.no_grad():
        alone = _times(forward, device, seconds / 3)
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    median = statistics.median(train)
    found |= {
        "seconds_per_image": median / row.batch,
        "forward_seconds_per_image": statistics.median(alone) / row.batch,
        "images_per_s": row.batch / median,
        "mfu": speed.mfu(median),
        "steps": len(train),
        "spread": (max(train) - min(train)) / median,
        "attention_backend": ", ".join(sdpa.used()) or None,
    }


def _times(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call after the warm-up, for about so long; at least three calls."""
    from launch.preflight.probes import wait_for

    for _ in range(WARMUP):
        work()
    out: list[float] = []
    end = time.perf_counter() + seconds
    while len(out) < 3 or (time.perf_counter() < end and len(out) < 1000):
        wait_for(device)
        begin = time.perf_counter()
        work()
        wait_for(device)
        out.append(time.perf_counter() - begin)
    return out


def table(lines: list[dict[str, Any]]) -> str:
    """The rows as text for people."""
    body: list[tuple[str, ...]] = [("row", "L", "batch", "s/image", "forward", "MFU %", "GiB", "attention")]
    for line in lines:
        if "error" in line:
            body.append((line["name"], str(line["length"]), str(line["batch"]), "-", "-", "-", "-", line["error"][:60]))
            continue
        mfu = "-" if line["mfu"] is None else f"{100 * line['mfu']:.1f}"
        memory = f"{line['peak_memory_gib']:.1f}" if "peak_memory_gib" in line else "-"
        times = (f"{line[f'{kind}seconds_per_image']:.4g}" for kind in ("", "forward_"))
        size = (f"{line['tokens_per_image']:.0f}", str(line["batch"]))
        body.append((line["name"], *size, *times, mfu, memory, str(line["attention_backend"])))
    return text_table(body)
