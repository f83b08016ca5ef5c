"""Job scripts as text, from a row of the job table and the facts of a site; `python -m launch render` writes them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from data_prep.system.files import write_atomic
from launch.config.config import ConfigError
from launch.config.sites import Site, Slurm
from launch.jobs.table import JOBS, Job

FOLDER = Path(__file__).resolve().parents[2] / "jobs"
# The site of the committed scripts.
DEFAULT_SITE = "generic-cuda"
# Array tasks of a chain, which are the lives of a job where a site forbids requeue.
CHAIN = 20


class JobShape(NamedTuple):
    """How ranks are shared over nodes."""

    nodes: int
    tasks_per_node: int


def shape(gpus: int, site: Site) -> JobShape:
    """Nodes and ranks on each for `gpus` ranks: whole nodes, or a part of one.

    Raises:
        ConfigError: Neither fits.
    """
    per_node = site.hardware.gpus_per_node
    if gpus <= per_node:
        return JobShape(1, gpus)
    if gpus % per_node:
        near = f"{gpus // per_node * per_node} or {-(-gpus // per_node) * per_node}"
        raise ConfigError(f"{gpus} gpus are not whole nodes of {site.name} ({per_node} gpus each); use {near}")
    return JobShape(gpus // per_node, per_node)


def limited_hours(hours: float, place: JobShape, slurm: Slurm | None) -> float:
    """The hours that a job gets when it asks for `hours`."""
    return min(hours, (slurm.hours(place.nodes) if slurm else None) or hours)


def directives(job: Job, site: Site, slurm: Slurm, output: str = "%x-%j.out") -> list[str]:
    """The `#SBATCH` lines of a job; `slurm` is `site.slurm`, and `output` the pattern of the log file.

    Raises:
        ConfigError: The site runs no job of this size.
    """
    place = shape(job.gpus, site)
    if slurm.hours(place.nodes) is None:
        most = max(item.nodes for item in slurm.time_limits)
        raise ConfigError(f"{job.name}: {job.gpus} gpus are {place.nodes} nodes; {site.name} runs at most {most}")
    minutes = max(1, math.ceil(limited_hours(job.hours, place, slurm) * 60))
    part = slurm.shared_nodes and place.nodes == 1 and place.tasks_per_node < site.hardware.gpus_per_node
    own = [
        f"--job-name={job.name}",
        f"--nodes={place.nodes}",
        f"--ntasks-per-node={place.tasks_per_node}",
        f"--cpus-per-task={site.hardware.cpus_per_gpu}",
        f"--time={minutes // 60:02d}:{minutes % 60:02d}:00",
        f"--output={output}",
        "--open-mode=append",  # a requeued job would overwrite the log of its last life
        f"--signal=B:USR1@{slurm.grace_s}",  # to the batch shell, which tells the ranks to save
    ]
    own += [f"--partition={slurm.partition}"] if slurm.partition else []
    own.append("--requeue" if slurm.requeue else "--no-requeue")
    if not slurm.requeue and job.kind == "train":  # of preparations, a chain would never satisfy an afterok
        own.append(f"--array=1-{CHAIN}%1")
    for line in slurm.directives:
        if not part:  # a whole node has all its gpus, as recipes of binding expect
            own.append(line)
        elif line.startswith("--gpus-per-node="):
            own.append(f"--gpus-per-node={place.tasks_per_node}")
        elif line != "--exclusive":
            own.append(line)
    return own


def _array(words: Iterable[str]) -> str:
    # The shell does not mind commas, but its checkers take them for a slip between elements.
    return "(" + " ".join(f"'{word}'" if "," in word else shlex.quote(word) for word in words) + ")"


def _exports(name: str, values: dict[str, str]) -> list[str]:
    """A shell function that exports the values, which may use shell variables."""
    if not values:
        return [f"{name}() {{ :; }}"]
    return [f"{name}() {{", *(f'    export {key}="{value}"' for key, value in values.items()), "}"]


def _site_part(site: Site, slurm: Slurm) -> list[str]:
    local = site.node_local
    task_env = "; ".join(f'export {key}="{value}"' for key, value in site.task_env.items()) or ":"
    values = [*site.env.values(), *site.env_multi_node.values(), local.path if local else ""]
    # Site files name folders by USER, which some batch environments lack (--export=NONE, containers).
    user = ['export USER="${USER:-$(id -un)}"'] if any("${USER}" in value for value in values) else []
    return [
        *user,
        f"SITE={site.name} SITE_ACCOUNT={int(slurm.account_required)} SITE_REQUEUE={int(slurm.requeue)}",
        f"SITE_MPI={slurm.mpi}",
        f"SITE_MODULES={_array(site.modules)}",
        f"SITE_SRUN={_array(slurm.srun)}",
        f'SITE_NODE_LOCAL="{local.path if local else ""}" SITE_SBCAST={shlex.quote(local.sbcast if local else "")} '
        f"SITE_NODE_LOCAL_FROM={local.from_nodes if local else 0}",
        *_exports("site_env", site.env),
        *_exports("site_env_multi_node", site.env_multi_node),
        f"TASK_ENV={shlex.quote(task_env)}",
    ]


_HEAD = """\
#!/usr/bin/env bash
# {text}
# Made by `python -m launch render`{how}; numbers come from the experiments and jobs/sites/{site}.yaml: edit those.
#   sbatch{account} {path} {words}
#   sbatch -N2 --time=1:00:00{account} {path} ...: sbatch's own options win over those below
#   bash {path} ...: without SLURM, on this machine
"""
_WORDS = {
    "train": "[key=value ...]: settings as `python -m launch train` takes them",
    "scaling": "[key=value ...]: settings as `python -m launch train` takes them",
    "prep": "--slides FOLDER [--masks FOLDER] [key=value ...]: as `python -m launch prep` takes them",
    "bench": "[--rows PATTERN] [key=value ...]: as `python -m launch bench` takes them",
}

_TAIL = """\
for root in "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "$(dirname "$0")/.."; do
    [ ! -f "$root/jobs/body.sh" ] || break
