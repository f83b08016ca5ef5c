"""Settings of the models, one file per family; must not import torch or hpc_models."""
