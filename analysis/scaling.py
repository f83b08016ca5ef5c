"""`python -m analysis scaling`: fit the model of the step time to records, and say what it predicts where (no torch).

Measured, modelled and published numbers stand in tables of their own; every modelled table says so in its caption.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.formats import Column, Table, csv_text, latex, markdown, significant, whole, write_files
from analysis.records import RunsError, load
from analysis.scaling_model import FACTORS, TERMS, Fit, assumed_fit, at, binding, fit_records, terms
from analysis.scaling_published import published_table
from analysis.scaling_work import Measured, experiment_work, measured, read_spread
from launch.config import Config, ConfigError
from launch.config import load as load_experiment
from launch.plan.command import gpu_counts
from launch.sites import Site, load_site

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
EPILOG = """\
The time of a step is a sum of named terms, each its ideal time at the site's peak rates times a factor:
  encoder, decoder     arithmetic of the transformer and of the convolutions (a factor of 2.5 is an MFU of 40 %)
  memory               the optimiser's traffic
  parameters           gathering sharded weights        } collectives by latency and bandwidth of the site's links
  gradients            summing gradients over GPUs      }
  fixed                seconds of every step
  imbalance            waiting for the GPU with the longest sequences (--lengths, or the token files of RUNS)
  data                 reading that the arithmetic does not hide
  checkpoint           saving
Factors are fitted to RUNS by bounded least squares, with bootstrap intervals; what RUNS say nothing about stays as the
site's file has it and is called assumed. Sites are files in jobs/sites; `--site my.yaml` takes another one.

examples:
  python -m analysis scaling                                            assumed factors, Frontier, 1 to 2,048 GPUs
  python -m analysis scaling --site frontier,lumi,perlmutter,h200-box --gpus 8,512,2048 --out out/scaling
  python -m analysis scaling runs --runs-site local --site local        fitted to RUNS, GPU counts held out in turn
  python -m analysis scaling --mode strong --images 2048 --gpus 256,512,1024,2048
  python -m analysis scaling --lengths out/tokens --json                real lengths, computed without padding

exit codes: 0 done; 1 no record that the model can be fitted to; 64 wrong arguments.
"""
EXPERIMENTS = ("paip_64k_p32", "paip_64k", "paip_64k_uniform")


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
    columns = [
        Column("term"),
        Column("what the factor is of"),
        Column("factor", True),
        Column("95 % interval"),
        Column("from"),
        Column("that is"),
    ]
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
            rows.append(
                [
                    m.run.experiment,
                    whole(gpus),
                    significant(m.seconds),
                    significant(predicted),
                    f"{predicted / m.seconds - 1:+.0%}",
                ]
            )
    columns = [
        Column("run"),
        Column("GPUs", True),
        Column("measured step (s)", True),
        Column("modelled step (s)", True),
        Column("error", True),
    ]
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


# ---- command


def add_verb(verbs: Any) -> None:
    """Add `scaling` to the command line."""
    sub = verbs.add_parser(
        "scaling",
        help="a model of the step time with named terms: fitted to records, tested, and what it predicts",
        description="Fit the model of the step time to records, test it on GPU counts left out and on the published\n"
        "rows, and predict seconds per image, efficiency and node-hours. Nothing that it predicts is measured.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs to fit the factors to")
    sub.add_argument("--runs-site", default="local", metavar="S", help="site that RUNS ran on (default: local)")
    sub.add_argument("--site", default="frontier", metavar="S,...", help="sites to predict (default: frontier)")
    sub.add_argument(
        "--experiments",
        default=",".join(EXPERIMENTS),
        metavar="E,...",
        help=f"named experiments to predict (default: {','.join(EXPERIMENTS)})",
    )
    counts = ",".join(map(str, GPUS))
    sub.add_argument("--gpus", default=counts, metavar="N,...", help="GPU counts (default: 1 to 2048)")
    sub.add_argument(
        "--read-mb-s",
        type=float,
        default=2000.0,
        metavar="MB",
        help="MB/s that a node reads; an assumption (default: 2000)",
    )
    sub.add_argument(
        "--lengths",
        type=Path,
        metavar="DIR",
        help="token files whose lengths adaptive experiments shall have, computed without padding (load imbalance)",
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
    gpus = sorted(set(gpu_counts(args.gpus)))
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
    lengths = read_spread(args.lengths) if args.lengths is not None else []
    predictions = predict(configs, sites, fits, gpus, args.mode, args.images, args.read_mb_s, lengths)
    said = f" Lengths: of the {len(lengths)} slides in {args.lengths}, computed without padding." if lengths else ""
    tables = [published_table(), prediction_table(predictions, args.mode, args.read_mb_s, said)]
    tables += [fit_table(fits[s.name], s) for s in sites]
    if found:
        if home.name not in fits:
            tables.insert(0, fit_table(fit, home))
        held = held_out_table(found, home)
        tables[:0] = [held] if held is not None else []
    if args.json:
        print(
            json.dumps(
                {
                    "predictions": [p.as_json() for p in predictions],
                    "terms": TERMS,
                    "fits": {name: vars(f) for name, f in fits.items()},
                },
                indent=1,
            )
        )
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
    return write_files(out, {f"{table.slug}.{suffix}": text for suffix, text in texts.items()})
