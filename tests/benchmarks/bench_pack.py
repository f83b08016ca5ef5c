"""Reading training samples from a pack against one file per slide: system calls and time, as ratios of one run.

Run: python tests/benchmarks/bench_pack.py [--files 64] [--length 4096] [--patch 16]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from data_prep.token_files.pack import pack_folder
from data_prep.token_files.token_file import new_meta, read_tokens, token_names, token_path, write_tokens
from data_prep.tokens.token_set import TokenSet, content_counts
from data_prep.tree.quadtree import budget_tree


def make(folder: Path, files: int, length: int, patch: int) -> None:
    """Token files of random leaves; the content does not matter here."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    size_px = 8192
    for number in range(files):
        leaves = budget_tree(rng.integers(0, 99, (size_px // patch,) * 2), patch, length)
        tokens = rng.integers(0, 256, (len(leaves), patch, patch, 3), np.uint8)
        content = content_counts(leaves.xy, leaves.size, patch, (size_px, size_px))
        whole = TokenSet(tokens, leaves.xy, leaves.size, content, content[..., None] // 3, size_px, (size_px, size_px))
        write_tokens(token_path(folder, f"slide{number:04d}"), whole, new_meta(slide=f"slide{number:04d}"))


def read(folder: Path) -> float:
    """Seconds to read all samples of a folder or a pack once, as training does after its first epoch."""
    started_s = time.perf_counter()
    for name in token_names(folder):
        read_tokens(token_path(folder, name))
    return time.perf_counter() - started_s


def calls(folder: Path) -> dict[str, int]:
    """System calls of reading all samples, by name; empty without strace."""
    if shutil.which("strace") is None:
        return {}
    found = folder.parent / "calls"
    command = ["strace", "-f", "-c", "-o", str(found), sys.executable, __file__, "--read", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", found.read_text(), re.M)
    return {name: int(count) for count, name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=64, help="token files (default 64)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each (default 4096)")
    parser.add_argument("--patch", type=int, default=16, help="side of a patch (default 16)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
        return
    with tempfile.TemporaryDirectory(prefix="bench_pack_") as name:
        folder, pack = Path(name) / "tokens", Path(name) / "pack"
        make(folder, args.files, args.length, args.patch)
        pack_folder(folder, pack, 2**30)
        one = sum(path.stat().st_size for path in folder.iterdir()) / args.files / 2**20
        pairs = [(read(folder), read(pack)) for _ in range(3)]
        files_s, pack_s = (min(pair[i] for pair in pairs) for i in (0, 1))
        each_ms = [1e3 * seconds / args.files for seconds in (files_s, pack_s)]
        print(
            f"read      {args.files} samples of {one:.1f} MiB (in the page cache): per file {each_ms[0]:.1f} ms, "
            f"packed {each_ms[1]:.1f} ms each: {pack_s / files_s:.2f} x the time"
        )
        found = [calls(each) for each in (folder, pack)]
        for kind in ("openat", "pread64", "preadv", "read", "newfstatat", "lseek", "fstat") if all(found) else ():
            counts = [each.get(kind, 0) for each in found]
            print(f"          {kind:<11} {counts[0]} for files, {counts[1]} for the pack, start of Python included")
        print(f"inodes    {len(list(folder.iterdir()))} files, {len(list(pack.iterdir()))} in the pack")


if __name__ == "__main__":
    main()
