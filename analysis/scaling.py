"""`python -m analysis scaling`: fit the model of the step time to records, and say what it predicts where (no torch).

Measured, modelled and published numbers stand in tables of their own; every modelled table says so in its caption.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import lsq_linear

from analysis.cells import table3
from analysis.costs import Cost, cost_of, encoder_flops, unetr_cost
from analysis.formats import Column, Table, csv_text, latex, markdown, significant, whole, write_atomically
from analysis.records import Run, RunsError, load
from analysis.scaling_model import FACTORS, TERMS, Fit, Work, assumed_fit, at, binding, fit_records, terms
from launch.config import Config, ConfigError, validate
from launch.config import load as load_experiment
from launch.sites import Site, load_site

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
EXPERIMENTS = ("paip_64k_p32", "paip_64k", "paip_64k_uniform")
BYTES_PER_CELL = 3 + 4 + 4  # colour, content and one class of a token file's cell


# ---- from experiments and records to work


def work_of(config: Config, cost: Cost, gpus: int, images: float, site: Site, tokens: float | None = None) -> Work:
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


@dataclass(frozen=True)
class Measured:
    """A record as the model sees it."""

    run: Run
    work: Work
    seconds: float  # of one step


def measured(runs: Sequence[Run], site: Site) -> tuple[list[Measured], list[str]]:
    """Return the records that the model can be fitted to, and a line for each that it cannot."""
    usable, left = [], []
    for run in runs:
        try:
            config = validate(yaml.safe_load((run.folder / "config.yaml").read_text()))
        except (OSError, ValueError, yaml.YAMLError) as error:
            left.append(f"{run.experiment}/{run.run_id}: no readable config.yaml ({str(error).splitlines()[0]})")
            continue
        cost = cost_of(config, run.tokens_per_image)
        if cost is None or not run.seconds_per_image or not run.gpus or (run.timed_steps or 0) < 3:
            why = "no closed cost formula for its model" if cost is None else "no timed steps"
            left.append(f"{run.experiment}/{run.run_id}: {why}")
            continue
        images = config.images_per_step / run.gpus
        work = work_of(config, cost, run.gpus, images, site, run.tokens_per_image)
        usable.append(Measured(run, work, run.seconds_per_image * config.images_per_step))
    return usable, left


# ---- tables


def fit_table(fit: Fit, site: Site) -> Table:
    """The factors, fitted or assumed."""
    rows = []
    for name, (meaning, _) in FACTORS.items():
        value = fit.factors[name]
        known = name not in fit.assumed
        interval = f"{significant(fit.low[name])} to {significant(fit.high[name])}" if known else ""
        rate = ""
        if name in ("encoder", "decoder"):
            rate = f"MFU {100 / value:.1f} %"
        rows.append([name, meaning, significant(value), interval, "fitted" if known else "assumed", rate])
    error = f" Root mean square of the relative errors on {fit.n} records: {fit.error:.1%}." if fit.error else ""
    columns = [Column("term"), Column("what the factor is of"), Column("factor", True), Column("95 % interval"),
               Column("from"), Column("that is")]  # fmt: skip
    caption = f"Factors of the model of the step time on {site.title}." + error
    notes = ["Time of a step = sum of factor x time at the site's peak rates; the factor of `fixed` is in seconds. "
             "Intervals: bootstrap over records."]  # fmt: skip
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
            rows.append([m.run.experiment, whole(gpus), significant(m.seconds), significant(predicted),
                         f"{predicted / m.seconds - 1:+.0%}"])  # fmt: skip
    columns = [Column("run"), Column("GPUs", True), Column("measured step (s)", True),
               Column("modelled step (s)", True), Column("error", True)]  # fmt: skip
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

    Returns:
        In the order of sites, experiments, GPUs. Efficiency is against one GPU.

    Raises:
        ConfigError: A model without a closed cost formula.
    """
    out = []
    for site in sites:
        for config in configs:
            cost = cost_of(config)
            if cost is None:
                raise ConfigError(f"{config.experiment}: no closed cost formula for model {config.model.name}")
            one = replace(work_of(config, cost, 1, images, site), read_mb_s=read_mb_s)
            alone = sum(terms(one, site, fits[site.name]).values())
            for n in gpus:
                work = at(replace(work_of(config, cost, n, images, site), read_mb_s=read_mb_s), n, mode)
                parts = terms(work, site, fits[site.name])
                step = sum(parts.values())
                total = work.images * n
                nodes = math.ceil(n / site.hardware.gpus_per_node)
                out.append(
                    Prediction(
                        site.name, config.experiment, n, nodes, step, step / total,
                        (alone / images) / (step / total) / n, 1000 * step / total * nodes / 3600, binding(parts),
                        parts,
                    )
                )  # fmt: skip
    return out


