"""`python -m launch bench`: seconds per image of the paper's rows."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from pathlib import Path

from data_prep.system.files import write_atomic
from data_prep.system.progress import Progress
from launch.config.config import ConfigError
from launch.plan.bench import WARMUP, measure, rows, table
from launch.records.record import environment, git_commit, now

HELP = "time the rows of the paper's Table III on this machine: training steps, forward passes, memory, MFU"
_EXAMPLES = (
    "examples: python -m launch bench --out analysis/measured/h100; python -m launch bench --rows 'paip_512*' "
    "model.width=64 model.depth=2"
)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = (
        f"{HELP}. Rows in OUT/bench.jsonl do not run again. A row that does not fit the memory counts too."
    )
    parser.epilog = _EXAMPLES
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="names to run, e.g. 'paip_64k*' (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default: out/bench")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement (default: 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there")
    parser.add_argument("--list", action="store_true", help="only print the names of the rows")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every row")


def run(args: argparse.Namespace) -> int:
    """Run the rows that are missing, print the table.

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
    from launch.engines.ranks import device_name, find_ranks, pick_device

    # What is there already, and where we are.
    device = pick_device(args.device, find_ranks({}))
    path = args.out / "bench.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment(["-"], [device_name(device)], "alone")
    write_atomic(args.out / "env.json", json.dumps(about, indent=1).encode())
    have = {line["name"] for line in lines if line.get("overrides") == list(args.overrides)}
    # Time the rest; each row is written at once.
    with Progress(len(asked), "bench", "rows") as bar:
        for row in asked:
            if row.name not in have:
                line = measure(row, device, args.seconds)
                line |= {
                    "device_name": device_name(device),
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
