"""`python -m data_prep pack` and `unpack`: token files to a few large ones for many readers, and back."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from data_prep.build.options import OptionError
from data_prep.system.command_line import Command
from data_prep.system.progress import counted

_PACK = """Put the token files of a folder into a few large, read-only shards with one index, for training on many
ranks: a parallel file system serves few large files far better than many small ones. `launch train ... data.dir=PACK`
reads a pack like the folder it was made of, `verify PACK` checks it, `unpack` gives the same bytes back.

Small files that belong to the folder (build_log.jsonl, split.json, *.volume.json) are copied along. Stopped and started
again, it keeps the shards that are whole.

exit code: 0 done, 1 a token file is damaged or the disk is full, 64 bad arguments."""

_UNPACK = """Write the token files of a pack out again, byte for byte. Files that are there already as packed are left
alone; files that differ are kept, and nothing is written, unless --force says to replace them.

exit code: 0 done, 1 damaged, 64 bad arguments."""


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MiB or 2GiB")
    return int(float(found[1]) * 1024 ** "_KMGT".index(found[2].upper() or "_"))


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = _PACK
    parser.add_argument("folder", type=Path, metavar="TOKENS_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="PACK_DIR", help="folder of the pack")
    size = "size at which a shard is full, e.g. 512MiB or 4GiB (default 1GiB)"
    parser.add_argument("--shard-size", type=_bytes, default=2**30, metavar="SIZE", help=size)


def _add_unpack(parser: argparse.ArgumentParser) -> None:
    parser.description = _UNPACK
    parser.add_argument("folder", type=Path, metavar="PACK_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--only", nargs="+", default=[], metavar="SLIDE", help="names of slides (default: all files)")
    parser.add_argument("--force", action="store_true", help="replace files of the same names that differ")


def _pack(args: argparse.Namespace) -> int:
    from data_prep.token_files.pack import pack_folder
    from data_prep.token_files.pack_format import PackArgumentError

    try:
        index = pack_folder(args.folder, args.out, args.shard_size)
    except PackArgumentError as error:
        raise OptionError(str(error)) from error
    mebibytes = sum(shard.size for shard in index.shards) / 2**20
    files, shards = counted(len(index.entries), "token file"), counted(len(index.shards), "shard")
    print(f"{files} in {shards}, {mebibytes:.1f} MiB -> {args.out}")
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from data_prep.token_files.pack import unpack_folder
    from data_prep.token_files.pack_format import PackArgumentError

    try:
        files = unpack_folder(args.folder, args.out, args.only, force=args.force)
    except PackArgumentError as error:
        raise OptionError(str(error)) from error
    print(f"{counted(len(files), 'file')} -> {args.out}")
    return 0


COMMANDS = {
    "pack": Command("token files to a few large ones", _add_pack, _pack),
    "unpack": Command("the inverse of pack", _add_unpack, _unpack),
}
