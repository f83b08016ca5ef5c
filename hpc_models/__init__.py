"""Single-device models, losses and metrics on sequences of leaves; imports neither MPI, SLURM, files nor other folders."""

from hpc_models.registry import build, names

__all__ = ["build", "names"]
