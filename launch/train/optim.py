"""Optimiser and learning rate: AdamW or Adam; warm-up, then cosine, steps or constant."""

from __future__ import annotations

import math

import torch
from torch import nn

from launch.config.config import TrainConfig

WARMUP_FROM = 0.1  # a run of few, long steps must not waste its first one at zero
COSINE_TO = 0.01


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or Adam, with weight decay on matrices and kernels but not on norms, biases and other vectors."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel is faster on CPUs too, where a loop over the parameters costs more than their arithmetic.
    # It assumes that a gradient has the strides of its parameter, as autograd makes them.
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    return kind([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def progress_of(config: TrainConfig, step: int, train_seconds: float) -> float:
    """How much of the run is done, 0..1: by steps or by training time, whichever is further."""
    shares = [0.0]
    if config.max_steps is not None:
        shares.append(step / config.max_steps)
    if config.max_seconds is not None:
        shares.append(train_seconds / config.max_seconds)
    return min(1.0, max(shares))


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate at `progress` 0..1: a linear warm-up from a tenth of the peak, then the schedule."""
    if progress < config.warmup:
        return config.lr * (WARMUP_FROM + (1 - WARMUP_FROM) * progress / config.warmup)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.decay_factor ** sum(progress >= at for at in config.decay_at)
    share = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (COSINE_TO + (1 - COSINE_TO) * (1 + math.cos(math.pi * share)) / 2)
