"""What the build tests share: small real inputs, the command line in a process of its own, comparing folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_prep.build.log import SlideOutcome, SlideTask, Step
from data_prep.build.run import run_step
from data_prep.system.powers_of_two import is_power_of_two
from data_prep.tokens.token_set import TokenSet
from data_prep.tree.quadtree import budget_tree
from tests.helpers.frames import cut
from tests.helpers.repository import GLOMERULI, ROOT

TREE = ["--resolution", "1024", "--patch", "16", "--length", "256"]


def make_set(
    size_px: int = 256,
    p: int = 8,
    length: int = 64,
    content_wh=(200, 256),
    classes: int = 2,
    seed: int = 0,
    masks: bool = True,
) -> TokenSet:
    """Tokens of a random picture, by the real functions."""
    assert is_power_of_two(size_px)
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (size_px, size_px, 3), np.uint8)
    picture[:, content_wh[0] :] = picture[content_wh[1] :] = 255
    ids = np.repeat(np.repeat(rng.integers(0, classes + 1, (size_px // 4, size_px // 4), np.uint8), 4, 0), 4, 1)
    counts = rng.integers(0, 60, (size_px // p, size_px // p)) ** 2
    return cut(
        lambda x, y, w, h: picture[y : y + h, x : x + w],
        budget_tree(counts, p, length),
        p,
        size_px,
        content_wh,
        read_mask=(lambda x, y, w, h: ids[y : y + h, x : x + w]) if masks else None,
        classes=classes,
    )


def build_one(task: SlideTask, beat=None) -> SlideOutcome:
    """One slide's token file, of a frame that is one region, as its worker would make it."""
    return run_step(Step("begin", task, task.options.resolution), beat).outcome


def some_slides(folder: Path, count: int = 3) -> tuple[Path, Path]:
    """Copies of the first images and their masks, so that tests may spoil them."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for path in sorted((GLOMERULI / "images").iterdir())[:count]:
        shutil.copy(path, images)
        shutil.copy(GLOMERULI / "masks" / f"{path.stem}.png", masks)
    return images, masks


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, args)]


def plain_env(**more: str) -> dict[str, str]:
    """The environment without what a launcher around the tests may have left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_", "SLURM_", "MPI"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(command(*args), cwd=ROOT, env=plain_env(**env), capture_output=True, text=True, timeout=300)


def token_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tokens.h5"))}


def leftovers(folder: Path) -> list[str]:
    """Everything in an output folder that is neither a whole token file nor the log."""
    return [p.name for p in folder.iterdir() if not p.name.endswith(".tokens.h5") and p.name != "build_log.jsonl"]
