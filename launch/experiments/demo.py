"""The rows of `make demo`, and `smoke`; must not import torch."""

from __future__ import annotations

from typing import Literal

from hpc_models.segmentation.settings import UNETRSettings, UNetSettings
from launch.config.config import CheckpointConfig, Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import experiment

DEMO_SPLIT = "data_prep/sample_data/glomeruli24/split.json"
DEMO_SECONDS = 130.0


def _demo_network(decoder: Literal["leaf_unet", "token"]) -> UNETRSettings:
    """The transformer that all three token rows of the demo share: small, for what counts in two minutes is steps.

    Each row has the decoder that served it better on held-out training slides at this time: on large uniform patches
    convolutions are as slow as a U-Net on the whole frame, so the uniform rows have the linear head.
    """
    return UNETRSettings(decoder=decoder, position="geom", width=128, depth=4, heads=4, mlp_dim=256, leaf_base=16)


def _demo_train(lr: float, batch: int = 2) -> TrainConfig:
    """The same time, optimiser and schedule for every row; rate and batch are those that served it better."""
    return TrainConfig(batch=batch, lr=lr, max_seconds=DEMO_SECONDS, warmup=0.05, schedule="cosine", seed=0)


@experiment
def demo_apf() -> Config:
    """APF-UNETR on glomeruli at 1024 px: 256 adaptive tokens of 16 px, U-Net over the leaves, 130 s."""
    return Config(
        experiment="demo_apf",
        data=DataConfig(
            dir="demo/tokens/apf", split=DEMO_SPLIT, patching="apf", resolution=1024, patch=16, length=256, jitter=0.2
        ),
        model=_demo_network("leaf_unet"),
        train=_demo_train(lr=5e-3),
        checkpoint=CheckpointConfig(every_seconds=20),
        eval=EvalConfig(every_seconds=45),
    )


@experiment
def demo_uniform_tokens() -> Config:
    """Uniform patches with as many tokens as demo_apf (256, so 64 px each), linear head, same transformer and time."""
    base = demo_apf()
    data = base.data.model_copy(update={"dir": "demo/tokens/uniform64", "patching": "uniform", "patch": 64})
    row = {"experiment": "demo_uniform_tokens", "data": data}
    return base.model_copy(update=row | {"model": _demo_network("token"), "train": _demo_train(lr=1e-3)})


@experiment
def demo_uniform_patch() -> Config:
    """Uniform patches as small as demo_apf's smallest (16 px, so 4096), linear head, same transformer and time."""
    base = demo_apf()
    data = base.data.model_copy(update={"dir": "demo/tokens/uniform16", "patching": "uniform", "length": 4096})
    row = {"experiment": "demo_uniform_patch", "data": data}
    return base.model_copy(update=row | {"model": _demo_network("token"), "train": _demo_train(lr=1e-3)})


@experiment
def demo_tiled_unet() -> Config:
    """The usual rival: a U-Net on 256 px crops with sliding-window inference, same time as demo_apf."""
    return Config(
        experiment="demo_tiled_unet",
        data=DataConfig(
            dir="demo/tokens/tiles256",
            split=DEMO_SPLIT,
            kind="tiles",
            patching="uniform",
            resolution=1024,
            patch=256,
            length=16,
            jitter=0.2,
            crop_px=256,
            foreground_crops=0.33,
        ),
        model=UNetSettings(widths=(16, 16, 32, 64, 128)),
        train=_demo_train(lr=1e-3, batch=4),
        checkpoint=CheckpointConfig(every_seconds=20),
        eval=EvalConfig(every_seconds=45),
    )


@experiment
def smoke() -> Config:
    """Six steps of a very small APF-UNETR on the demo's token files: does everything start?"""
    base = demo_apf()
    return base.model_copy(
        update={
            "experiment": "smoke",
            "model": UNETRSettings(decoder="leaf", position="both", width=32, depth=2, heads=2, mlp_dim=64),
            "train": TrainConfig(batch=2, max_steps=6, warmup=0.2),
            "eval": EvalConfig(every_steps=3, pictures_px=256),
        }
    )
