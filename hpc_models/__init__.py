"""Single-device models, losses and metrics on sequences of leaves; never MPI, SLURM, files or other folders."""

from hpc_models.registry import build, names

__all__ = ["build", "names"]
