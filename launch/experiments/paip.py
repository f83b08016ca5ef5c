"""PAIP's liver slides segmented at seven resolutions by APF-UNETR, UNETR, TransUNet and U-Net; must not import torch.

Patch sizes, lengths and ranks are those of Table III of APF (SC24): `paip_16k` is its row with the finest patches,
`paip_16k_p8` another row. The files are yours to make, from slides and masks of PAIP 2019:

    python -m data_prep build SLIDES --masks MASKS --mask-kind viable --resolution 16384 --patch 2 --length 16384 \
        --out data/paip/apf_16k_p2
    python -m data_prep build SLIDES --masks MASKS --mask-kind viable --resolution 16384 --patch 128 \
        --patching uniform --out data/paip/uniform_16k_p128

What the paper does not say is ours: the global batch is one image per GPU of the row (16 on a single GPU); training
lasts 1000 epochs of the 1,719 slides that are 70 % of the 2,457 its authors name later (SHF, NeurIPS 2025); steps of
the learning rate as in the authors' scripts. How TransUNet and U-Net were run on slides beyond 1K is lost: here they
see crops, and whole slides by a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpc_models.segmentation.settings import TransUNetSettings, UNETRSettings, UNetSettings
from hpc_models.settings import ModelSettings
from launch.config.config import CheckpointConfig, Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import register

EPOCHS, SLIDES = 1000, 1719


@dataclass(frozen=True)
class Row:
    """A row of Table III.

    Attributes:
        patch: p.
        gpus: GPUs it was run on.
        length: L.
    """

    patch: int
    gpus: int
    length: int


@dataclass(frozen=True)
class Size:
    """What Table III has for one resolution.

    Attributes:
        px: R.
        apf: rows of APF-UNETR, finest patch first.
        uniform: rows of UNETR, finest patch first; L = (R / p)^2.
        transunet_gpus: GPUs of TransUNet.
        unet_gpus: GPUs of U-Net.
    """

    px: int
    apf: tuple[Row, ...]
    uniform: tuple[Row, ...]
    transunet_gpus: int
    unet_gpus: int


def _rows(*rows: tuple[int, int, int]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in rows)


SIZES: dict[str, Size] = {
    "512": Size(
        512, _rows((2, 1, 729), (4, 1, 676), (8, 1, 576)), _rows((4, 1, 16384), (8, 1, 4096), (16, 1, 1024)), 1, 1
    ),
    "1k": Size(
        1024,
        _rows((2, 8, 1024), (4, 8, 900), (8, 8, 784), (16, 8, 576)),
        _rows((8, 32, 16384), (16, 16, 4096), (32, 8, 1024)),
        8,
        1,
    ),
    "4k": Size(
        4096, _rows((2, 128, 4096), (4, 128, 2116), (8, 64, 1521), (16, 32, 1024)), _rows((32, 128, 16384)), 128, 16
    ),
    "8k": Size(
        8192, _rows((2, 256, 10609), (4, 256, 8464), (8, 128, 4096), (16, 64, 2116)), _rows((64, 256, 16384)), 256, 32
    ),
    "16k": Size(
        16384,
        _rows((2, 512, 16384), (4, 256, 8464), (8, 256, 4096), (16, 128, 2116)),
        _rows((128, 512, 16384)),
        512,
        256,
    ),
    "32k": Size(
        32768,
        _rows((4, 1024, 16384), (8, 512, 8464), (16, 512, 4096), (32, 256, 2116)),
        _rows((256, 1024, 16384)),
        1024,
        512,
    ),
    "64k": Size(
        65536,
        _rows((8, 2048, 16384), (16, 1024, 8464), (32, 512, 4096), (64, 256, 2116)),
        _rows((512, 2048, 16384)),
        2048,
        1024,
    ),
}

# UNETR's decoder draws a picture of R x R pixels with 16 channels: 8 GiB in 16 bits at 16K, so beyond 8K a linear head.
WIDEST_PICTURE_PX = 8192
# Crops of the convolutional rivals.
CROP_PX = 1024
# A file of crops is cut to patches of this size; the pictures are put together again from them.
TILE_PX = 256


def _train(gpus: int) -> TrainConfig:
    batch = gpus if gpus > 1 else 16
    return TrainConfig(
        batch=batch,
        lr=1e-4,
        weight_decay=0.01,
        schedule="step",
        decay_at=(0.5, 0.75, 0.875),
        warmup=0.0,
        max_steps=-(-EPOCHS * SLIDES // batch),
        precision="bf16",
        log_every=10,
    )


def _config(name: str, data: DataConfig, model: ModelSettings, gpus: int) -> Config:
    train = _train(gpus)
    assert train.max_steps is not None
    return Config(
        experiment=name,
        data=data,
        model=model,
        train=train,
        checkpoint=CheckpointConfig(every_seconds=600),
        eval=EvalConfig(every_steps=max(1, train.max_steps // 20)),
    )


def _apf(name: str, label: str, size: Size, row: Row) -> Config:
    data = DataConfig(
        dir=f"data/paip/apf_{label}_p{row.patch}",
        patching="apf",
        resolution=size.px,
        patch=row.patch,
        length=row.length,
    )
    return _config(name, data, UNETRSettings(decoder="raster", checkpointing=row.length >= 4096), row.gpus)


def _uniform(name: str, label: str, size: Size, row: Row) -> Config:
    data = DataConfig(
        dir=f"data/paip/uniform_{label}_p{row.patch}",
        patching="uniform",
        resolution=size.px,
        patch=row.patch,
        length=row.length,
    )
    decoder = "raster" if size.px <= WIDEST_PICTURE_PX else "token"
    return _config(name, data, UNETRSettings(decoder=decoder, checkpointing=True), row.gpus)  # type: ignore[arg-type]


def _crops(name: str, label: str, size: Size, model: ModelSettings, gpus: int) -> Config:
    data = DataConfig(
        dir=f"data/paip/uniform_{label}_p{TILE_PX}",
        patching="uniform",
        kind="tiles",
        resolution=size.px,
        patch=TILE_PX,
        length=(size.px // TILE_PX) ** 2,
        crop_px=min(CROP_PX, size.px),
        foreground_crops=0.33,
    )
    return _config(name, data, model, gpus)


def _transunet(name: str, label: str, size: Size) -> Config:
    # Batch statistics would differ between ranks, so the decoder has instance norm.
    return _crops(
        name, label, size, TransUNetSettings(layout="tiles", norm="instance", dropout=0.1), size.transunet_gpus
    )


def _unet(name: str, label: str, size: Size) -> Config:
    model = UNetSettings(widths=(64, 128, 256, 512, 1024), norm="instance")
    return _crops(name, label, size, model, size.unet_gpus)


def _register(label: str, size: Size) -> None:
    shown = label.upper() if label.endswith("k") else label
    crop = min(CROP_PX, size.px)
    for i, row in enumerate(size.apf):
        name = f"paip_{label}" if i == 0 else f"paip_{label}_p{row.patch}"
        register(
            name,
            lambda name=name, row=row: _apf(name, label, size, row),  # type: ignore[misc]
            f"APF-UNETR-{row.patch} on PAIP at {shown}: {row.length} adaptive tokens, {row.gpus} GPUs in Table III.",
        )
    for i, row in enumerate(size.uniform):
        name = f"paip_{label}_uniform" if i == 0 else f"paip_{label}_uniform_p{row.patch}"
        head = "" if size.px <= WIDEST_PICTURE_PX else ", linear head instead of the convolutional decoder"
        register(
            name,
            lambda name=name, row=row: _uniform(name, label, size, row),  # type: ignore[misc]
            f"UNETR-{row.patch} on PAIP at {shown}: {row.length} equal tokens{head}; {row.gpus} GPUs in Table III.",
        )
    register(
        f"paip_{label}_transunet",
        lambda: _transunet(f"paip_{label}_transunet", label, size),
        f"TransUNet R50-ViT-B16 on PAIP at {shown}, crops of {crop} px.",
    )
    register(
        f"paip_{label}_unet",
        lambda: _unet(f"paip_{label}_unet", label, size),
        f"U-Net (2015 widths, instance norm) on PAIP at {shown}, crops of {crop} px.",
    )


for _label, _size in SIZES.items():
    _register(_label, _size)
