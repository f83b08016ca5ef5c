"""Single-device models, losses and metrics on sequences of leaves; never MPI, SLURM, files or other folders.

Importing it does not load torch: `build` loads the model it is asked for.
"""

from hpc_models.registry import build, names

__all__ = ["build", "names"]
