"""Experiments of HIRI-ViT (with its ablation ladder) and of the resolution-invariant ViT.

Both read folders of pictures, one folder per class: ImageNet-1K for HIRI-ViT, Imagenette for RIViT (short side 320).
"""

from launch.experiments.experiment import Experiment

# 300 epochs of 1,281,167 pictures in batches of 1024. Decay and weight of the average are ours; the paper has none.
_HIRI_VIT = Experiment(
    "HIRI-ViT-S (a reconstruction) on pictures of 448 px, 300 epochs of ImageNet-1K, with averaged-teacher targets.",
    f"""data.dir=data/imagenet data.kind=images data.labels=folders data.classes=1000 data.resolution=448 data.fit=crop
    data.flips=false data.mirror=true data.jitter=0.4 model.name=hiri_vit model.variant=s
    train.batch=1024 train.lr=1e-3 train.weight_decay=0.05 train.max_steps=375342 train.warmup={5 / 300}
    train.label_smoothing=0.1 train.ema_decay=0.9999 train.distill=1.0 train.precision=bf16 train.log_every=50
    eval.every_steps=12512 eval.pictures_px=1""",
)
EXPERIMENTS = {"hiri_vit": _HIRI_VIT}
for _variant in ("b", "l"):
    EXPERIMENTS[f"hiri_vit_{_variant}"] = _HIRI_VIT.but(
        f"The same with HIRI-ViT-{_variant.upper()}: wider and deeper (a reconstruction).", f"model.variant={_variant}"
    )
# 30 epochs. Batch and rate are ours, since the paper's are lost: a twentieth of the rate per picture before.
EXPERIMENTS["hiri_vit_768"] = _HIRI_VIT.but(
    "HIRI-ViT-S (a reconstruction) on pictures of 768 px, 30 epochs from the weights of hiri_vit.",
    f"""data.resolution=768 train.batch=512 train.lr=2.5e-5 train.max_steps=75068 train.warmup=0
    train.init_from={_HIRI_VIT.config("hiri_vit").run_dir(1)}""",
)

# The ladder of the ablation, without the averaged teacher.
for _row in range(1, 11):
    EXPERIMENTS[f"hiri_vit_row{_row}"] = _HIRI_VIT.but(
        f"Row {_row} of HIRI-ViT's ablation (Table VII; a reconstruction), no teacher.",
        f"model.variant=row{_row} data.resolution={448 if _row >= 7 else 224} train.distill=0 train.ema_decay=null",
    )
for _body in ("pvt_v2_b2", "davit_tiny", "hrnet_w18"):
    for _px, _five, _what in (
        (224, "false", "as published at 224 px"),
        (448, "true", "with HIRI-ViT's front (a reconstruction) at 448 px"),
    ):
        EXPERIMENTS[f"hiri_{_body}_{_px}"] = EXPERIMENTS["hiri_vit_row10"].but(
            f"{_body} {_what}: HIRI-ViT's Table IX.",
            f"model.name=hiri_body model.body={_body} model.five_stages={_five} data.resolution={_px}",
        )

# 85 epochs of 9,400 pictures in batches of 64; optimiser and rate are ours. Scores at sizes that training did not see
# come too, but a stock ViT's learned table ends at 160 px.
_RIVIT = Experiment(
    "Resolution-invariant ViT, learned positions, trained at 160, 128 and 96 px together, 85 epochs of Imagenette.",
    """data.dir=data/imagenette data.kind=images data.labels=folders data.classes=10 data.resolution=160 data.fit=crop
    data.sizes=[160,128,96] data.flips=false data.mirror=true data.jitter=0.2 data.rotate_deg=15
    model.name=rivit train.batch=64 train.lr=5e-4 train.weight_decay=0.05 train.max_steps=12500 train.log_every=10
    eval.every_steps=1470 eval.pictures_px=1 eval.sizes=[256,320]""",
)
EXPERIMENTS["rivit"] = _RIVIT
EXPERIMENTS["rivit_resformer"] = _RIVIT.but(
    "The same with ResFormer's third part: each size also learns the class token of the next larger one.",
    "train.scale_distill=1.0",
)
for _position in ("learned", "sinusoidal", "relative"):
    EXPERIMENTS[f"rivit_plain_{_position}"] = _RIVIT.but(
        f"The study around RIViT: {_position} codes, without them (the stock ViT).",
        f"model.position={_position} model.conv=false eval.sizes=[]",
    )
    if _position != "learned":  # which is rivit itself
        EXPERIMENTS[f"rivit_conv_{_position}"] = _RIVIT.but(
            f"The study around RIViT: {_position} codes, behind convolutions.", f"model.position={_position}"
        )
