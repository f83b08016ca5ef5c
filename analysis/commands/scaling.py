"""`python -m analysis scaling`: fit, test and use the model of the step time."""

import argparse
import json
import math
import sys
from pathlib import Path

from analysis.commands.answer import answer
from analysis.output.formats import every_form, markdown, write_files
from analysis.runs.records import RunsError, load, rows_of
from analysis.scaling.model import TERMS, assumed_fit, fit_records
from analysis.scaling.prediction import EXPERIMENTS, fit_table, held_out_table, predict, prediction_table
from analysis.scaling.table3 import published_table
from analysis.scaling.work import Measured, measured, read_spread
from launch.commands.plan import gpu_counts
from launch.config.config import ConfigError
from launch.config.sites import load_site
from launch.experiments.load import load as load_experiment

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HELP = "a model of the step time with named terms: fitted to records, tested, and what it predicts"
_EPILOG = """\
The time of a step is a sum of named terms, each its ideal time at the site's peak rates times a factor:
  encoder, decoder     arithmetic of the transformer and of the convolutions (a factor of 2.5 is an MFU of 40 %)
  memory               the optimiser's traffic
  parameters           gathering sharded weights        } collectives by latency and bandwidth of the site's links
  gradients            summing gradients over GPUs      }
  fixed                seconds of every step
  imbalance            waiting for the GPU with the longest sequences (--lengths, or the token files of RUNS)
  data                 reading that the arithmetic does not hide
  checkpoint           saving
Bounded least squares fit the factors to RUNS, with bootstrap intervals. A factor that RUNS say nothing about keeps the
value of the site's file and is called assumed. Sites are files in jobs/sites; `--site my.yaml` takes another one.

examples:
  python -m analysis scaling                                            assumed factors, Frontier, 1 to 2,048 GPUs
  python -m analysis scaling --site frontier,lumi,perlmutter,h200-box --gpus 8,512,2048 --out out/scaling
  python -m analysis scaling runs --runs-site local --site local        fitted to RUNS, GPU counts held out in turn
  python -m analysis scaling --mode strong --images 2048 --gpus 256,512,1024,2048
  python -m analysis scaling --lengths out/tokens --json                real lengths, computed without padding

exit codes: 0 done; 1 no record that the model can be fitted to; 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = (
        "Fit the model of the step time to records, test it on GPU counts left out and on the published\n"
        "rows, and predict seconds per image, efficiency and node-hours. Its predictions are not measurements."
    )
    parser.epilog = _EPILOG
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUNS", help="folder of runs to fit the factors to")
    parser.add_argument("--runs-site", default="local", metavar="S", help="site that RUNS ran on (default: local)")
    parser.add_argument("--site", default="frontier", metavar="S,...", help="sites to predict (default: frontier)")
    parser.add_argument(
        "--experiments",
        default=",".join(EXPERIMENTS),
        metavar="E,...",
        help=f"named experiments to predict (default: {','.join(EXPERIMENTS)})",
    )
    counts = ",".join(map(str, GPUS))
    parser.add_argument("--gpus", default=counts, metavar="N,...", help="GPU counts (default: 1 to 2048)")
    parser.add_argument(
        "--read-mb-s",
        type=float,
        default=2000.0,
        metavar="MB",
        help="MB/s that a node reads; an assumption (default: 2000)",
    )
    parser.add_argument(
        "--lengths",
        type=Path,
        metavar="DIR",
        help="token files: adaptive experiments get their lengths, without padding (load imbalance)",
    )
    parser.add_argument(
        "--mode", choices=("weak", "strong"), default="weak", help="what stays (default: images per GPU)"
    )
    parser.add_argument(
        "--images", type=float, default=1.0, help="images per GPU (weak) or per step (strong; default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the tables and the plot")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    sites = [load_site(name) for name in args.site.split(",")]
    configs = [load_experiment(name) for name in args.experiments.split(",")]
    gpus = sorted(set(gpu_counts(args.gpus)))
    for key in ("images", "read_mb_s"):
        if not 0 < getattr(args, key) < math.inf:
            raise ConfigError(f"--{key.replace('_', '-')} must be positive, got {getattr(args, key):g}")
    # Fit to the runs, if there are some.
    found: list[Measured] = []
    left: list[str] = []
    home = load_site(args.runs_site)
    if args.runs is not None:
        found, left = measured(rows_of(load(args.runs).ok), home)
        if not found:
            reasons = f": {left[0]}" if left else ""
            raise RunsError(f"{args.runs}: no record that the model can be fitted to{reasons}", 1)
    fit = fit_records([m.work for m in found], [m.seconds for m in found], home)
    # Fitted factors hold for the site of the runs alone; other sites keep their assumed ones.
    fits = {s.name: fit if found and s.name == home.name else assumed_fit(s) for s in sites}
    # Predict, and put everything into tables.
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
        shown = [p.as_json() for p in predictions]
        print(
            json.dumps({"predictions": shown, "terms": TERMS, "fits": {k: vars(f) for k, f in fits.items()}}, indent=1)
        )
    else:
        print("\n\n".join(markdown(table) for table in tables))
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    if args.out is not None:
        from analysis.figures.scaling import predicted_scaling
        from analysis.output.figure_style import save

        paths = [path for table in tables for path in write_files(args.out, every_form(table))]
        return answer("", [*paths, *save([predicted_scaling(predictions, args.mode)], args.out)])
    return answer("", [])
