"""The published times of APF's Table III against a model with four terms, row by row (no torch, no matplotlib)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from analysis.cells import table3
from analysis.costs import encoder_flops, unetr_cost
from analysis.formats import Column, Table, significant, whole
from launch.sites import load_site


@dataclass(frozen=True)
class PublishedRow:
    """A row of APF's Table III beside the model fitted to all rows, and to all but those of its resolution."""

    row: str
    resolution: int
    gpus: int
    seconds: float
    fitted: float
    held_out: float


def published_rows() -> tuple[list[PublishedRow], dict[str, float]]:
    """Fit four terms to the 38 rows of Table III that print a time, and predict each resolution from the others.

    The terms: arithmetic of the encoder and of the convolutional decoder at a GCD's fp32 peak, a fixed time, and a time
    in proportion to the GPUs. One image per GPU and step is assumed (the batch sizes are not printed).

    Returns:
        The rows, and the factors of the fit to all of them.
    """
    site = load_site("frontier")
    peak = site.hardware.peak_tflops["fp32"] * 1e12
    rows: dict[str, dict[str, Any]] = {}
    for cell in table3():
        rows.setdefault(cell.row, {"R": cell.resolution, "model": cell.model, "p": cell.patch_px})[cell.quantity] = (
            cell.value
        )
    kept = {n: r for n, r in rows.items() if r.get("seconds_per_image") and r["model"] in ("APF-UNETR", "UNETR")}
    design = []
    for r in kept.values():
        length, patch = int(r["tokens"]), int(r["p"])
        encoder = encoder_flops(length, 768, 12) + 2 * length * 768 * 3 * patch * patch
        # Beyond 64 the published decoder cannot have doubled its channels at every step; its width there is not known.
        decoder = unetr_cost(1 << 20, min(patch, 64), length).decoder
        design.append([3 * encoder / peak, 3 * decoder / peak, 1.0, float(r["gpus"])])
    matrix, times = np.array(design), np.array([r["seconds_per_image"] for r in kept.values()])
    sizes = np.array([r["R"] for r in kept.values()])
    relative = matrix / times[:, None]

    def solve(mask: np.ndarray) -> np.ndarray:
        scale = np.linalg.norm(relative[mask], axis=0)
        return lsq_linear(relative[mask] / scale, np.ones(mask.sum()), bounds=(0, np.inf)).x / scale

    whole_fit = solve(np.ones(len(times), bool))
    out = []
    held = {r: solve(sizes != r) for r in sorted(set(sizes.tolist()))}
    for i, (name, r) in enumerate(kept.items()):
        seconds = float(times[i])
        out.append(PublishedRow(name, int(r["R"]), int(r["gpus"]), seconds, float(matrix[i] @ whole_fit),
                                float(matrix[i] @ held[int(r["R"])])))  # fmt: skip
    names = ("encoder", "decoder", "fixed_s", "per_gpu_s")
    return out, dict(zip(names, whole_fit.tolist(), strict=True))


def published_table() -> Table:
    """Table III's times beside the model's, row by row, the errors as they are."""
    rows, factors = published_rows()
    lines = [
        [p.row, whole(p.gpus), significant(p.seconds), significant(p.fitted), f"{p.fitted / p.seconds - 1:+.0%}",
         significant(p.held_out), f"{p.held_out / p.seconds - 1:+.0%}"]
        for p in rows
    ]  # fmt: skip

    def rms(which: str) -> float:
        return math.sqrt(sum((getattr(p, which) / p.seconds - 1) ** 2 for p in rows) / len(rows))

    notes = [
        f"Root mean square of the relative errors: {rms('fitted'):.0%} fitted, {rms('held_out'):.0%} held out. The "
        "model does not explain these times well: they grow with the GPUs almost in proportion "
        f"({factors['per_gpu_s'] * 1000:.1f} s per 1,000 GPUs and image), and rows of very different cost at one "
        "resolution print nearly the same time (UNETR at 1K).",
        f"Factors: encoder {factors['encoder']:.2f}, decoder {factors['decoder']:.2f} times the time at a GCD's fp32 "
        f"peak (below 1: faster than that peak allows), {factors['fixed_s']:.3f} s fixed.",
    ]  # fmt: skip
    heads = ("row of Table III", "GPUs", "published (s)", "modelled (s)", "error", "held out (s)", "error held out")
    caption = "Published times of APF's Table III against the model (held out: fitted without the row's resolution)."
    columns = [Column(h, i > 0) for i, h in enumerate(heads)]
    return Table(caption, columns, lines, ["published"] * len(lines), notes, "scaling_published")
