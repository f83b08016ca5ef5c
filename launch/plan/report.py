"""A plan as a table, as a page for one number of gpus, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.config.config import Config
from launch.config.sites import Site
from launch.plan.cost import GIB, cost, fits, memory_gib, summed
from launch.plan.step import Counts
from launch.records.text_table import text_table

HEADINGS = ["gpus", "engine", "images/gpu", "tokens", "memory GiB", "TFLOP/gpu", "sent GiB/gpu", "step s", "images/s"]
_KIND_NAMES = {
    "parameters": "parameters, buffers",
    "gradients": "gradients",
    "optimizer": "optimiser, averages",
    "gathered": "gathered shards",
    "activations": "activations, batch, temporary",
}


@dataclass(frozen=True)
class PlanRow:
    """The plan for one number of gpus."""

    gpus: int
    counts: Counts | None  # None where that many gpus cannot be used
    error: str = ""  # why not
    advised: bool = False  # whether a change was looked for that makes it fit
    change: tuple[str, Counts] | None = None  # the cheapest one, and its counts


def as_json(config: Config, site: Site, rows: Sequence[PlanRow]) -> dict[str, Any]:
    """Everything, in the units that the names say."""
    return {
        "experiment": config.experiment,
        "site": site.name,
        "memory_limit_gib": memory_gib(site),
        "plans": [_row_json(row, site) for row in rows],
    }


def _row_json(row: PlanRow, site: Site) -> dict[str, Any]:
    if row.counts is None:
        return {"gpus": row.gpus, "error": row.error}
    counts = row.counts
    seconds = cost(counts, site)
    return {
        "gpus": row.gpus,
        "nodes": -(-row.gpus // site.hardware.gpus_per_node),
        "engine": counts.engine,
        "parameters": counts.parameters,
        "global_batch": counts.images,
        "images_per_forward": counts.micro,
        "tokens_per_image": counts.tokens,
        "peak_memory_gib": counts.peak_bytes / GIB,
        "memory_gib": {kind: size / GIB for kind, size in counts.memory.items()},
        "fits": fits(counts, site),
        "flops": counts.flops,
        "macs": counts.flops // 2,
        "operations": counts.operations,
        "collectives": summed(counts.collectives),
        "time": {name: getattr(seconds, name) for name in _TERMS},
        "images_per_s": counts.images / seconds.step_s,
        "would_fit": None
        if row.change is None
        else {
            "overrides": [row.change[0]],
            "peak_memory_gib": row.change[1].peak_bytes / GIB,
            "step_s": cost(row.change[1], site).step_s,
        },
        "counting_s": counts.seconds,
    }


def table(rows: Sequence[PlanRow], site: Site) -> str:
    """One line per number of gpus."""
    cells = [[*HEADINGS, "fits"]]
    notes = []
    for row in rows:
        if row.counts is None:
            notes.append(f"{row.gpus} gpus: {row.error}")
            continue
        counts = row.counts
        seconds = cost(counts, site)
        sent = sum(c.size_bytes for c in counts.collectives if len(c.ranks) > 1) / GIB
        cells.append(
            [
                str(row.gpus),
                counts.engine,
                str(counts.micro),
                "-" if counts.tokens is None else str(counts.tokens),
                f"{counts.peak_bytes / GIB:.2f}",
                f"{counts.flops / 1e12:.4g}",
                f"{sent:.3g}",
                f"{seconds.overlapped_s:.3g}-{seconds.step_s:.3g}",
                f"{counts.images / seconds.step_s:.3g}",
                "yes" if fits(counts, site) else "NO",
            ]
        )
    return "\n".join([*([text_table(cells, left=0)] if len(cells) > 1 else []), *notes])


def page(row: PlanRow, site: Site) -> str:
    """What one plan consists of, line by line."""
    counts = row.counts
    assert counts is not None
    seconds = cost(counts, site)
    lines = [f"\n{row.gpus} gpus, {counts.engine}: memory of one gpu at its peak, {memory_gib(site):.4g} GiB usable"]
    lines += [f"  {_KIND_NAMES[kind]:<30}{size / GIB:>10.3f} GiB" for kind, size in counts.memory.items()]
    lines.append(f"  {'sum':<30}{counts.peak_bytes / GIB:>10.3f} GiB")
    lines.append("collectives of one step and gpu")
    for entry in summed(counts.collectives):
        size = int(str(entry["bytes"]))
        text = f"{entry['kind']} over {entry['ranks']}"
        lines.append(f"  {text:<30}{entry['count']:>6} x {_amount(size):>12}")
    lines.append(f"arithmetic of one step and gpu: {counts.flops:.6g} FLOP, {counts.flops // 2:.6g} MAC")
    lines += [f"  in {precision:<27}{work.flops:>14.6g} FLOP" for precision, work in sorted(counts.work.items())]
    lines.append(f"predicted seconds of one step on {site.name} (rates of its file, nothing measured)")
    lines += [f"  {term:<48}{getattr(seconds, name):>12.4g}" for name, term in _TERMS.items()]
    return "\n".join(lines)


_TERMS = {
    "matrix_s": "matrix products, convolutions, attention",
    "traffic_s": "other operations, by their memory traffic",
    "launch_s": "starting kernels (hidden behind the work, if less)",
    "bandwidth_s": "collectives, bytes",
    "latency_s": "collectives, hops",
    "overlapped_s": "step, all communication hidden",
    "step_s": "step, nothing hidden",
}


def _amount(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} B"


def verdict(row: PlanRow, site: Site) -> str:
    """Whether it fits, on one line, and if not, what would."""
    counts = row.counts
    assert counts is not None
    need, have = counts.peak_bytes / GIB, memory_gib(site)
    if fits(counts, site):
        return f"{row.gpus} gpus: fits, {need:.2f} of {have:.4g} GiB"
    head = f"{row.gpus} gpus: does not fit, {need:.2f} of {have:.4g} GiB"
    if not row.advised:
        return head
    if row.change is None:
        return head + "; no single change of shards, micro batch, precision or recomputation makes it fit"
    setting, changed = row.change
    step_s = cost(changed, site).step_s
    return head + f"; cheapest change: {setting} ({changed.peak_bytes / GIB:.2f} GiB, step {step_s:.3g} s)"
