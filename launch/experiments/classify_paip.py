"""One label per slide of PAIP: APF-ViT, ViT and HIPT, as in Table V of APF (SC24); must not import torch.

Six organs of 40 slides each, 28 to train, 4 to validate, 8 to test (here by shares: 70, 10 and 20 %).
`data/paip_organs/labels.csv` has lines `slide,organ` with organs 0 to 5. The token files:

    python -m data_prep build SLIDES --resolution 16384 --patch 2 --length 16384 --out data/paip_organs/apf_16k_p2
    python -m data_prep build SLIDES --resolution 16384 --patch 256 --patching uniform \
        --out data/paip_organs/uniform_16k_p256

The paper gives its ViT patches of 4,096 px: a linear embedding of those has 39 billion weights, so how it was done is
not known. Ours has the squares that HIPT has, 4,096 of 256 px. Epochs, batch and rate are ours as well.
"""

from __future__ import annotations

from typing import Literal

from hpc_models.classification.settings import APFViTSettings, HIPTSettings
from hpc_models.settings import ModelSettings
from launch.config.config import CheckpointConfig, Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import experiment

SLIDES, EPOCHS, BATCH = 168, 200, 8


def _config(name: str, model: ModelSettings, patching: Literal["apf", "uniform"], patch: int, length: int) -> Config:
    data = DataConfig(
        dir=f"data/paip_organs/{patching}_16k_p{patch}",
        labels="data/paip_organs/labels.csv",
        fractions=(0.7, 0.1, 0.2),
        patching=patching,
        resolution=16384,
        patch=patch,
        length=length,
        classes=6,
    )
    steps = EPOCHS * SLIDES // BATCH
    return Config(
        experiment=name,
        data=data,
        model=model,
        train=TrainConfig(batch=BATCH, lr=1e-4, weight_decay=0.05, max_steps=steps, precision="bf16", log_every=10),
        checkpoint=CheckpointConfig(every_seconds=600),
        eval=EvalConfig(every_steps=steps // 20, pictures_px=1),
    )


@experiment
def classify_paip() -> Config:
    """APF-ViT-2 names the organ of PAIP's slides at 16K: 16384 adaptive tokens, ViT-B (Table V)."""
    return _config("classify_paip", APFViTSettings(checkpointing=True), "apf", 2, 16384)


@experiment
def classify_paip_uniform() -> Config:
    """ViT-B names the organ of PAIP's slides at 16K: 4096 equal tokens of 256 px, learned positions, class token."""
    model = APFViTSettings(pool="cls", position="slot", checkpointing=True)
    return _config("classify_paip_uniform", model, "uniform", 256, 4096)


@experiment
def classify_paip_hipt() -> Config:
    """HIPT names the organ of PAIP's slides at 16K: patches of 16, 256 and 4096 px, all levels trained (Table V)."""
    return _config("classify_paip_hipt", HIPTSettings(checkpointing=True), "uniform", 256, 4096)
