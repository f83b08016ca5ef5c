"""What a run leaves behind: metrics.jsonl, env.json and record.json, each whole or absent."""

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
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from pydantic import BaseModel, BeforeValidator, Field, InstanceOf, ValidationError, field_validator
from pydantic.fields import FieldInfo

from data_prep.system.files import temporary_name, write_atomic

if TYPE_CHECKING:
    from launch.records.loggers import Sink

SCHEMA_VERSION: Literal[1] = 1
WARMUP_STEPS = 3
WARMUP_RULE = f"the first {WARMUP_STEPS} steps of every start are left out of the timing"


def _whole(value: Any) -> Any:
    """A whole number that JSON holds as a float, such as 300.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Types of fields. Numbers are not converted from text, NaN is refused, and null is a missing value.


Text = InstanceOf[str]
Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, lt=2**63)]
Signed = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Fractions = dict[str, Fraction]


def _field(about: str = "", *, of: Literal["row", "seed", "mean"] = "seed", column: str | None = None) -> Any:
    """A field that may be missing: what it is with its unit, its role in tables, and its head in comparison.csv.

    Runs that differ in a `row` field are different rows of a table; for a `mean` field a row shows the mean over its
    seeds.
    """
    return Field(default=None, description=about or None, json_schema_extra={"of": of, "column": column})


class Record(BaseModel):
    """What a run leaves behind, however it ended. A missing number is null; new fields are optional.

    An image is a frame. For a run on crops, `samples_per_image` crops have the pixels of a frame, and
    seconds_per_image, images_per_s and epochs count in frames. The fields with a column are in the order of
    comparison.csv.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: Text
    experiment: Text = Field(json_schema_extra={"of": "row", "column": "experiment"})
    status: Literal["ok", "oom", "failed", "timeout", "preempted"]
    reason: Text | None = _field("why the run did not end well")
    model: Text | None = _field(of="row", column="model")
    decoder: Text | None = _field(of="row", column="decoder")
    patching: Text | None = _field(of="row", column="patching")
    resolution: Count | None = _field("side of the frame, px", of="row", column="resolution_px")
    patch: Count | None = _field("smallest patch p, px", of="row", column="patch_px")
    length: Count | None = _field("L, slots of the sequence", of="row", column="length")
    tokens_per_image: Number | None = _field("mean number of tokens really used", of="mean", column="tokens_per_image")
    parameters: Count | None = _field(column="parameters")
    steps: Count | None = _field(of="mean", column="steps")
    epochs: Number | None = _field(of="mean", column="epochs")
    train_seconds: Number | None = _field("seconds of optimiser steps", of="mean", column="train_seconds")
    seconds_per_image: Number | None = _field(
        "training seconds per frame, all ranks together", of="mean", column="seconds_per_image"
    )
    samples_per_image: Number | None = _field(
        "crops that have the area of one frame; 1 without crops", column="samples_per_image"
    )
    preprocessing_seconds: Number | None = _field(
        "seconds of preparing one slide", of="mean", column="preprocessing_seconds"
    )
    dice: Fraction | None = _field("mean over the test slides", of="mean", column="dice")
    dice_pooled: Fraction | None = _field("all test slides as one picture", of="mean", column="dice_pooled")
    n_test: Count | None = _field("test slides", column="n_test")
    dice_ceiling: Fraction | None = _field(
        "best Dice that any prediction on the cells could reach", of="mean", column="dice_ceiling"
    )
    task: Literal["segmentation", "classification"] | None = _field(column="task")
    accuracy: Fraction | None = _field(of="mean", column="accuracy")
    auc: Fraction | None = _field(of="mean", column="auc")
    peak_memory_gib: Number | None = _field("largest of all ranks", of="mean", column="peak_memory_gib")
    mfu: Number | None = _field("share of the hardware's peak", of="mean", column="mfu")
    loss_final: Signed | None = _field(of="mean", column="loss_final")
    gpus: Count | None = _field(of="row", column="gpus")
    nodes: Count | None = _field(of="row", column="nodes")
    device: Text | None = _field("cpu or cuda", of="row")
    device_name: Text | None = _field(of="row", column="hardware")
    engine: Text | None = _field(of="row", column="engine")
    precision: Text | None = _field(of="row", column="precision")
    attention_backend: Text | None = _field(of="row", column="attention_backend")
    optimiser: Text | None = _field(of="row", column="optimiser")
    global_batch: Count | None = _field("samples of a step over all ranks", of="row", column="global_batch")
    split_sha256: Text | None = _field("digest of the names in train, val and test", of="row", column="split_sha256")
    commit: Text | None = _field(column="commit")
    data: Text | None = _field("folder of token files or pictures", of="row")
    config_sha256: Text | None = _field()
    seed: Count | None = _field()
    n_train: Count | None = _field("training slides")
    images_per_s: Number | None = _field("frames a second, all ranks together")
    train_tflop: Number | None = _field("10^12 FLOPs of all ranks' steps, two for each multiply-accumulate", of="mean")
    warmup_rule: Text | None = _field("what the timing leaves out")
    timed_steps: Count | None = _field()
    dice_per_slide: Fractions | None = _field("Dice by test slide")
    dice_val: Fraction | None = _field()
    score_val: Fraction | None = _field("what the best checkpoint was chosen by: Dice, AUC or accuracy on val")
    floors: Fractions | None = _field("scores that need no learning, by rule")
    accuracy_by_size: Fractions | None = _field("accuracy by the pictures' side, px")
    memory_source: Text | None = _field("who counted peak_memory_gib")
    started_at: Text | None = _field("ISO 8601, UTC")
    finished_at: Text | None = _field("ISO 8601, UTC")
    starts: Count | None = _field("lives of the run")

    @field_validator("run_id", "experiment")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty")
        return value


