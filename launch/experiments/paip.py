"""PAIP's liver slides segmented at seven resolutions by APF-UNETR, UNETR, TransUNet and U-Net.

Patch sizes, lengths and ranks come from Table III of APF (SC24): `paip_16k` is the row with the finest patches,
`paip_16k_p8` another row. Make the files from slides and masks of PAIP 2019:

    python -m data_prep build SLIDES --masks MASKS --mask-kind viable --resolution 16384 --patch 2 --length 16384 \
        --out data/paip/apf_16k_p2
    python -m data_prep build SLIDES --masks MASKS --mask-kind viable --resolution 16384 --patch 128 \
        --patching uniform --out data/paip/uniform_16k_p128

We chose what the paper does not say. The global batch is one image per GPU of the row (16 on a single GPU). Training
lasts 1000 epochs of 1,719 slides, 70 % of the 2,457 that the authors name later (SHF, NeurIPS 2025). The learning rate
steps as in the authors' scripts. TransUNet and U-Net see crops, and whole slides by a sliding window.
"""

from typing import NamedTuple

from launch.experiments.experiment import Experiment

EPOCHS, SLIDES = 1000, 1719
# UNETR's decoder draws a picture of R x R pixels with 16 channels: 8 GiB in 16 bits at 16K, so beyond 8K a linear head.
WIDEST_PICTURE_PX = 8192
# Crops of the convolutional rivals.
CROP_PX = 1024
# A file of crops is cut to patches of this size; the pictures are put together again from them.
TILE_PX = 256


class TableRow(NamedTuple):
    """A row of Table III: p, GPUs it was run on, L."""

    patch: int
    gpus: int
    length: int


class TableSize(NamedTuple):
    """Table III at one resolution: rows of APF-UNETR and of UNETR, finest patch first, and GPUs of the rivals."""

    px: int
    apf: tuple[TableRow, ...]
    uniform: tuple[TableRow, ...]
    transunet_gpus: int
    unet_gpus: int


def _size(px: int, gpus: tuple[int, int], apf: str, uniform: str) -> TableSize:
    """Rows as words p:gpus:L, GPUs of TransUNet and U-Net."""

    def rows(words: str) -> tuple[TableRow, ...]:
        return tuple(TableRow(*map(int, word.split(":"))) for word in words.split())

    return TableSize(px, rows(apf), rows(uniform), *gpus)


SIZES = {
    "512": _size(512, (1, 1), "2:1:729 4:1:676 8:1:576", "4:1:16384 8:1:4096 16:1:1024"),
    "1k": _size(1024, (8, 1), "2:8:1024 4:8:900 8:8:784 16:8:576", "8:32:16384 16:16:4096 32:8:1024"),
    "4k": _size(4096, (128, 16), "2:128:4096 4:128:2116 8:64:1521 16:32:1024", "32:128:16384"),
    "8k": _size(8192, (256, 32), "2:256:10609 4:256:8464 8:128:4096 16:64:2116", "64:256:16384"),
    "16k": _size(16384, (512, 256), "2:512:16384 4:256:8464 8:256:4096 16:128:2116", "128:512:16384"),
    "32k": _size(32768, (1024, 512), "4:1024:16384 8:512:8464 16:512:4096 32:256:2116", "256:1024:16384"),
    "64k": _size(65536, (2048, 1024), "8:2048:16384 16:1024:8464 32:512:4096 64:256:2116", "512:2048:16384"),
}


def _settings(label: str, patching: str, row: TableRow) -> str:
    """Files and training of a row; the batch is one image per GPU, and 16 on a single GPU."""
    batch = row.gpus if row.gpus > 1 else 16
    steps = -(-EPOCHS * SLIDES // batch)
    return f"""data.dir=data/paip/{patching}_{label}_p{row.patch} data.patching={patching}
    data.resolution={SIZES[label].px} data.patch={row.patch} data.length={row.length}
    train.batch={batch} train.lr=1e-4 train.weight_decay=0.01 train.schedule=step train.decay_at=[0.5,0.75,0.875]
    train.warmup=0 train.max_steps={steps} train.precision=bf16 train.log_every=10
    checkpoint.every_seconds=600 eval.every_steps={max(1, steps // 20)}"""


def _crops(label: str, gpus: int) -> str:
    px = SIZES[label].px
    row = TableRow(TILE_PX, gpus, (px // TILE_PX) ** 2)
    return f"""{_settings(label, "uniform", row)}
    data.kind=tiles data.crop_px={min(CROP_PX, px)} data.foreground_crops=0.33"""


def _of_size(label: str, size: TableSize) -> dict[str, Experiment]:
    """All rows of one resolution. Of a model's rows, the row with the finest patches has the plain name."""
    found: dict[str, Experiment] = {}
    at = f"on PAIP at {label.upper() if label.endswith('k') else label}"
    for row in size.apf:
        found[f"paip_{label}_p{row.patch}" if found else f"paip_{label}"] = Experiment(
            f"APF-UNETR-{row.patch} {at}: {row.length} adaptive tokens, {row.gpus} GPUs in Table III.",
            f"{_settings(label, 'apf', row)} model.name=unetr model.checkpointing={row.length >= 4096}",
        )
    small = size.px <= WIDEST_PICTURE_PX
    head = "" if small else ", linear head instead of the convolutional decoder"
    for row in size.uniform:
        name = f"paip_{label}_uniform"
        found[f"{name}_p{row.patch}" if name in found else name] = Experiment(
            f"UNETR-{row.patch} {at}: {row.length} equal tokens{head}; {row.gpus} GPUs in Table III.",
            f"""{_settings(label, "uniform", row)}
            model.name=unetr model.decoder={"raster" if small else "token"} model.checkpointing=true""",
        )
    crops = f"{at}, crops of {min(CROP_PX, size.px)} px."
    # Batch statistics would differ between ranks, so the decoder of TransUNet has instance norm.
    found[f"paip_{label}_transunet"] = Experiment(
        f"TransUNet R50-ViT-B16 {crops}",
        f"""{_crops(label, size.transunet_gpus)}
        model.name=transunet model.layout=tiles model.norm=instance model.dropout=0.1""",
    )
    found[f"paip_{label}_unet"] = Experiment(
        f"U-Net (2015 widths, instance norm) {crops}",
        f"{_crops(label, size.unet_gpus)} model.name=unet_tiled model.widths=[64,128,256,512,1024]",
    )
    return found


EXPERIMENTS = {name: made for label, size in SIZES.items() for name, made in _of_size(label, size).items()}
