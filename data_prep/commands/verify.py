"""`python -m data_prep verify`: check token files, or a pack."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.build.options import OptionError
from data_prep.system.command_line import DONE, FAILED

HELP = "check token files, or a pack"
_DESCRIPTION = """Check every token file under DIR: whole, unchanged since it was written, leaves tile
the frame in Morton order, counts add up. One line per fault; exit code 1 if there is any."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token files, one file, or a pack")


def run(args: argparse.Namespace) -> int:
    """Run it; returns the exit code."""
    from data_prep.system.progress import Progress
    from data_prep.token_files.pack_format import PackError, check_pack, is_pack
    from data_prep.token_files.token_file import StoreError
    from data_prep.token_files.verify import token_files, verify_file

    try:
        files = token_files(args.folder)
        faults = check_pack(args.folder) if is_pack(args.folder) else []
    except (StoreError, PackError) as error:
        raise OptionError(str(error)) from error
    bad = 0
    for fault in faults:
        print(fault, flush=True)
    with Progress(len(files), "verify", "files") as progress:
        for path in files:
            wrong = verify_file(path)
            bad += bool(wrong)
            for fault in wrong:
                print(f"{path}: {fault}", flush=True)
            progress.update(1)
    rest = f", {bad} {'is' if bad == 1 else 'are'} not" if bad else ""
    print(f"{len(files) - bad} of {len(files)} token files are good{rest}")
    return FAILED if bad or faults else DONE
