"""The published times of APF's Table III against a model with four terms, row by row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import lsq_linear

from analysis.output.formats import Column, Table, significant, whole
from analysis.papers.entries import Cell, table2, table3, wide
from analysis.papers.tables import MODELLED, SUITE
from analysis.scaling.costs import encoder_flops, raster_decoder_flops
from launch.config.sites import load_site


@dataclass(frozen=True)
class PublishedRow:
    """A row of APF's Table III, its time by the model fitted to all rows, and fitted without its resolution."""

    row: str
    resolution: int
    gpus: int
    seconds: float
    fitted: float
    held_out: float


@dataclass(frozen=True)
class _Timed:
    """The rows of a table that print a time for APF-UNETR or UNETR: names, (R, GPUs, seconds), and the four columns."""

    names: tuple[str, ...]
    resolutions: np.ndarray
    gpus: np.ndarray
    seconds: np.ndarray
    design: np.ndarray  # (rows, 4): seconds of each term for a factor of 1

    def solve(self, kept: np.ndarray) -> np.ndarray:
        """Factors of the four terms by bounded least squares on the relative errors of some rows."""
        relative = (self.design / self.seconds[:, None])[kept]
        scale = np.linalg.norm(relative, axis=0)
        factors: np.ndarray = lsq_linear(relative / scale, np.ones(len(relative)), bounds=(0, np.inf)).x / scale
        return factors


def _timed(cells: Sequence[Cell]) -> _Timed:
    peak = load_site("frontier").hardware.peak_tflops["fp32"] * 1e12
    rows = wide(cells).dropna(subset="seconds_per_image")
    rows = rows[rows.model.isin(["APF-UNETR", "UNETR"])]
    design = []
    for r in rows.itertuples():
        length, patch = int(r.tokens), int(r.patch_px)
        encoder = encoder_flops(length, 768, 12) + 2 * length * 768 * 3 * patch * patch
        # Beyond 64 the published decoder cannot have doubled its channels at every step; its width there is not known.
        decoder = raster_decoder_flops(length, min(patch, 64))
        design.append([3 * encoder / peak, 3 * decoder / peak, 1.0, float(r.gpus)])
    names, resolutions, gpus, seconds = (rows[k] for k in ("row", "resolution", "gpus", "seconds_per_image"))
    return _Timed(tuple(names), resolutions.to_numpy(), gpus.to_numpy(), seconds.to_numpy(), np.array(design))


@lru_cache(maxsize=1)
def published_rows() -> tuple[list[PublishedRow], dict[str, float]]:
    """Fit four terms to the 38 rows of Table III that print a time, and predict each resolution from the others.

    The terms: arithmetic of the encoder and of the convolutional decoder at a GCD's fp32 peak, a fixed time, and a time
    in proportion to the GPUs. One image per GPU and step is assumed (the batch sizes are not printed).

    Returns:
        The rows, and the factors of the fit to all of them.
    """
    rows = _timed(table3())
    factors = rows.solve(np.ones(len(rows.names), bool))
    fitted, held = rows.design @ factors, held_out_seconds(table3())
    out = [
        PublishedRow(name, int(r), int(n), float(s), float(f), held[name])
        for name, r, n, s, f in zip(rows.names, rows.resolutions, rows.gpus, rows.seconds, fitted, strict=True)
    ]
    names = ("encoder", "decoder", "fixed_s", "per_gpu_s")
    return out, dict(zip(names, factors.tolist(), strict=True))


def held_out_seconds(cells: Sequence[Cell]) -> dict[str, float]:
    """Modelled seconds per image of rows of Table II or III, factors fitted to Table III's other resolutions, by row.

    Args:
        cells: Published cells with GPUs, tokens and a time for each row; the time itself does not enter.
    """
    base, asked = _timed(table3()), _timed(cells)
    factors = {r: base.solve(base.resolutions != r) for r in sorted(set(asked.resolutions.tolist()))}
    return {
        name: float(row @ factors[int(r)])
        for name, r, row in zip(asked.names, asked.resolutions, asked.design, strict=True)
    }


def modelled_cells(name: str) -> tuple[list[Cell], list[str]]:
    """Return the modelled rows of a paper's table, and the note they need; none for a table the model says nothing of.

    Args:
        name: A key of `tables.TABLES`; the model knows the times of apf2 and apf3.
    """
    if name not in ("apf2", "apf3"):
        return [], []
    published = table2() if name == "apf2" else table3()
    held = held_out_seconds(published)
    cells = []
    for cell in published:
        if cell.row in held and cell.quantity in ("gpus", "tokens", "depth", "seconds_per_image"):
            text = repr(held[cell.row]) if cell.quantity == "seconds_per_image" else cell.text
            cells.append(replace(cell, paper=SUITE, row=f"{cell.row}, model", text=text, status=MODELLED, note=""))
    error = _rms(published_rows()[0], "held_out")
    return cells, [
        "modelled: time of the row's setting by a model of four terms, fitted to the rows of Table III at the other "
        f"resolutions; its relative errors there have a root mean square of {error:.0%}, row by row in `scaling`."
    ]


def _rms(rows: Sequence[PublishedRow], which: str) -> float:
    return math.sqrt(sum((getattr(p, which) / p.seconds - 1) ** 2 for p in rows) / len(rows))


def published_table() -> Table:
    """Table III's times beside the model's, row by row, the errors as they are."""
    rows, factors = published_rows()
    lines = [
        [
            p.row,
            whole(p.gpus),
            significant(p.seconds),
            significant(p.fitted),
            f"{p.fitted / p.seconds - 1:+.0%}",
            significant(p.held_out),
            f"{p.held_out / p.seconds - 1:+.0%}",
        ]
        for p in rows
    ]

    notes = [
        f"Root mean square of the relative errors: {_rms(rows, 'fitted'):.0%} fitted, {_rms(rows, 'held_out'):.0%} "
        "held out. The model does not explain these times well: they grow with the GPUs almost in proportion "
        f"({factors['per_gpu_s'] * 1000:.1f} s per 1,000 GPUs and image), and rows of very different cost at one "
        "resolution print nearly the same time (UNETR at 1K).",
        f"Factors: encoder {factors['encoder']:.2f}, decoder {factors['decoder']:.2f} times the time at a GCD's fp32 "
        f"peak (below 1: faster than that peak allows), {factors['fixed_s']:.3f} s fixed.",
    ]
    heads = ("row of Table III", "GPUs", "published (s)", "modelled (s)", "error", "held out (s)", "error held out")
    caption = "Published times of APF's Table III against the model (held out: fitted without the row's resolution)."
    columns = [Column(h, i > 0) for i, h in enumerate(heads)]
    return Table(caption, columns, lines, ["published"] * len(lines), notes, "scaling_published")
