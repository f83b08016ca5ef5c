"""Experiments and records as steps that the scaling model can time: arithmetic, bytes, spread of lengths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs.records import Row
from analysis.runs.run_files import logged_tokens
from analysis.scaling.costs import ForwardCost, cost_of
from analysis.scaling.model import Work, expected_largest
from launch.config.config import Config, ConfigError, validate
from launch.config.sites import Site

BYTES_PER_CELL = 3 + 4 + 4  # colour, content and one class of a token file's cell


def work_of(
    config: Config, cost: ForwardCost, gpus: int, images: float, site: Site, tokens: float | None = None
) -> Work:
    """One step of an experiment on some GPUs of a site, `images` frames per GPU."""
    engine = config.engine
    shard = 1 if engine.name == "ddp" else (engine.shard or site.hardware.gpus_per_node)
    cells = (tokens or config.data.length) * config.data.patch**2
    return Work(
        gpus=gpus,
        images=images,
        encoder=cost.encoder,
        decoder=cost.decoder,
        weights=cost.weights,
        precision=config.train.precision,
        shard=min(shard, gpus),
        recompute=bool(getattr(config.model, "checkpointing", False)),
        image_bytes=float(cells * BYTES_PER_CELL),
        save_every_s=config.checkpoint.every_seconds,
    )


def cost_over(
    config: Config, lengths: Sequence[int], together: int = 1
) -> tuple[ForwardCost, tuple[float, ...]] | None:
    """Mean cost of slides of these lengths, and the cost of each over it; None without a closed formula.

    The mean of the costs, not the cost of the mean: attention grows with the square of the length.

    Args:
        config: The experiment.
        lengths: Tokens of each slide.
        together: Images that a rank computes at once: but for packed sequences, the transformer computes each to the
            length of the longest of them.

    Returns:
        The second value is () where every slide costs the same.
    """
    counted = Counter(lengths)
    costs = {n: cost for n in counted if (cost := cost_of(config, n)) is not None}
    if not counted or len(costs) < len(counted):
        return None
    total = sum(counted.values())
    packed = getattr(config.model, "attention", "full") == "packed"
    encoder = expected_largest([costs[n].encoder for n in lengths], 1 if packed else together)
    decoder = sum(costs[n].decoder * k for n, k in counted.items()) / total
    one = next(iter(costs.values()))
    tokens = sum(costs[n].tokens * k for n, k in counted.items()) / total
    mean = sum(costs[n].flops * k for n, k in counted.items()) / total
    each = tuple(costs[n].flops / mean for n in lengths)
    return ForwardCost(encoder, decoder, one.weights, round(tokens)), each if max(each) - min(each) > 1e-9 else ()


def read_spread(folder: Path) -> list[int]:
    """Tokens of every slide in a folder of token files, by its build log.

    Raises:
        ConfigError: There is none; one line names the folder.
    """
    found = logged_tokens(folder)
    if not found or max(found) < 1:
        raise ConfigError(f"--lengths {folder}: no build_log.jsonl with tokens (a folder that `data_prep build` wrote)")
    return found


def experiment_work(
    config: Config, gpus: int, images: float, site: Site, lengths: Sequence[int] = (), read_mb_s: float = 2000.0
) -> Work:
    """One step of a named experiment.

    Args:
        config: The experiment.
        gpus: N.
        images: Images per GPU.
        site: Where.
        lengths: Tokens of real slides. Where given, an adaptive experiment computes valid tokens only, and its slides
            have these lengths, scaled so that the longest fills its L.
        read_mb_s: What one node reads from the file system.

    Raises:
        ConfigError: A model without a closed cost formula.
    """
    found: tuple[ForwardCost, tuple[float, ...]] | None = None
    tokens = None
    if lengths and config.data.patching == "apf" and hasattr(config.model, "attention"):
        scale = config.data.length / max(lengths)
        scaled = [max(1, round(n * scale)) for n in lengths]
        changed: dict[str, Any] = {"attention": "packed"}
        packed = config.model_copy(update={"model": replace(config.model, **changed)})
        found, tokens = cost_over(packed, scaled), float(np.mean(scaled))
    elif (cost := cost_of(config)) is not None:
        found = cost, ()
    if found is None:
        raise ConfigError(f"{config.experiment}: no closed cost formula for model {config.model.name}")
    work = work_of(config, found[0], gpus, images, site, tokens)
    return replace(work, spread=found[1], read_mb_s=read_mb_s)


@dataclass(frozen=True)
class Measured:
    """A record as the model sees it."""

    run: Row
    work: Work
    seconds: float  # of one step


def measured(runs: Sequence[Row], site: Site) -> tuple[list[Measured], list[str]]:
    """Return the records that the model can be fitted to, and a line for each that it cannot.

    One fit is of one machine: records of other hardware than most of the usable ones have are left out.
    """
    usable, left = [], []
    for run in runs:
        found = _measured(run, site)
        if isinstance(found, str):
            left.append(f"{run.experiment}/{run.run_id}: {found}")
        else:
            usable.append(found)
    machines = Counter(_machine(m.run) for m in usable)
    if len(machines) > 1:
        most = max(sorted(machines), key=lambda name: machines[name])
        left += [
            f"{m.run.experiment}/{m.run.run_id}: ran on {_machine(m.run)}, most records on {most}; one fit, one machine"
            for m in usable
            if _machine(m.run) != most
        ]
        usable = [m for m in usable if _machine(m.run) == most]
    return usable, left


def _machine(run: Row) -> str:
    return str(run.device_name or run.device or "unknown hardware")


def _measured(run: Row, site: Site) -> Measured | str:
    """One record with its work, or why the model cannot be fitted to it."""
    try:
        config = validate(run.files.config)
    except ValueError as error:
        return f"no readable config.yaml ({str(error).splitlines()[0]})"
    if run.device and (run.device == "cpu") != (site.hardware.kind == "cpu"):
        return f"ran on {run.device}, which is no hardware of site {site.name} (--runs-site)"
    if config.data.part < 1:
        return "trained on parts of trees (data.part), whose cost is not that of whole slides"
    if not run.seconds_per_image or not run.gpus or (run.timed_steps or 0) < 3:
        return "no timed steps"
    lengths = (run.files.part("tokens") or {}).get("counts", [])
    # Crops are no slides: their model sees one length.
    whole_slides = lengths and config.samples_per_image == 1
    together = max(1, round(config.images_per_step / run.gpus / config.train.accumulate))
    found = cost_over(config, lengths, together) if whole_slides else None
    cost = found[0] if found else cost_of(config, run.tokens_per_image)
    if cost is None:
        return "no closed cost formula for its model"
    work = work_of(config, cost, run.gpus, config.images_per_step / run.gpus, site, run.tokens_per_image)
    work = replace(work, spread=found[1] if found else ())
    return Measured(run, work, run.seconds_per_image * config.images_per_step)