done
cd "$root" || exit 64
[ -f jobs/body.sh ] || { echo "error: $PWD has no jobs/body.sh: submit from the repository's folder" >&2; exit 64; }
# shellcheck source=jobs/body.sh
source jobs/body.sh
"""


def render(job: Job, site: Site, output: str = "%x-%j.out") -> str:
    """The text of a job script; `output` is the pattern of the log file.

    Raises:
        ConfigError: The site has no scheduler, or the job does not fit it.
    """
    if site.slurm is None:
        raise ConfigError(f"site {site.name} has no scheduler; run jobs/{job.name}.sh with bash there")
    account = " -A PROJECT" if site.slurm.account_required else ""
    how = "" if site.name == DEFAULT_SITE else f" --site {site.name}"
    head = _HEAD.format(
        text=job.text, how=how, site=site.name, path=f"jobs/{job.name}.sh", account=account, words=_WORDS[job.kind]
    )
    lines = [f"#SBATCH {line}" for line in directives(job, site, site.slurm, output)]
    lines += [
        "",
        "# shellcheck disable=SC2016,SC2034,SC2089  # jobs/body.sh reads them, tasks expand TASK_ENV",
        "{",
        f"JOB={job.name} KIND={job.kind} APF={job.experiment} UNIFORM={job.uniform}",
        *_site_part(site, site.slurm),
        "}",
    ]
    if job.overrides:
        lines.append(f'set -- {" ".join(shlex.quote(word) for word in job.overrides)} "$@"')
    return head + "\n".join(lines) + "\n" + _TAIL


def write_all(site: Site, folder: Path) -> list[Path]:
    """Write the scripts of all jobs that are missing or differ; returns all files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for job in JOBS.values():
        path = folder / f"{job.name}.sh"
        text = render(job, site).encode()
        if not path.is_file() or path.read_bytes() != text:
            write_atomic(path, text)
        path.chmod(0o755)
        written.append(path)
    return written


def differences(site: Site, folder: Path) -> list[str]:
    """One line for each script in `folder` that differs from what we would render: its name and first changed line."""
    found = []
    for job in JOBS.values():
        path = folder / f"{job.name}.sh"
        if not path.is_file():
            found.append(f"{path}: missing")
            continue
        lines = zip_longest(path.read_text().splitlines(), render(job, site).splitlines(), fillvalue="(end)")
        found += [f"{path}: {old}, not {new}" for old, new in lines if old != new][:1]
    return found
