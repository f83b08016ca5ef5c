"""Real slides with faults put in: flipped bits, cuts, other tags. No crash, no hang, no success that hides the damage.

Every case is built in a child process that may die, with a limit on its time and memory. What may come out: refused
with one line; built with the damaged tiles listed or with a warning that names the odd directory; built with the very
pixels of the sound slide; or a picture that no reader can tell from a sound one: bits flipped inside a stream that
still decodes, which the slide's SHA-256 in the token file alone shows. The last kind is counted, not hidden.
"""

import json
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tifffile

from tests.helpers.builds import plain_env
from tests.helpers.repository import ROOT, WSI

SOURCES = [WSI / name for name in ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "small_16x16.svs")]
KINDS = ("flip anywhere", "flip in directory", "cut", "zeros", "tag", "swap tags", "offsets", "noise in tile")

CASE_S, CASE_GIB = 30, 3  # of CPU time and address space; a case takes 0.3 s

_CHILD = """
import hashlib, json, resource, signal, sys
from pathlib import Path
from data_prep.build.options import BuildOptions
from data_prep.build.run import build, prepare_out
from data_prep.token_files.token_file import read_tokens, token_path
out = Path(sys.argv[1])
prepare_out(out)
seconds, gib = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, seconds)   # of CPU time; ends this process, also inside a library
    path, tile = json.loads(line)
    print("begin", path, flush=True)
    options = BuildOptions(1024, 16, length=256, tile_px=tile)
    outcome = build([Path(path)], options, out, rebuild=True)[0]
    found = {"status": outcome.status, "reason": outcome.reason, "traceback": outcome.traceback,
             "warnings": [text for text in outcome.warnings if "leaves used" not in text]}
    if outcome.status == "done":
        tokens, meta = read_tokens(token_path(out, Path(path).stem))
        parts = (tokens.tokens, tokens.leaf_xy, tokens.leaf_size, tokens.content_counts)
        found["pixels"] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        found["damaged"], found["about"] = meta["damaged"], [meta["size0_wh"], meta["mpp"]]
    print(json.dumps(found), flush=True)
"""


