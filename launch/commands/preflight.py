"""`python -m launch preflight`: is every node as fast as the site's are?"""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.config.config import ConfigError
from launch.config.sites import load_site

HELP = "measure every node for a minute at most; exit 65 names the bad ones"
_DESCRIPTION = (
    "GEMM rate, memory and all-reduce bandwidth, disk and clock of every node against the site's expectation. Start it "
    "as the training is started (torchrun, srun, mpiexec) or alone. Exit codes: 0 all well, 65 a node is bad, 64 bad "
    "arguments."
)


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("--site", default="local", help="name of jobs/sites/NAME.yaml, or a .yaml file")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of all measurements, 2 to 60")
    parser.add_argument("--bad-nodes", type=Path, metavar="FILE", help="write the names of bad nodes here, one a line")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the disk is tried (run_root)")


def run(args: argparse.Namespace) -> int:
    """Measure; ends the process itself once the ranks are joined.

    Raises:
        ConfigError, RankError: Bad arguments.
    """
    site = load_site(args.site)
    if not 2 <= args.seconds <= 60:
        raise ConfigError(f"--seconds={args.seconds:g} must be between 2 and 60")
    if args.bad_nodes is not None and not args.bad_nodes.parent.is_dir():
        raise ConfigError(f"--bad-nodes={args.bad_nodes}: folder {args.bad_nodes.parent} does not exist")
    from launch.preflight.nodes import check_nodes

    return check_nodes(site, args.seconds, args.folder, args.bad_nodes)
