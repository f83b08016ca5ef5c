"""Short measurements of one rank's device, disk, network and clock.

Every probe takes about a second on a healthy node of its kind and fits a small node's memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.system.files import temporary_name

_GEMM_SIDE = {"cuda": 8192, "cpu": 768}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_REDUCE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 23}
_DISK_BYTES = 1 << 26
_REDUCE_REPEATS = 3


@dataclass
class Report:
    """What one rank found; a probe that does not apply is absent from `rates`."""

    host: str  # name of the node, as the scheduler knows it
    rank: int
    device: str = ""  # identity of the gpu, so that two ranks on one are noticed; "" on CPUs
    # gemm_fp32 and gemm_bf16 (TFLOP/s), memory (GB/s), all_reduce_node and all_reduce (GB/s), disk_write (MB/s),
    # disk_free (GiB), clock (s, this node's clock minus rank 0's)
    rates: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # what could not be measured, one line each


def host_name() -> str:
    """The name by which the scheduler can exclude this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def device_identity(device: torch.device) -> str:
    """A text that tells the gpus of a node apart; "" on CPUs, which ranks may share."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", "") or f"index {device.index} of {os.environ.get('CUDA_VISIBLE_DEVICES')}")


def wait_for(device: torch.device) -> None:
    """Wait until a gpu has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fastest(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Seconds of the fastest of several repeats; the first one, which loads and plans, does not count."""
    work()
    wait_for(device)
    best, end = float("inf"), time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        work()
        wait_for(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def gemm_tflops(device: torch.device, precision: str, budget_s: float) -> float:
    """Rate of a large square matrix product, 2 n^3 operations, in TFLOP/s."""
    side = _GEMM_SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(side, side, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * side**3 / _fastest(lambda: torch.mm(a, a, out=out), device, budget_s) / 1e12


def memory_gb_s(device: torch.device, budget_s: float) -> float:
    """Rate of a copy within the device's memory, bytes read plus bytes written, in GB/s."""
    size = _COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, budget_s) / 1e9


def all_reduce_gb_s(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Bus bandwidth of an all-reduce, 2 (n - 1) / n times its bytes per second, in GB/s (as nccl-tests defines it).

    Every rank of the group must call it; the number of repeats is fixed, so that they stay together.
    """
    ranks = dist.get_world_size(group)
    tensor = torch.zeros(_REDUCE_BYTES[device.type] // 4, device=device)
    best = float("inf")
    for repeat in range(_REDUCE_REPEATS + 1):
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        wait_for(device)
        if repeat:
            best = min(best, time.perf_counter() - start)
    return 2 * (ranks - 1) / ranks * tensor.nbytes / best / 1e9


def disk(folder: Path, budget_s: float) -> tuple[float, float]:
    """(MB/s of a synced write, GiB free) of a folder, which is made if it is missing.

    Raises:
        OSError: It cannot be made or written.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_name(folder / "preflight")
    block = os.urandom(1 << 22)  # file systems that compress must not look fast
    written, start = 0, time.perf_counter()
    try:
        with path.open("wb", buffering=0) as out:
            while written < _DISK_BYTES and time.perf_counter() - start < budget_s:
                out.write(block)
                os.fsync(out.fileno())
                written += len(block)
        seconds = time.perf_counter() - start
        free = shutil.disk_usage(folder).free
    finally:
        path.unlink(missing_ok=True)
        for parent in made:  # leave nothing behind; another node may be using it
            try:
                parent.rmdir()
            except OSError:
                break
    return written / seconds / 1e6, free / 2**30


def clock_offsets_s(rounds: int = 5) -> list[float]:
    """Every rank's clock minus rank 0's at this moment, in seconds; every rank must call it.

    All read their clocks as they leave a barrier; the median of some rounds ignores ranks that left late.
    """
    offsets: list[list[float]] = []
    for _ in range(rounds):
        dist.barrier()
        own = torch.tensor([time.time()], dtype=torch.float64)
        everyone = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        offsets.append([float(t - everyone[0]) for t in everyone])
    return [sorted(values)[rounds // 2] for values in zip(*offsets, strict=True)]