class Layout:
    """Where things are in a classic little-endian TIFF: directory entries and tile data."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.entries: list[int] = []  # offsets of 12-byte entries
        self.tiles: list[tuple[int, int]] = []  # of levels, and the strips of thumbnails and labels
        with tifffile.TiffFile(path) as tiff:
            assert tiff.byteorder == "<" and not tiff.is_bigtiff
            for page in tiff.pages:
                count = struct.unpack_from("<H", self.data, page.offset)[0]
                self.entries += [page.offset + 2 + 12 * i for i in range(count)]
                self.tiles += list(zip(page.dataoffsets, page.databytecounts, strict=True))

    def in_tiles(self, at: int) -> bool:
        return any(start <= at < start + count for start, count in self.tiles)


def mutated(layout: Layout, seed: int) -> tuple[bytes, str, bool]:
    """A copy with a fault, what was done, and whether tile data changed and no directory."""
    rng = random.Random(seed)
    kind, data = KINDS[seed % len(KINDS)], bytearray(layout.data)
    changed: list[int] = []
    if kind == "flip anywhere":
        changed = [rng.randrange(len(data)) for _ in range(rng.choice([1, 5, 50]))]
    elif kind == "flip in directory":
        changed = [rng.choice(layout.entries) + rng.randrange(12) for _ in range(rng.choice([1, 3]))]
    elif kind == "cut":
        return bytes(data[: rng.randrange(1, len(data))]), kind, False
    elif kind == "zeros":
        start = rng.randrange(len(data))
        changed = list(range(start, min(len(data), start + rng.choice([16, 1000, 100_000]))))
        data[changed[0] : changed[-1] + 1] = bytes(len(changed))
        return bytes(data), kind, all(map(layout.in_tiles, (changed[0], changed[-1])))
    elif kind == "tag":
        entry = rng.choice(layout.entries)
        value = rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
        struct.pack_into("<I", data, entry + rng.choice([4, 8]), value)
        return bytes(data), kind, False
    elif kind == "swap tags":
        a, b = rng.sample(layout.entries, 2)
        data[a + 2 : a + 12], data[b + 2 : b + 12] = data[b + 2 : b + 12], data[a + 2 : a + 12]
        return bytes(data), kind, False
    elif kind == "offsets":
        tables = [at for at in layout.entries if struct.unpack_from("<H", data, at)[0] in (324, 325, 273, 279)]
        _, _, count, value = struct.unpack_from("<HHII", data, rng.choice(tables))
        where = value + 4 * rng.randrange(count) if count > 1 else tables[0] + 8
        struct.pack_into("<I", data, where, rng.choice([0, 7, len(data) - 3, 2**32 - 1, rng.randrange(len(data))]))
        return bytes(data), kind, False
    else:
        start, count = rng.choice(layout.tiles)
        begin = start + rng.randrange(count)
        data[begin : begin + 64] = rng.randbytes(len(data[begin : begin + 64]))
        return bytes(data), kind, begin + 64 <= start + count
    for at in changed:
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data), kind, any(map(layout.in_tiles, changed))


def run_child(cases: list[tuple[str, int | None]], out: Path) -> list[dict]:
    """Outcomes of the cases; fails, naming the case, if the child dies or hangs."""
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(out), str(CASE_S), str(CASE_GIB)],
            input=lines,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=plain_env(),
            timeout=60 + 5 * len(cases),
        )
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode()
        pytest.fail(f"hangs: {text.splitlines()[-1:]}")
    assert done.returncode != -signal.SIGPROF, f"takes more than {CASE_S} s: {done.stdout.splitlines()[-1:]}"
    last = [line for line in done.stdout.splitlines() if line.startswith("begin")][-1:]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}: {done.stderr[-500:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def inject(tmp_path: Path, seeds: range) -> Counter:
    layouts = {path: Layout(path) for path in SOURCES}
    tiles = [None, 256]
    sound = {
        (path, tile): found
        for tile in tiles
        for path, found in zip(
            SOURCES, run_child([(str(path), tile) for path in SOURCES], tmp_path / "sound"), strict=True
        )
    }
    assert all(found["status"] == "done" and not found["damaged"] for found in sound.values())
    cases, about = [], []
    for seed in seeds:
        source, tile = SOURCES[seed % 5 % 3], tiles[seed // 3 % 2]
        data, kind, in_tiles = mutated(layouts[source], seed)
        path = tmp_path / f"case{seed:04d}.svs"
        path.write_bytes(data)
        cases.append((str(path), tile))
        about.append((source, tile, kind, in_tiles))
    classes: Counter = Counter()
    for (path, _), (source, tile, kind, in_tiles), found in zip(
        cases, about, run_child(cases, tmp_path / "out"), strict=True
    ):
        what = f"{Path(path).name} ({kind} in {source.name}): {found}"
        assert not found["traceback"], what
        good = sound[source, tile]
        if found["status"] == "failed":
            assert Path(path).name in found["reason"] and "\n" not in found["reason"], what
            classes["refused"] += 1
        elif found["damaged"]:
            classes["damaged tiles listed"] += 1
        elif found["warnings"]:
            assert kind not in ("cut", "noise in tile"), what
            classes["an odd directory told"] += 1
        elif found["pixels"] == good["pixels"]:
            classes["the same pixels"] += 1
        elif in_tiles:
            classes["a stream that still decodes"] += 1
        else:
            pytest.fail(f"silent success: {what}")
    return classes


def test_faults_are_refused_listed_or_harmless(tmp_path: Path):
    classes = inject(tmp_path, range(16))
    assert sum(classes.values()) == 16 and classes["refused"] >= 3 and classes["the same pixels"] >= 2
    assert classes["a stream that still decodes"] <= 4, classes


@pytest.mark.slow
def test_two_hundred_faults(tmp_path: Path):
    classes = inject(tmp_path, range(1000, 1200))
    print(dict(classes))
    assert sum(classes.values()) == 200 and classes["damaged tiles listed"] >= 15
    assert classes["a stream that still decodes"] <= 20, classes