def prediction_table(found: Sequence[Prediction], mode: str, read_mb_s: float = 2000.0) -> Table:
    """Predictions as a table for people."""
    rows = [
        [p.site, p.experiment, whole(p.gpus), whole(p.nodes), significant(p.step_s), significant(p.seconds_per_image),
         f"{p.efficiency:.0%}", significant(p.node_hours), p.binds]
        for p in found
    ]  # fmt: skip
    heads = ("site", "experiment", "GPUs", "nodes", "step (s)", "s/image", "efficiency", "node-hours per 1,000 images")
    columns = [Column(h, i > 1) for i, h in enumerate(heads)] + [Column("largest term")]
    stays = "as many images per GPU (weak scaling)" if mode == "weak" else "as many images per step (strong scaling)"
    notes = [
        f"Seconds per image: time of a step over the images of all GPUs. Efficiency: against one GPU, with {stays}. "
        f"Reading: {read_mb_s:,.0f} MB/s a node, assumed."
    ]
    caption = f"Modelled, not measured: {mode} scaling."
    return Table(caption, columns, rows, ["modelled"] * len(rows), notes, f"scaling_{mode}")


# ---- against the published rows


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
    """Fit four terms to the 37 rows of Table III that print a time, and predict each resolution from the others.

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


# ---- command


def add_verb(verbs: Any) -> None:
    """Add `scaling` to the command line."""
    sub = verbs.add_parser(
        "scaling",
        help="a model of the step time with named terms: fitted to records, tested, and what it predicts",
        description="Fit the model of the step time to records, test it on GPU counts left out and on the published "
        "rows, and predict seconds per image, efficiency and node-hours. Without RUNS all factors are assumed from the "
        "site file, and the tables say so.",
        epilog="example: python -m analysis scaling runs --site local,frontier --gpus 1,64,2048 --out out/scaling",
    )
    sub.add_argument("runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs to fit the factors to")
    sub.add_argument("--runs-site", default="local", metavar="S", help="site that RUNS ran on (default: local)")
    sub.add_argument("--site", default="frontier", metavar="S,...", help="sites to predict (default: frontier)")
    sub.add_argument(
        "--experiments", default=",".join(EXPERIMENTS), metavar="E,...",
        help=f"named experiments to predict (default: {','.join(EXPERIMENTS)})",
    )  # fmt: skip
    counts = ",".join(map(str, GPUS))
    sub.add_argument("--gpus", default=counts, metavar="N,...", help="GPU counts (default: 1 to 2048)")
    sub.add_argument(
        "--read-mb-s", type=float, default=2000.0, help="MB/s that a node reads; an assumption (default: 2000)"
    )
    sub.add_argument("--mode", choices=("weak", "strong"), default="weak", help="what stays (default: images per GPU)")
    sub.add_argument("--images", type=float, default=1.0, help="images per GPU (weak) or per step (strong; default: 1)")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables and the plot")


def run(args: argparse.Namespace) -> int:
    """Run `scaling` and return its exit code.

    Raises:
        ConfigError: Unknown site or experiment, or a number that is none.
        RunsError: RUNS cannot be read.
    """
    sites = [load_site(name) for name in args.site.split(",")]
    configs = [load_experiment(name) for name in args.experiments.split(",")]
    gpus = _numbers(args.gpus)
    for key in ("images", "read_mb_s"):
        if not 0 < getattr(args, key) < math.inf:
            raise ConfigError(f"--{key.replace('_', '-')} must be positive, got {getattr(args, key):g}")
    found: list[Measured] = []
    left: list[str] = []
    home = load_site(args.runs_site)
    if args.runs is not None:
        found, left = measured(load(args.runs).ok, home)
        if not found:
            reasons = f": {left[0]}" if left else ""
            raise RunsError(f"{args.runs}: no record that the model can be fitted to{reasons}", 1)
    fit = fit_records([m.work for m in found], [m.seconds for m in found], home)
    # Factors measured at home go to another site as they are only where that site has none of its own.
    fits = {s.name: fit if found and s.name == home.name else assumed_fit(s) for s in sites}
    predictions = predict(configs, sites, fits, gpus, args.mode, args.images, args.read_mb_s)
    tables = [published_table(), prediction_table(predictions, args.mode, args.read_mb_s)]
    tables += [fit_table(fits[s.name], s) for s in sites]
    if found:
        if home.name not in fits:
            tables.insert(0, fit_table(fit, home))
        held = held_out_table(found, home)
        tables[:0] = [held] if held is not None else []
    if args.json:
        print(json.dumps({"predictions": [p.as_json() for p in predictions], "terms": TERMS,
                          "fits": {name: vars(f) for name, f in fits.items()}}, indent=1))  # fmt: skip
    else:
        print("\n\n".join(markdown(table) for table in tables))
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    if args.out is not None:
        from analysis.figure_style import save
        from analysis.scaling_figures import predicted_scaling

        paths = [p for table in tables for p in _write(table, args.out)]
        paths += save([predicted_scaling(predictions, args.mode)], args.out)
        for path in paths:
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _write(table: Table, out: Path) -> list[Path]:
    texts = {"md": markdown(table), "csv": csv_text([c.head for c in table.columns], table.rows), "tex": latex(table)}
    for suffix, text in texts.items():
        write_atomically(out / f"{table.slug}.{suffix}", text)
    return [out / f"{table.slug}.{suffix}" for suffix in texts]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--gpus {text}: not a list of numbers like 1,8,64")
    return sorted(set(numbers))


__all__ = ["add_verb", "measured", "predict", "published_rows", "run"]
