"""`python -m launch bench`: seconds per image of the paper's rows on this machine, the same kernels on both sides.

Training steps (forward, loss, backward, optimiser) and forward passes on random tokens over random trees: what is timed
is arithmetic, not learning. Every row is one JSON line with the machine, the versions and the kernels that ran; rows
that are there already are not run again. Importing it must not import torch.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.system.files import write_atomic
from data_prep.system.progress import Progress
from launch.config.config import Config, ConfigError
from launch.experiments.load import family, load
from launch.records.record import environment, git_commit, now
from launch.records.text_table import text_table

if TYPE_CHECKING:
    import torch
    from torch import nn

FIGURE3 = (19, 43, 61, 84, 104, 118, 127, 139, 160, 182, 214, 290, 511)  # lengths like those of the paper's v = 100
WARMUP = 3


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: Of the row, unique.
        config: Experiment whose model is built.
        batch: Images per step.
        lengths: Valid tokens of each image; empty: all of L.
        monai: MONAI's UNETR instead of ours.
        compiled: torch.compile block by block.
    """

    name: str
    config: Config
    batch: int = 1
    lengths: tuple[int, ...] = ()
    monai: bool = False
    compiled: bool = False


def rows(words: list[str]) -> Iterator[Row]:
    """All rows: APF's and UNETR's of Table III, ours against MONAI's at P = 16, packed against padded sequences."""
    for name in family("paip"):
        if not name.endswith(("_transunet", "_unet")):
            config = load(name, words)
            # What does not fit a GPU is not a row: the convolutional decoder of a 16K frame and above.
            if config.data.patching == "apf" or config.data.resolution <= 1024:
                yield Row(name, config)
                yield Row(f"{name}+compile", config, compiled=True)
    sixteen = load("paip_512_uniform_p16", words)
    yield Row("unetr16-ours", sixteen, batch=4)
    yield Row("unetr16-monai", sixteen, batch=4, monai=True)
    base = [*words, "model.decoder=token", "model.position=geom", "data.length=1024"]
    for kind in ("full", "packed"):
        config = load("paip_512", [*base, f"model.attention={kind}"])
        yield Row(f"lengths-{kind}", config, batch=len(FIGURE3), lengths=tuple(2 * n for n in FIGURE3))


