"""Facts of a computing site (jobs/sites/NAME.yaml) as checked data: hardware, network, scheduler, environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from launch.config.base import OptionalFloat, Section
from launch.config.config import ConfigError, suggest

SITES = Path(__file__).resolve().parents[2] / "jobs" / "sites"


class Hardware(Section):
    """One node and one gpu of it (what the scheduler gives one rank: a GCD on MI250X, the whole machine on `local`)."""

    gpu: str = Field(description="what one rank computes on")
    kind: Literal["rocm", "cuda", "cpu"] = Field(description="which torch build and device")
    gpus_per_node: int = Field(gt=0, description="ranks per node")
    cpus_per_gpu: int = Field(gt=0, description="cores a rank may use")
    memory_gib: OptionalFloat = Field(gt=0, description="memory of a gpu; null: the machine's own, asked when needed")
    reserved_gib: float = Field(default=0.0, ge=0, description="of it for context, communication and fragmentation")
    peak_tflops: dict[Literal["fp32", "bf16"], float] = Field(description="dense matrix peak of a gpu")
    memory_gb_s: float = Field(gt=0, description="peak bandwidth of a gpu's memory, 1e9 bytes/s")
    launch_us: float = Field(default=6.0, ge=0, description="host time to start one kernel in eager torch")


class Link(Section):
    """One hop: seconds = latency_us * 1e-6 + bytes / (gb_s * 1e9) (Hockney's alpha-beta model)."""

    latency_us: float = Field(ge=0, description="alpha, of one step of a collective")
    gb_s: float = Field(gt=0, description="1 / beta, one direction, share of one gpu when all of the node talk")


class Interconnect(Section):
    """Links inside a node and between nodes."""

    intra_node: Link
    inter_node: Link


class Expected(Section):
    """What a healthy node reaches; `preflight` refuses a node below `tolerance` times these rates.

    `plan` takes the rates of matrix products and memory from here, and of collectives from `network`.
    """

    gemm_tflops: dict[Literal["fp32", "bf16"], float] = Field(description="large matrix products on one gpu")
    memory_gb_s: float = Field(gt=0, description="copy of a large tensor on one gpu, bytes read plus written")
    all_reduce_gb_s: float = Field(gt=0, description="bus bandwidth of a large all-reduce over all ranks, per gpu")
    disk_write_mb_s: float = Field(gt=0, description="one writer per node, synced, in the run folder")
    disk_free_gib: float = Field(ge=0, description="free space in the run folder before a start")
    clock_skew_s: float = Field(gt=0, description="largest difference between the nodes' clocks")
    tolerance: float = Field(gt=0, le=1, description="share of a rate that still passes")


class TimeLimit(Section):
    """Longest time of a job of at most `nodes` nodes."""

    nodes: int = Field(gt=0)
    hours: float = Field(gt=0)


class Slurm(Section):
    """What a job script of this site needs. Texts go into the script as they are."""

    account_required: bool = Field(description="sbatch -A must be given")
    account_suffix: str = Field(default="", description="what GPU accounts end in")
    partition: str | None = Field(default=None, description="sbatch -p; null: the default one")
    directives: tuple[str, ...] = Field(default=(), description="#SBATCH lines besides nodes, tasks, cpus and time")
    shared_nodes: bool = Field(default=False, description="jobs of less than a node share it: no --exclusive for them")
    srun: tuple[str, ...] = Field(default=(), description="options of the training step: binding of gpus and cores")
    mpi: str = Field(description="srun --mpi= for the MPI step of data preparation; `none` for torch")
    time_limits: tuple[TimeLimit, ...] = Field(min_length=1, description="by size of the job, ascending")
    requeue: bool = Field(description="scontrol requeue from inside a job works; false: array chain")
    grace_s: int = Field(gt=0, description="--signal=B:USR1@this before the time limit; at least two steps and a save")

    @model_validator(mode="after")
    def _check(self) -> Slurm:
        sizes = [limit.nodes for limit in self.time_limits]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"time_limits must be in ascending order of nodes, got {sizes}")
        return self

    def hours(self, nodes: int) -> float | None:
        """Longest time of a job of this many nodes; None when the site runs no job of that size."""
        return next((limit.hours for limit in self.time_limits if nodes <= limit.nodes), None)


class NodeLocal(Section):
    """Fast disk of each node, where the Python environment is unpacked at scale."""

    path: str = Field(description="folder on every node; may use shell variables")
    sbcast: str = Field(description="options of sbcast that puts the archive there")
    from_nodes: int = Field(gt=0, description="worth it from this many nodes on")


class Site(Section):
    """A site file."""

    name: str = Field(description="name of the file without .yaml")
    title: str = Field(description="one line for lists")
    hardware: Hardware
    network: Interconnect
    expected: Expected
    slurm: Slurm | None = Field(default=None, description="null: no scheduler")
    modules: tuple[str, ...] = Field(default=(), description="`module load` of each, in this order")
    env: dict[str, str] = Field(default={}, description="exported by the job script; may use shell variables")
    env_multi_node: dict[str, str] = Field(default={}, description="exported only when the job has several nodes")
    task_env: dict[str, str] = Field(default={}, description="exported in each task, after srun, for its rank alone")
    node_local: NodeLocal | None = Field(default=None, description="null: no node-local disk")


def names() -> list[str]:
    """All sites there are, sorted."""
    return sorted(path.stem for path in SITES.glob("*.yaml"))


def read_site(path: Path) -> Site:
    """The checked facts of one file.

    Raises:
        ConfigError: Not YAML, unknown or missing keys, bad values; one line that names the file.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    try:
        site = Site.model_validate(tree)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigError(f"{path}: {'; '.join(dict.fromkeys(faults))}") from None
    if site.name != path.stem:
        raise ConfigError(f"{path}: name is {site.name!r}, but the file is called {path.stem!r}")
    return site


def load_site(name: str) -> Site:
    """The site `name` of jobs/sites, or the site file at a path that ends in .yaml.

    Raises:
        ConfigError: No such site, or its file is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return read_site(Path(name))
    if name not in names():
        known = ", ".join(names())
        raise ConfigError(f"unknown site {name!r}{suggest(name, names())}; valid: {known}, or a .yaml file")
    return read_site(SITES / f"{name}.yaml")