RECORD_KEYS = tuple(Record.model_fields)


def fields_of(kind: Literal["row", "mean"]) -> list[str]:
    """The fields in which rows of a table differ, or whose mean over the seeds a row shows."""
    return [name for name, field in Record.model_fields.items() if _extra(field).get("of") == kind]


def columns() -> dict[str, str]:
    """The column of comparison.csv of each field that has one."""
    return {name: str(head) for name, f in Record.model_fields.items() if (head := _extra(f).get("column"))}


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


# Variables that env.json keeps; never the whole environment, which holds secrets.
_ENVIRONMENT = """
    SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_NTASKS SLURM_RESTART_COUNT
    SLURM_CLUSTER_NAME SLURM_JOB_PARTITION CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES
    OMP_NUM_THREADS LOADEDMODULES NCCL_DEBUG NCCL_SOCKET_IFNAME FI_PROVIDER
""".split()
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "h5py", "openslide-python", "pydantic", "mpi4py", "deepspeed")


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: Any) -> bytes:
    """Indented JSON, keys in the given order, with a final newline; NaN and infinity are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def new_record(**known: Any) -> dict[str, Any]:
    """All keys of a record: those given filled in, the others null.

    Raises:
        ValueError: An unknown key, or a value that does not fit; one line names it.
    """
    unknown = sorted(set(known) - set(RECORD_KEYS))
    if unknown:
        raise ValueError(f"unknown record key {unknown[0]!r}")
    try:
        return vars(Record.model_validate({"warmup_rule": WARMUP_RULE, **known})).copy()
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, on one line: `dice_per_slide[a] is 'x': input should be a valid number`."""
    fault = error.errors(include_url=False)[0]
    key, *inside = map(str, fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return (
        f"{key}{''.join(f'[{part}]' for part in inside)} is {fault['input']!r:.40}: {message[:1].lower()}{message[1:]}"
    )


def write_record(run_dir: Path, record: dict[str, Any], first_wins: bool = False) -> bool:
    """Write `run_dir/record.json` atomically, and return whether it was written.

    `first_wins` keeps a record that is there. When one rank fails, the others fail after it with a broken connection,
    and only the first one knows the cause.
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
    """The record of a run directory, or None when there is no valid one."""
    try:
        record = json.loads((run_dir / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "status" in record else None


class Metrics:
    """metrics.jsonl: one JSON object per line, one writer, every line flushed; `sinks` get every new line too.

    Lines after `resumed_step` and half-written ones are dropped, so that no step appears twice. Their work is lost.
    Without `scored`, the checkpoint lacks the evaluation at this very step, and its lines are dropped too: it will be
    done again.
    """

    def __init__(self, path: Path, resumed_step: int, sinks: Sequence[Sink] = (), scored: bool = False) -> None:
        if path.exists():
            lines = [(json.loads(line), line) for line in _valid_lines(path)]
            kept = [line for it, line in lines if it["step"] < resumed_step + (scored or "loss" in it)]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self._file: TextIO = path.open("a")
        self._sinks = sinks

    def write(self, **values: Any) -> None:
        """Append one line and flush it; floats keep all digits, so that two runs can be compared exactly."""
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
    """The commit of the code, with `+dirty` when tracked files were changed; None outside git."""

    def git(*words: str) -> str:
        place = folder or Path(__file__).resolve().parent
        done = subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(hosts: list[str], devices: list[str], launcher: str) -> dict[str, Any]:
    """Content of env.json: code, versions, machine and the listed variables."""
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

    `ru_maxrss` is the fallback: a process inherits it from the one that started it, however large that was.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_summary(device: Any) -> str:
    """Memory of a rank that ran out of it: the allocator's table of a GPU, the kernel's view of the process."""
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
        with contextlib.suppress(OSError, IndexError):
            return Path(path).read_text().splitlines()[0].strip()
    return None


def cpu_name() -> str:
    """Model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
