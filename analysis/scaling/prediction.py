"""`python -m analysis scaling`: fit the model of the step time to records, and say what it predicts where.

Measured, modelled and published numbers stand in tables of their own; every modelled table says so in its caption.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.output.formats import Column, Table, significant, whole
from analysis.scaling.model import FACTORS, Fit, at, binding, fit_records, terms
from analysis.scaling.work import Measured, experiment_work
from launch.config.config import Config
from launch.config.sites import Site

EXPERIMENTS = ("paip_64k_p32", "paip_64k", "paip_64k_uniform")


# ---- tables


def fit_table(fit: Fit, site: Site) -> Table:
    """The factors, fitted or assumed."""
    rows = []
    for name, (meaning, _) in FACTORS.items():
        value = fit.factors[name]
        known = name not in fit.assumed
        interval = f"{significant(fit.low[name])} to {significant(fit.high[name])}" if known else ""
        rate = f"MFU {100 / value:.1f} %" if name in ("encoder", "decoder") else ""
        rows.append([name, meaning, significant(value), interval, "fitted" if known else "assumed", rate])
    error = f" Root mean square of the relative errors on {fit.n} records: {fit.error:.1%}." if fit.error else ""
    heads = ("term", "what the factor is of", "factor", "95 % interval", "from", "that is")
    columns = [Column(head, head == "factor") for head in heads]
    caption = f"Factors of the model of the step time on {site.title}." + error
    notes = [
        "Time of a step = sum of factor x time at the site's peak rates; the factor of `fixed` is in seconds. "
        "Intervals: bootstrap over records."
    ]
    fitted = len(FACTORS) - len(fit.assumed)
    if 0 < fit.n <= 2 * fitted:
        notes.append(
            f"{fit.n} records for {fitted} fitted factors: the error on these records says little, the held-out one "
            "more."
        )
    return Table(caption, columns, rows, ["modelled"] * len(rows), notes, f"scaling_fit_{site.name}")


def held_out_table(found: Sequence[Measured], site: Site) -> Table | None:
    """Each number of GPUs predicted from the records of all others; None when there is only one number of GPUs."""
    counts = sorted({m.run.gpus or 0 for m in found})
    if len(counts) < 2:
        return None
    rows = []
    for gpus in counts:
        others = [m for m in found if m.run.gpus != gpus]
        fit = fit_records([m.work for m in others], [m.seconds for m in others], site, draws=1)
        for m in (m for m in found if m.run.gpus == gpus):
            predicted = sum(terms(m.work, site, fit).values())
            times = [significant(m.seconds), significant(predicted), f"{predicted / m.seconds - 1:+.0%}"]
            rows.append([m.run.experiment, whole(gpus), *times])
    heads = ("run", "GPUs", "measured step (s)", "modelled step (s)", "error")
    columns = [Column(head, head != "run") for head in heads]
    caption = "Held out: the step time at each number of GPUs from the records at all other numbers."
    return Table(caption, columns, rows, ["modelled"] * len(rows), (), "scaling_held_out")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one experiment on some GPUs of a site."""

    site: str
    experiment: str
    gpus: int
    nodes: int
    step_s: float
    seconds_per_image: float
    efficiency: float
    node_hours: float  # per 1,000 images
    binds: str
    parts: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**vars(self), "kind": "modelled"}


def predict(
    configs: Sequence[Config],
    sites: Sequence[Site],
    fits: dict[str, Fit],
    gpus: Sequence[int],
    mode: str,
    images: float,
    read_mb_s: float = 2000.0,
    lengths: Sequence[int] = (),
) -> list[Prediction]:
    """Predict every experiment on every site and number of GPUs.

    Args:
        configs: Experiments with a closed cost formula.
        sites: Where.
        fits: Factors by name of the site.
        gpus: Numbers of GPUs.
        mode: weak (images per GPU stay) or strong (images per step stay).
        images: Images per GPU (weak), or per step (strong).
        read_mb_s: what one node reads from the file system.
        lengths: Tokens of real slides; see `scaling_work.experiment_work`.

    Returns:
        In the order of sites, experiments, GPUs. Efficiency is against one GPU.

    Raises:
        ConfigError: A model without a closed cost formula.
    """
    out = []
    for site in sites:
        for config in configs:
            one = experiment_work(config, 1, images, site, lengths, read_mb_s)
            alone = sum(terms(one, site, fits[site.name]).values())
            for n in gpus:
                work = at(experiment_work(config, n, images, site, lengths, read_mb_s), n, mode)
                parts = terms(work, site, fits[site.name])
                step = sum(parts.values())
                total = work.images * n
                nodes = math.ceil(n / site.hardware.gpus_per_node)
                out.append(
                    Prediction(
                        site.name,
                        config.experiment,
                        n,
                        nodes,
                        step,
                        step / total,
                        (alone / images) / (step / total) / n,
                        1000 * step / total * nodes / 3600,
                        binding(parts),
                        parts,
                    )
                )
    return out


def prediction_table(found: Sequence[Prediction], mode: str, read_mb_s: float = 2000.0, said: str = "") -> Table:
    """Predictions as a table for people."""
    rows = [
        [
            p.site,
            p.experiment,
            whole(p.gpus),
            whole(p.nodes),
            significant(p.step_s),
            significant(p.seconds_per_image),
            f"{p.efficiency:.0%}",
            significant(p.node_hours),
            p.binds,
        ]
        for p in found
    ]
    heads = ("site", "experiment", "GPUs", "nodes", "step (s)", "s/image", "efficiency", "node-hours per 1,000 images")
    columns = [Column(h, i > 1) for i, h in enumerate(heads)] + [Column("largest term")]
    stays = "as many images per GPU (weak scaling)" if mode == "weak" else "as many images per step (strong scaling)"
    notes = [
        f"Seconds per image: time of a step over the images of all GPUs. Efficiency: against one GPU, with {stays}. "
        f"Reading: {read_mb_s:,.0f} MB/s a node, assumed, every image at every step (nothing cached).{said}"
    ]
    caption = f"Modelled, not measured: {mode} scaling."
    return Table(caption, columns, rows, ["modelled"] * len(rows), notes, f"scaling_{mode}")