def random_tree(resolution: int, patch: int, leaves: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Squares (N, 3) x, y, side in Morton order of a random quadtree of at most `leaves` leaves (N = 1 mod 3).

    Large leaves are split first, with some chance: as a tree over a picture, fine in places and coarse elsewhere.
    """
    from data_prep.tree.quadtree import morton

    found = [(0, 0, resolution)]
    done: list[tuple[int, int, int]] = []
    while found and len(found) + len(done) + 3 <= leaves:
        x, y, side = found.pop(int(rng.integers(max(1, len(found) // 2))))
        if side <= patch:
            done.append((x, y, side))
            continue
        half = side // 2
        found += [(x, y, half), (x + half, y, half), (x, y + half, half), (x + half, y + half, half)]
    squares = np.array(found + done, np.int64)
    return squares[np.argsort(morton(squares[:, 0], squares[:, 1]))]


def make_batch(row: Row, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, masks and content over uniform squares or random trees, on the device."""
    import torch

    data, rng = row.config.data, np.random.default_rng(seed)
    length, p = data.length, data.patch
    xy, size = np.zeros((row.batch, length, 2), np.int64), np.zeros((row.batch, length), np.int64)
    for i in range(row.batch):
        asked = row.lengths[i] if row.lengths else length
        if data.patching == "uniform":
            cells = data.resolution // p
            place = np.arange(cells * cells)
            squares = np.stack([place % cells * p, place // cells * p, np.full(len(place), p)], axis=1)[:asked]
        else:
            squares = random_tree(data.resolution, p, asked, rng)
        xy[i, : len(squares)], size[i, : len(squares)] = squares[:, :2], squares[:, 2]
    valid = torch.from_numpy(size > 0)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(row.batch, length, p, p, data.channels, generator=generator)
    content = torch.from_numpy((size.astype(np.float64) / p) ** 2).float()[..., None, None].expand(-1, -1, p, p)
    share = torch.rand(row.batch, length, p, p, data.classes, generator=generator)
    made = {
        "tokens": tokens,
        "leaf_xy": torch.from_numpy(xy),
        "leaf_size": torch.from_numpy(size),
        "valid": valid,
        "content_counts": content.contiguous(),
        "mask_counts": (content[..., None] * share).round(),
    }
    return {key: value.to(device) for key, value in made.items()}


def make_model(row: Row, device: torch.device) -> nn.Module:
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


def measure(row: Row, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time one row.

    Returns:
        Numbers with units; `error` instead of times when the memory is not enough.
    """
    import torch

    from hpc_models.blocks import sdpa
    from hpc_models.tokens.batch import join_patches
    from hpc_models.training.losses import bce_dice
    from launch.records.flops import Speed, peak_tflops

    bf16 = row.config.train.precision == "bf16"
    sdpa.reset_used()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    found: dict[str, Any] = {"name": row.name, "batch": row.batch, "precision": row.config.train.precision}
    data = row.config.data
    found |= {
        "model": "unetr (MONAI)" if row.monai else row.config.model.name,
        "patching": data.patching,
        "decoder": row.config.model.decoder_name,
        "resolution": data.resolution,
        "patch": data.patch,
        "length": data.length,
        "compiled": row.compiled,
    }
    try:
        model, batch = make_model(row, device), make_batch(row, device)
        found["tokens_per_image"] = float(batch["valid"].sum()) / row.batch
        found["parameters"] = sum(p.numel() for p in model.parameters())
        side = data.resolution // data.patch
        image = join_patches(batch["tokens"], side, side) if row.monai else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        speed = Speed(peak_tflops(_name(device), row.config.train.precision))

        def forward() -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
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

        speed.begin({"valid": batch["valid"].cpu()})
        with speed.forward():
            forward()
        speed.stepped()
        train = _times(step, device, seconds)
        model.eval()
        with torch.no_grad():
            alone = _times(lambda: forward(), device, seconds / 3)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        return {**found, "error": str(error).splitlines()[0]}
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
    return found


def _times(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call after the warm-up, for about so long; at least three calls."""
    import torch

    for _ in range(WARMUP):
        work()
    out: list[float] = []
    end = time.perf_counter() + seconds
    while len(out) < 3 or (time.perf_counter() < end and len(out) < 1000):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        out.append(time.perf_counter() - begin)
    return out


def _name(device: torch.device) -> str:
    from launch.engines.ranks import device_name

    return device_name(device)


def add_bench_command(commands: Any) -> None:
    """Add `bench` to the command line."""
    text = "time the rows of the paper's Table III on this machine: training steps, forward passes, memory, MFU"
    command = commands.add_parser(
        "bench",
        help=text,
        description=text + ". Rows that stand in OUT/bench.jsonl already are not run again; what does not fit the "
        "memory is a row too.",
        epilog="examples: python -m launch bench --out analysis/measured/h100; "
        "python -m launch bench --rows 'paip_512*' model.width=64 model.depth=2",
    )
    command.add_argument("--rows", default="*", metavar="PATTERN", help="names to run, e.g. 'paip_64k*' (default: all)")
    command.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default: out/bench")
    command.add_argument("--seconds", type=float, default=5.0, help="per measurement (default: 5)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there")
    command.add_argument("--list", action="store_true", help="only print the names of the rows")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every row")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench`; returns the exit code.

    Raises:
        ConfigError: No row has such a name, or a setting is wrong.
    """
    asked = [row for row in rows(list(args.overrides)) if fnmatch.fnmatch(row.name, args.rows)]
    if not asked:
        raise ConfigError(f"--rows {args.rows}: no such row; `--list` prints them")
    if not 0 < args.seconds < math.inf:
        raise ConfigError(f"--seconds must be positive, got {args.seconds:g}")
    if args.list:
        print("\n".join(row.name for row in asked))
        return 0
    from launch.engines.ranks import find_ranks, pick_device

    device = pick_device(args.device, find_ranks({}))
    path = args.out / "bench.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "env.json", json.dumps(environment(["-"], [_name(device)], "alone"), indent=1).encode())
    have = {line["name"] for line in lines if line.get("overrides") == list(args.overrides)}
    with Progress(len(asked), "bench", "rows") as bar:
        for row in asked:
            if row.name not in have:
                line = measure(row, device, args.seconds)
                line |= {
                    "device_name": _name(device),
                    "commit": git_commit(),
                    "at": now(),
                    "overrides": list(args.overrides),
                    "warmup_rule": f"the first {WARMUP} steps are left out",
                }
                lines.append(line)
                write_atomic(path, "".join(json.dumps(x) + "\n" for x in lines).encode())
            bar.update(1, row.name)
    print(table(lines))
    print(f"wrote {path}", file=sys.stderr)
    return 0


def table(lines: list[dict[str, Any]]) -> str:
    """The rows as text for people."""
    body: list[tuple[str, ...]] = [("row", "L", "batch", "s/image", "forward", "MFU %", "GiB", "attention")]
    for line in lines:
        if "error" in line:
            body.append((line["name"], str(line["length"]), str(line["batch"]), "-", "-", "-", "-", line["error"][:60]))
            continue
        mfu = "-" if line["mfu"] is None else f"{100 * line['mfu']:.1f}"
        memory = f"{line['peak_memory_gib']:.1f}" if "peak_memory_gib" in line else "-"
        body.append(
            (
                line["name"],
                f"{line['tokens_per_image']:.0f}",
                str(line["batch"]),
                f"{line['seconds_per_image']:.4g}",
                f"{line['forward_seconds_per_image']:.4g}",
                mfu,
                memory,
                str(line["attention_backend"]),
            )
        )
    return text_table(body)
