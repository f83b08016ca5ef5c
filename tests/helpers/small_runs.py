"""Small real token files, and what tests need to start `python -m launch train` on several ranks and to read it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data_prep.token_files.token_file import new_meta, token_path, write_tokens
from data_prep.tokens.ceiling import ceiling
from data_prep.tokens.token_set import TokenSet
from data_prep.tree.quadtree import budget_tree
from data_prep.tree.uniform import uniform_leaves
from tests.helpers.frames import cut
from tests.helpers.repository import ROOT

SIZE, PATCH, LENGTH = 64, 8, 16
STEPS = 24  # of the runs that are stopped somewhere and compared with one that was not
SPLIT = {"train": ["a", "b", "c", "d", "e"], "val": ["f", "g"], "test": ["h", "i", "j"]}


def picture(seed: int, content_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image with one bright disc per class and noise, and its class ids; white and 0 outside the content."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    image = rng.integers(40, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    cx, cy, r = *rng.integers(12, 44, 2).tolist(), int(rng.integers(6, 14))
    disc = (x - cx) ** 2 + (y - cy) ** 2 < r * r
    image[disc] = rng.integers(150, 230, (int(disc.sum()), 3))
    mask[disc] = 1
    outside = (x >= content_wh[0]) | (y >= content_wh[1])
    image[outside], mask[outside] = 255, 0
    return image, mask


def token_set(
    seed: int,
    patching: str = "apf",
    content_wh: tuple[int, int] = (SIZE, SIZE),
    patch: int = PATCH,
    length: int = LENGTH,
) -> TokenSet:
    """A token set of `picture(seed)`; adaptive ones have at most `length` leaves, and not all the same number."""
    image, mask = picture(seed, content_wh)
    if patching == "apf":
        cells = mask.reshape(SIZE // patch, patch, SIZE // patch, patch).sum((1, 3))
        edges = np.where((cells > 0) & (cells < patch * patch), cells, 0)
        leaves = budget_tree(edges, patch, length - 3 * (seed % 3))
    else:
        leaves = uniform_leaves(SIZE, patch)
    return cut(
        lambda x, y, w, h: image[y : y + h, x : x + w],
        leaves,
        patch,
        SIZE,
        content_wh,
        lambda x, y, w, h: mask[y : y + h, x : x + w],
    )


def write_folder(folder: Path, patching: str = "apf", patch: int = PATCH, length: int = LENGTH) -> Path:
    """A folder of token files for all names of SPLIT, and split.json beside them."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(sorted(name for names in SPLIT.values() for name in names)):
        tokens = token_set(seed, patching, (SIZE, SIZE - 16) if seed % 2 else (SIZE, SIZE), patch, length)
        meta = new_meta(
            slide=name,
            params={"patching": patching, "patch": patch, "resolution": SIZE},
            size0_wh=[SIZE, SIZE],
            ceiling=ceiling(tokens.mask_counts, tokens.content_counts),
        )
        write_tokens(token_path(folder, name), tokens, meta)
    (folder / "split.json").write_text(json.dumps(SPLIT))
    (folder / "build_log.jsonl").write_text(
        "".join(json.dumps({"slide": n, "status": "done", "seconds": s}) + "\n" for n, s in (("a", 1.0), ("b", 2.0)))
    )
    return folder


def overrides(files: Path, run_root: Path, **more: object) -> list[str]:
    """Settings of a very small run on `files`; `more` uses `__` for the dot."""
    settings = {
        "data.dir": files,
        "data.split": files / "split.json",
        "data.resolution": SIZE,
        "data.patch": PATCH,
        "data.length": LENGTH,
        "data.jitter": 0.2,
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.mlp_dim": 64,
        "model.leaf_base": 8,
        "train.batch": 4,
        "train.max_steps": 20,
        "train.max_seconds": "null",
        "train.lr": 3e-3,
        "eval.every_steps": "null",
        "eval.pictures_px": 32,
        "run_root": run_root,
        "engine.threads": 1,
    }
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in settings.items()]


@dataclass
class Group:
    """The processes of one start."""

    processes: list[subprocess.Popen[str]]
    errors: list[str] = field(default_factory=list)

    def wait(self, timeout_s: float = 240) -> list[int]:
        """Exit codes of all ranks; their standard errors are in `errors`."""
        self.errors = [p.communicate(timeout=timeout_s)[1] for p in self.processes]
        return [p.returncode for p in self.processes]

    def send(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.send_signal(number)


def clean_env() -> dict[str, str]:
    """The environment without anything a launcher may have set."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "MPI_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def finish_well(group: Group) -> None:
    """All ranks must end with 0."""
    codes = group.wait()
    assert codes == [0] * len(codes), group.errors


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, in order; steps must be there once each, from 1 on."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["loss"] for line in steps]


def launch_rank(rank: int, world: int, port: str, program: list[str], **popen: Any) -> subprocess.Popen[str]:
    """`python program...` as one rank of `world`, the variables set as torchrun sets them."""
    env = clean_env()
    if world > 1:
        env |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    return subprocess.Popen([sys.executable, *program], cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE, **popen)


def flip_a_byte(checkpoint: Path) -> None:
    """Change one bit in the middle of the largest data file of a checkpoint."""
    path = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def stoppable(files: Path, root: Path, *extra: str, **more: object) -> list[str]:
    """Settings of a run of STEPS steps in `root/smoke/r` that may be stopped anywhere, sharded over its ranks."""
    settings = {
        "run_id": "r",
        "train__max_steps": STEPS,
        "checkpoint__every_steps": 4,
        "checkpoint__keep": 3,
        "eval__every_steps": 8,
        "eval__pictures_px": 0,
        "engine__name": "fsdp",
    }
    return [*overrides(files, root, **(settings | more)), *extra]


def wait_for_steps(run_dir: Path, count: int, group: Group) -> None:
    """Until metrics.jsonl has this many lines; the processes must still be running."""
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        assert all(p.poll() is None for p in group.processes), group.wait()
        time.sleep(0.002)
    raise AssertionError("training did not get there")


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Model and optimiser of the last checkpoint of a run of STEPS steps, as one flat dict."""
    target = run_dir.parent / "final.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step-{STEPS}", target)
    tree = torch.load(target, weights_only=False)
    flat = {f"model.{k}": v for k, v in tree["model"].items()}
    for name, moments in tree["optimizer"]["state"].items():
        flat |= {f"optimizer.{name}.{k}": v for k, v in moments.items()}
    return flat


def ended_alike(run_dir: Path, whole: Path) -> None:
    """Same losses, evaluations, weights and moments, to the last bit, as a run that nothing disturbed."""
    assert losses(run_dir) == losses(whole)
    measured = []
    for folder in (run_dir, whole):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        scores = [line for line in lines if "val_dice" in line or "test_dice" in line]
        measured.append([{k: v for k, v in line.items() if not k.startswith("train_")} for line in scores])
    assert measured[0] == measured[1], "evaluations once each, with the same numbers"
    a, b = final_weights(run_dir), final_weights(whole)
    assert a.keys() == b.keys() and len(a) > 40
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path.suffix in (".tmp", ".old")]
