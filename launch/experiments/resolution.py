"""Experiments of HIRI-ViT (with its ablation ladder) and of the resolution-invariant ViT; must not import torch.

Both read folders of pictures, one folder per class: ImageNet-1K for HIRI-ViT, Imagenette for RIViT (short side 320).
"""

from __future__ import annotations

from typing import Literal

from hpc_models.classification.settings import HIRIBodySettings, HIRIViTSettings, RIViTSettings
from launch.config.config import Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import experiment, register

Position = Literal["learned", "sinusoidal", "relative"]


@experiment
def hiri_vit() -> Config:
    """HIRI-ViT-S (a reconstruction) on pictures of 448 px, 300 epochs of ImageNet-1K, with averaged-teacher targets."""
    return Config(
        experiment="hiri_vit",
        data=DataConfig(
            dir="data/imagenet",
            kind="images",
            labels="folders",
            classes=1000,
            resolution=448,
            fit="crop",
            flips=False,
            mirror=True,
            jitter=0.4,
        ),
        model=HIRIViTSettings(variant="s"),
        # 300 epochs of 1,281,167 pictures in batches of 1024. Decay and weight of the average are not known: ours.
        train=TrainConfig(
            batch=1024,
            lr=1e-3,
            weight_decay=0.05,
            max_steps=375_342,
            warmup=5 / 300,
            label_smoothing=0.1,
            ema_decay=0.9999,
            distill=1.0,
            precision="bf16",
            log_every=50,
        ),
        eval=EvalConfig(every_steps=12_512, pictures_px=1),
    )


def _larger(variant: Literal["b", "l"]) -> None:
    name = f"hiri_vit_{variant}"

    def make() -> Config:
        return hiri_vit().model_copy(update={"experiment": name, "model": HIRIViTSettings(variant=variant)})

    register(name, make, f"The same with HIRI-ViT-{variant.upper()}: wider and deeper (a reconstruction).")


_larger("b")
_larger("l")


@experiment
def hiri_vit_768() -> Config:
    """HIRI-ViT-S (a reconstruction) on pictures of 768 px, 30 epochs from the weights of hiri_vit."""
    base = hiri_vit()
    # 30 epochs in batches of 512. Batch and rate are lost: ours, a twentieth of the rate per picture before.
    update = {"batch": 512, "lr": 2.5e-5, "max_steps": 75_068, "warmup": 0.0, "init_from": str(base.run_dir(1))}
    return base.model_copy(
        update={
            "experiment": "hiri_vit_768",
            "data": base.data.model_copy(update={"resolution": 768}),
            "train": base.train.model_copy(update=update),
        }
    )


def hiri_vit_row(row: int) -> Config:
    """Row 1 to 10 of the ablation, without the averaged teacher."""
    base = hiri_vit()
    model = HIRIViTSettings(variant=f"row{row}")  # type: ignore[arg-type]
    data = base.data.model_copy(update={"resolution": 448 if row >= 7 else 224})
    train = base.train.model_copy(update={"distill": 0.0, "ema_decay": None})
    return base.model_copy(update={"experiment": f"hiri_vit_row{row}", "model": model, "data": data, "train": train})


def _ladder(row: int) -> None:
    text = f"Row {row} of HIRI-ViT's ablation (Table VII; a reconstruction), no teacher."
    register(f"hiri_vit_row{row}", lambda: hiri_vit_row(row), text)


for _row in range(1, 11):
    _ladder(_row)


Body = Literal["pvt_v2_b2", "davit_tiny", "hrnet_w18"]


def _body(body: Body, five_stages: bool) -> None:
    name = f"hiri_{body}" + ("_448" if five_stages else "_224")

    def make() -> Config:
        base = hiri_vit_row(10)
        model = HIRIBodySettings(body=body, five_stages=five_stages)
        data = base.data.model_copy(update={"resolution": 448 if five_stages else 224})
        return base.model_copy(update={"experiment": name, "model": model, "data": data})

    what = "with HIRI-ViT's front (a reconstruction) at 448 px" if five_stages else "as published at 224 px"
    register(name, make, f"{body} {what}: HIRI-ViT's Table IX.")


for _name in ("pvt_v2_b2", "davit_tiny", "hrnet_w18"):
    for _five in (False, True):
        _body(_name, _five)  # type: ignore[arg-type]


@experiment
def rivit() -> Config:
    """Resolution-invariant ViT, learned positions, trained at 160, 128 and 96 px together, 85 epochs of Imagenette."""
    return _rivit("rivit", True, "learned")


@experiment
def rivit_resformer() -> Config:
    """The same with ResFormer's third part: each size also learns the class token of the next larger one."""
    base = _rivit("rivit_resformer", True, "learned")
    return base.model_copy(update={"train": base.train.model_copy(update={"scale_distill": 1.0})})


def _rivit(name: str, conv: bool, position: Position) -> Config:
    return Config(
        experiment=name,
        data=DataConfig(
            dir="data/imagenette",
            kind="images",
            labels="folders",
            classes=10,
            resolution=160,
            fit="crop",
            sizes=(160, 128, 96),
            flips=False,
            mirror=True,
            jitter=0.2,
            rotate_deg=15,
        ),
        model=RIViTSettings(conv=conv, position=position),
        # Optimiser and rate are not known; 85 epochs of 9,400 pictures in batches of 64.
        train=TrainConfig(batch=64, lr=5e-4, weight_decay=0.05, max_steps=12_500, log_every=10),
        # Sizes that no training saw; a stock ViT's learned table ends at 160 px.
        eval=EvalConfig(every_steps=1_470, pictures_px=1, sizes=(256, 320) if conv else ()),
    )


def _variant(conv: bool, position: Position) -> None:
    name = f"rivit_{'conv' if conv else 'plain'}_{position}"
    front = "behind convolutions" if conv else "without them (the stock ViT)"
    register(name, lambda: _rivit(name, conv, position), f"The study around RIViT: {position} codes, {front}.")


for _position in ("learned", "sinusoidal", "relative"):
    for _conv in (False, True):
        if (_conv, _position) != (True, "learned"):
            _variant(_conv, _position)  # type: ignore[arg-type]
