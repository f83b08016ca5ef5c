"""The rows of `make demo`, and `smoke`.

All rows have the same images, time, optimiser and schedule. The token rows have the same transformer, a small one,
since two minutes need many steps. Rate, batch and decoder of a row served it best on held-out training slides at this
time. Convolutions on large uniform patches are as slow as a U-Net on the whole frame, so uniform rows have the linear
head.
"""

from launch.experiments.experiment import Experiment

_COMMON = """
data.split=data_prep/sample_data/glomeruli24/split.json data.resolution=1024 data.jitter=0.2
train.max_seconds=130 checkpoint.every_seconds=20 eval.every_seconds=45
"""
_APF = Experiment(
    "APF-UNETR on glomeruli at 1024 px: 256 adaptive tokens of 16 px, U-Net over the leaves, 130 s.",
    f"""{_COMMON} data.dir=demo/tokens/apf data.patch=16 data.length=256 train.lr=5e-3
    model.name=unetr model.decoder=leaf_unet model.position=geom
    model.width=128 model.depth=4 model.heads=4 model.mlp_dim=256""",
)
_UNIFORM = "data.patching=uniform model.decoder=token train.lr=1e-3"

EXPERIMENTS = {
    "demo_apf": _APF,
    "demo_uniform_tokens": _APF.but(
        "Uniform patches with as many tokens as demo_apf (256, so 64 px each), linear head, same transformer and time.",
        f"{_UNIFORM} data.dir=demo/tokens/uniform64 data.patch=64",
    ),
    "demo_uniform_patch": _APF.but(
        "Uniform patches as small as demo_apf's smallest (16 px, so 4096), linear head, same transformer and time.",
        f"{_UNIFORM} data.dir=demo/tokens/uniform16 data.length=4096",
    ),
    "demo_tiled_unet": Experiment(
        "The usual rival: a U-Net on 256 px crops with sliding-window inference, same time as demo_apf.",
        f"""{_COMMON} data.dir=demo/tokens/tiles256 data.kind=tiles data.patching=uniform data.patch=256 data.length=16
        data.crop_px=256 data.foreground_crops=0.33 model.name=unet_tiled model.widths=[16,16,32,64,128]
        train.batch=4""",
    ),
    "smoke": _APF.but(
        "Six steps of a very small APF-UNETR on the demo's token files: does everything start?",
        """model.name=unetr model.decoder=leaf model.position=both model.width=32 model.depth=2 model.heads=2
        model.mlp_dim=64 train.max_seconds=null train.max_steps=6 train.warmup=0.2 train.lr=1e-3
        eval.every_seconds=null eval.every_steps=3 eval.pictures_px=256""",
    ),
}
