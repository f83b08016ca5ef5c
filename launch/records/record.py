"""What a run leaves behind: metrics.jsonl, env.json and record.json, each whole or absent.

Must not import torch: analysis and login nodes read records.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data_prep.system.files import temporary_name, write_atomic

if TYPE_CHECKING:
    from launch.records.loggers import Sink

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "failed", "timeout", "preempted")
WARMUP_STEPS = 3
WARMUP_RULE = f"the first {WARMUP_STEPS} steps of every start are left out of the timing"

# Every record has all of these keys; a number that is missing is null. An image is a frame: for a run on crops,
# `samples_per_image` crops have its pixels, and seconds_per_image, images_per_s and epochs count in frames.
RECORD_KEYS = (
    "schema_version",
    "run_id",
    "experiment",
    "status",
    "reason",
    "model",
    "decoder",
    "patching",
    "resolution",
    "patch",
    "length",
    "tokens_per_image",
    "parameters",
    "gpus",
    "nodes",
    "device",
    "device_name",
    "engine",
    "precision",
    "attention_backend",
    "seed",
    "steps",
    "epochs",
    "train_seconds",
    "seconds_per_image",
    "images_per_s",
    "train_tflop",
    "warmup_rule",
    "timed_steps",
    "preprocessing_seconds",
    "dice",
    "dice_pooled",
    "dice_ceiling",
    "dice_per_slide",
    "dice_val",
    "floors",
    "task",
    "accuracy",
    "auc",
    "accuracy_by_size",
    "score_val",
    "n_train",
    "n_test",
    "peak_memory_gib",
    "memory_source",
    "mfu",
    "loss_final",
    "data",
    "split_sha256",
    "config_sha256",
    "optimiser",
    "global_batch",
    "samples_per_image",
    "commit",
    "started_at",
    "finished_at",
    "starts",
)

# Variables worth knowing later; never the whole environment, which holds secrets.
_ENVIRONMENT = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_PARTITION",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "LOADEDMODULES",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "FI_PROVIDER",
)
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "h5py", "openslide-python", "pydantic", "mpi4py", "deepspeed")


def now() -> str:
    """The moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: Any) -> bytes:
    """Indented JSON, keys in the given order, with a final newline; NaN and infinity are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def new_record(**known: Any) -> dict[str, Any]:
    """All keys of a record, those given filled in, the others null.

    Raises:
        ValueError: A key or a status that does not exist.
    """
    record: dict[str, Any] = dict.fromkeys(RECORD_KEYS)
    record.update(schema_version=SCHEMA_VERSION, warmup_rule=WARMUP_RULE)
    unknown = sorted(set(known) - set(record))
    if unknown:
        raise ValueError(f"unknown record key {unknown[0]!r}")
    record.update(known)
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r} is none of {', '.join(STATUSES)}")
    return record


def write_record(run_dir: Path, record: dict[str, Any], first_wins: bool = False) -> bool:
    """Write `run_dir/record.json` atomically.

    Args:
        run_dir: The run directory.
        record: What `new_record` made.
        first_wins: Keep a record that is already there: when one rank fails, the others fail after it of a broken
            connection, and only the first one knows the cause.

    Returns:
        Whether the record was written.
    """
    target = run_dir / "record.json"
    if not first_wins:
        write_atomic(target, to_json(record))
        return True
    temporary = temporary_name(target)
    try:
        temporary.write_bytes(to_json(record))
        os.link(temporary, target)  # unlike a rename, refuses to replace
    except FileExistsError:
        return False
    except OSError:
        if target.exists() or not temporary.exists():
            raise
        temporary.replace(target)  # a file system without hard links
    finally:
        temporary.unlink(missing_ok=True)
    return True


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The record of a run directory, or None when there is none (or no valid one)."""
    try:
        record = json.loads((run_dir / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "status" in record else None


class Metrics:
    """metrics.jsonl: one JSON object per line, one writer, every line flushed.

    Args:
        path: The file.
        resumed_step: Lines after this step were written by a start whose later work is lost; they are dropped, so that
            no step appears twice, and a half-written last line.
        sinks: Get every line too, from now on.
        scored: Whether the checkpoint of this step was written after its evaluation. If not, lines of an evaluation at
            this very step are dropped as well: it will be done again.
    """

    def __init__(self, path: Path, resumed_step: int, sinks: Sequence[Sink] = (), scored: bool = False) -> None:
        if path.exists():
            lines = [(json.loads(line), line) for line in _valid_lines(path)]
            kept = [line for it, line in lines if it["step"] < resumed_step + (scored or "loss" in it)]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file: TextIO = path.open("a")
        self._sinks = sinks

    def write(self, **values: Any) -> None:
        """Append one line and flush it; floats keep all their digits, so that two runs can be compared exactly."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(values["step"], {k: v for k, v in values.items() if k != "step"})

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def _valid_lines(path: Path) -> Iterable[str]:
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            yield line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    return [json.loads(line) for line in _valid_lines(path)]


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the code, with `+dirty` when tracked files differ from it; None outside git."""
    folder = folder or Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def environment(hosts: list[str], devices: list[str], launcher: str) -> dict[str, Any]:
    """Content of env.json: code, versions, machine and the allow-listed variables."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "schema_version": SCHEMA_VERSION,
        "written_at": now(),
        "commit": git_commit(),
        "driver": gpu_driver(),
        "command": ["python", "-m", "launch", *sys.argv[1:]],
        "launcher": launcher,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "hosts": sorted(set(hosts)),
        "first_host": socket.gethostname(),
        "ranks": len(hosts),
        "devices": sorted(set(devices)),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "variables": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def peak_resident_gib() -> float:
    """Largest resident memory of this process so far.

    Not `ru_maxrss` where it can be helped: a process inherits that from the one that started it, however large it was.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_summary(device: Any) -> str:
    """What held memory when there was too little: the allocator's table of a GPU, the kernel's view of a process.

    Args:
        device: The rank's `torch.device`.
    """
    text = ""
    torch = sys.modules.get("torch")
    if torch is not None and device.type == "cuda":
        text = torch.cuda.memory_summary(device) + "\n"
    for path, keys in (("/proc/self/status", "Vm"), ("/proc/meminfo", "Mem")):
        with contextlib.suppress(OSError):
            lines = Path(path).read_text().splitlines()
            text += "".join(f"{line}\n" for line in lines if line.startswith(keys))
    return text


def gpu_driver() -> str | None:
    """Version line of the NVIDIA or AMD kernel driver; None without one."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text().splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return None


def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
