"""BTCV: 13 organs on the axial slices of abdominal CT, as in Table IV of APF (SC24); must not import torch.

30 volumes of 512 x 512 slices, one token file per slice:

    python -m data_prep volume imagesTr --labels labelsTr --resolution 512 --patch 4 --length 1024 \
        --out data/btcv/apf_p4
    python -m data_prep volume imagesTr --labels labelsTr --resolution 512 --patch 4 --patching uniform \
        --out data/btcv/uniform_p4

`data/btcv/split.json` must keep all slices of a volume in one part: {"train": [names], "val": [...], "test": [...]}.
Lengths and patches are Table II's of 512 px; epochs and batch, which the paper does not give, are ours. Left and right
kidney are two classes, so pictures are not mirrored.
"""

from __future__ import annotations

from typing import Literal

from hpc_models.segmentation.settings import (
    SwinUNETRSettings,
    TransUNetSettings,
    UNETRSettings,
    UNetSettings,
    ViTSegSettings,
)
from hpc_models.settings import ModelSettings
from launch.config.config import CheckpointConfig, Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import experiment

SIDE_PX, PATCH_PX = 512, 4
# 200 epochs of the 2,212 slices of 18 training volumes (the split of TransUNet's authors), 16 at a time.
STEPS = 27_650


def _config(
    name: str,
    model: ModelSettings,
    folder: Literal["apf", "uniform"],
    length: int,
    kind: Literal["tokens", "tiles"] = "tokens",
) -> Config:
    data = DataConfig(
        dir=f"data/btcv/{folder}_p{PATCH_PX}",
        split="data/btcv/split.json",
        kind=kind,
        patching=folder,
        resolution=SIDE_PX,
        patch=PATCH_PX,
        length=length,
        classes=13,
        flips=False,
        crop_px=SIDE_PX,
    )
    return Config(
        experiment=name,
        data=data,
        model=model,
        train=TrainConfig(
            batch=16,
            lr=1e-4,
            weight_decay=0.01,
            schedule="step",
            decay_at=(0.5, 0.75, 0.875),
            warmup=0.0,
            max_steps=STEPS,
            precision="bf16",
            log_every=10,
        ),
        checkpoint=CheckpointConfig(every_seconds=600),
        eval=EvalConfig(every_steps=STEPS // 10),
    )


def _uniform(name: str, model: ModelSettings, kind: Literal["tokens", "tiles"]) -> Config:
    return _config(name, model, "uniform", (SIDE_PX // PATCH_PX) ** 2, kind)


@experiment
def btcv() -> Config:
    """APF-UNETR-4 on BTCV's slices of 512 px, 13 organs: 1024 adaptive tokens."""
    return _config("btcv", UNETRSettings(decoder="raster"), "apf", 1024)


@experiment
def btcv_uniform() -> Config:
    """UNETR-4 on BTCV's slices of 512 px, 13 organs: 16384 equal tokens."""
    return _uniform("btcv_uniform", UNETRSettings(decoder="raster", checkpointing=True), "tokens")


@experiment
def btcv_vit_seg() -> Config:
    """ViT with a linear head per token on BTCV: the 1024 adaptive tokens of `btcv`, no convolutions."""
    model = ViTSegSettings(position="both")
    return _config("btcv_vit_seg", model, "apf", 1024)


@experiment
def btcv_transunet() -> Config:
    """TransUNet R50-ViT-B16 on BTCV's whole slices of 512 px, 13 organs."""
    return _uniform("btcv_transunet", TransUNetSettings(layout="tiles", norm="instance", dropout=0.1), "tiles")


@experiment
def btcv_swin_unetr() -> Config:
    """Swin UNETR (48 features, not pre-trained, unlike the paper's) on BTCV's whole slices of 512 px, 13 organs."""
    return _uniform("btcv_swin_unetr", SwinUNETRSettings(layout="tiles", feature_size=48), "tiles")


@experiment
def btcv_unet() -> Config:
    """U-Net (2015 widths, instance norm) on BTCV's whole slices of 512 px, 13 organs."""
    return _uniform("btcv_unet", UNetSettings(widths=(64, 128, 256, 512, 1024), norm="instance"), "tiles")
