"""One label per slide of PAIP: APF-ViT, ViT and HIPT, as in Table V of APF (SC24).

Six organs have 40 slides each: 28 to train, 4 to validate, 8 to test (here by shares: 70, 10 and 20 %).
`data/paip_organs/labels.csv` has lines `slide,organ` with organs 0 to 5. Make the token files with:

    python -m data_prep build SLIDES --resolution 16384 --patch 2 --length 16384 --out data/paip_organs/apf_16k_p2
    python -m data_prep build SLIDES --resolution 16384 --patch 256 --patching uniform \
        --out data/paip_organs/uniform_16k_p256

The paper's ViT has patches of 4,096 px. A linear embedding of such patches would have 39 billion weights, so ours takes
HIPT's squares, 4,096 of 256 px. Epochs, batch and rate are ours as well.
"""

from launch.experiments.experiment import Experiment

SLIDES, EPOCHS, BATCH = 168, 200, 8
STEPS = EPOCHS * SLIDES // BATCH

_APF = Experiment(
    "APF-ViT-2 names the organ of PAIP's slides at 16K: 16384 adaptive tokens, ViT-B (Table V).",
    f"""data.dir=data/paip_organs/apf_16k_p2 data.labels=data/paip_organs/labels.csv data.fractions=[0.7,0.1,0.2]
    data.resolution=16384 data.patch=2 data.length=16384 data.classes=6
    model.name=apf_vit model.checkpointing=true
    train.batch={BATCH} train.lr=1e-4 train.weight_decay=0.05 train.max_steps={STEPS} train.precision=bf16
    train.log_every=10 checkpoint.every_seconds=600 eval.every_steps={STEPS // 20} eval.pictures_px=1""",
)
_UNIFORM = "data.dir=data/paip_organs/uniform_16k_p256 data.patching=uniform data.patch=256 data.length=4096"

EXPERIMENTS = {
    "classify_paip": _APF,
    "classify_paip_uniform": _APF.but(
        "ViT-B names the organ of PAIP's slides at 16K: 4096 equal tokens of 256 px, learned positions, class token.",
        f"{_UNIFORM} model.pool=cls model.position=slot",
    ),
    "classify_paip_hipt": _APF.but(
        "HIPT names the organ of PAIP's slides at 16K: patches of 16, 256 and 4096 px, all levels trained (Table V).",
        f"{_UNIFORM} model.name=hipt model.checkpointing=true",
    ),
}
