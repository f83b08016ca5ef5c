"""BTCV: 13 organs on the axial slices of abdominal CT, as in Table IV of APF (SC24).

30 volumes of 512 x 512 slices, one token file per slice:

    python -m data_prep volume imagesTr --labels labelsTr --resolution 512 --patch 4 --length 1024 \
        --out data/btcv/apf_p4
    python -m data_prep volume imagesTr --labels labelsTr --resolution 512 --patch 4 --patching uniform \
        --out data/btcv/uniform_p4

`data/btcv/split.json`, {"train": [names], "val": [...], "test": [...]}, must keep all slices of a volume in one part.
Lengths and patches come from Table II at 512 px. The paper gives neither epochs nor batch; these are ours. Left and
right kidney are two classes, so pictures are not mirrored.
"""

from launch.experiments.experiment import Experiment

SIDE_PX, PATCH_PX = 512, 4
# 200 epochs of the 2,212 slices of 18 training volumes (the split of TransUNet's authors), 16 at a time.
STEPS = 27_650

_APF = Experiment(
    "APF-UNETR-4 on BTCV's slices of 512 px, 13 organs: 1024 adaptive tokens.",
    f"""data.dir=data/btcv/apf_p{PATCH_PX} data.split=data/btcv/split.json data.resolution={SIDE_PX}
    data.patch={PATCH_PX} data.length=1024 data.classes=13 data.flips=false data.crop_px={SIDE_PX}
    model.name=unetr model.decoder=raster
    train.batch=16 train.lr=1e-4 train.weight_decay=0.01 train.schedule=step train.decay_at=[0.5,0.75,0.875]
    train.warmup=0 train.max_steps={STEPS} train.precision=bf16 train.log_every=10
    checkpoint.every_seconds=600 eval.every_steps={STEPS // 10}""",
)
_UNIFORM = f"""data.dir=data/btcv/uniform_p{PATCH_PX} data.patching=uniform
data.length={(SIDE_PX // PATCH_PX) ** 2}"""
_TILES = f"{_UNIFORM} data.kind=tiles"

EXPERIMENTS = {
    "btcv": _APF,
    "btcv_uniform": _APF.but(
        "UNETR-4 on BTCV's slices of 512 px, 13 organs: 16384 equal tokens.", f"{_UNIFORM} model.checkpointing=true"
    ),
    "btcv_vit_seg": _APF.but(
        "ViT with a linear head per token on BTCV: the 1024 adaptive tokens of `btcv`, no convolutions.",
        "model.name=vit_seg model.position=both",
    ),
    "btcv_transunet": _APF.but(
        "TransUNet R50-ViT-B16 on BTCV's whole slices of 512 px, 13 organs.",
        f"{_TILES} model.name=transunet model.layout=tiles model.norm=instance model.dropout=0.1",
    ),
    "btcv_swin_unetr": _APF.but(
        "Swin UNETR (48 features, not pre-trained, unlike the paper's) on BTCV's whole slices of 512 px, 13 organs.",
        f"{_TILES} model.name=swin_unetr model.layout=tiles model.feature_size=48",
    ),
    "btcv_unet": _APF.but(
        "U-Net (2015 widths, instance norm) on BTCV's whole slices of 512 px, 13 organs.",
        f"{_TILES} model.name=unet_tiled model.widths=[64,128,256,512,1024] model.norm=instance",
    ),
}
