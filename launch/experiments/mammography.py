"""Experiments of HCT, GMIC and Def-GMIC on mammograms (Taha et al., MICCAI 2022); must not import torch.

OPTIMAM, the paper's data, is given out on application only; any mammograms will do. The user makes, below
`data/mammography`, as gray PNG files of 8 or 16 bits:

- `images/`: whole mammograms, all turned to the same side or not, of any size (they are padded to 3328 x 2560);
- `patches/`: squares of 512 px, positive ones centred on the boxes around malignant findings, the others from
  anywhere inside the breast of images without malignancy;
- `images.csv` and `patches.csv` with the columns `name,label` (1 malignant, 0 not), and `images_split.json` and
  `patches_split.json`, {train, val, test: [names]}, split by patient so that nobody is in two of them.

Each network is trained on patches first; its image runs start from that run's weights (`train.init_from`; on several
GPUs or with another seed the run has another name: give it). `train.init_from=null` starts from random weights.
"""

from __future__ import annotations

from typing import Literal

from hpc_models.classification.settings import DefGMICSettings, GMICSettings, HCTSettings
from hpc_models.settings import ModelSettings
from launch.config.config import Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import register

Stage = Literal["patch", "image", "half"]
Optimiser = Literal["adam", "asam"]

FOLDER = "data/mammography"
NETWORKS: dict[str, tuple[ModelSettings, str]] = {
    "gmic": (GMICSettings(), "GMIC's global network"),
    "def_gmic": (DefGMICSettings(), "GMIC with deformable convolutions"),
    "hct": (HCTSettings(), "HCT with Performer-ReLU attention"),
    "hct_softmax": (HCTSettings(attention="performer_softmax"), "HCT with Performer-softmax attention"),
    "hct_nystrom": (HCTSettings(attention="nystrom"), "HCT with Nystrom attention"),
}
FULL_HW, HALF_HW = (3328, 2560), (1664, 1280)
IMAGES = 58_376  # OPTIMAM's training images (table 2). How many patches the authors cut is not told: one of each here.
EPOCHS = 80
STEPS = {"patch": EPOCHS * IMAGES // 160, "image": EPOCHS * IMAGES // 32, "half": EPOCHS * IMAGES // 32}


def _data(stage: Stage) -> DataConfig:
    part = "patches" if stage == "patch" else "images"
    return DataConfig(
        dir=f"{FOLDER}/{part}",
        kind="images",
        labels=f"{FOLDER}/{part}.csv",
        split=f"{FOLDER}/{part}_split.json",
        classes=2,
        channels=1,
        resolution=512 if stage == "patch" else max(FULL_HW if stage == "image" else HALF_HW),
        image_hw={"patch": None, "image": FULL_HW, "half": HALF_HW}[stage],
        flips=True,
        noise=0.02,  # the paper names flips and Gaussian noise, but no strength
    )


def _make(network: str, stage: Stage, optimiser: Optimiser) -> Config:
    # Warm-up, decay and clipping are not mentioned in the paper, hence none.
    recipe = {"schedule": "cosine", "warmup": 0.0, "weight_decay": 0.0, "clip": 0.0, "optimiser": optimiser}
    recipe |= {"max_steps": STEPS[stage], "log_every": 50}
    if stage == "patch":
        recipe |= {"batch": 160, "lr": 6e-4}
    else:
        recipe |= {"batch": 32, "lr": 2e-5, "init_from": str(_make(network, "patch", optimiser).run_dir(1))}
    return Config(
        experiment=_name(network, stage, optimiser),
        data=_data(stage),
        model=NETWORKS[network][0],
        train=TrainConfig.model_validate(recipe),
        eval=EvalConfig(every_steps=STEPS[stage] // EPOCHS, pictures_px=1),
    )


def _name(network: str, stage: str, optimiser: str) -> str:
    return f"{network}_{stage}" + ("_asam" if optimiser == "asam" else "")


def _register(network: str, stage: Stage, optimiser: Optimiser) -> None:
    text = NETWORKS[network][1]
    by = "Adam" if optimiser == "adam" else "Adam with ASAM"
    before = _name(network, "patch", optimiser)
    what = {
        "patch": f"{text} on patches of 512 px, {by}: pretraining for whole mammograms.",
        "image": f"{text} on whole mammograms of 3328 x 2560 px, {by}, from the weights of {before}.",
        "half": f"{text} on mammograms at half resolution, 1664 x 1280 px, {by}, from the weights of {before}.",
    }[stage]
    register(_name(network, stage, optimiser), lambda: _make(network, stage, optimiser), what)


for _network in NETWORKS:
    for _stage in ("patch", "image", "half"):
        for _optimiser in ("adam", "asam"):
            _register(_network, _stage, _optimiser)  # type: ignore[arg-type]
