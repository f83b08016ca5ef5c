"""Experiments of HCT, GMIC and Def-GMIC on mammograms (Taha et al., MICCAI 2022).

The paper's data, OPTIMAM, is given out on application only; any mammograms will do. Put into `data/mammography`, with
gray PNG files of 8 or 16 bits:

- `images/`: whole mammograms of any size (they are padded to 3328 x 2560), turned to the same side or not;
- `patches/`: squares of 512 px, positive ones centred on the boxes around malignant findings, the others from
  anywhere inside the breast of images without malignancy;
- `images.csv` and `patches.csv` with the columns `name,label` (1 malignant, 0 not);
- `images_split.json` and `patches_split.json`, {train, val, test: [names]}, with each patient in one part.

Each network trains on patches first, and its image runs start from these weights (`train.init_from`; name the run if it
had several GPUs or another seed). `train.init_from=null` starts from random weights.
"""

from launch.experiments.experiment import Experiment

NETWORKS = {
    "gmic": ("model.name=gmic", "GMIC's global network"),
    "def_gmic": ("model.name=def_gmic", "GMIC with deformable convolutions"),
    "hct": ("model.name=hct", "HCT with Performer-ReLU attention"),
    "hct_softmax": ("model.name=hct model.attention=performer_softmax", "HCT with Performer-softmax attention"),
    "hct_nystrom": ("model.name=hct model.attention=nystrom", "HCT with Nystrom attention"),
}
IMAGES = 58_376  # OPTIMAM's training images (table 2). The authors do not say how many patches they cut: we, one each.
EPOCHS = 80


def _stage(part: str, batch: int, more: str) -> str:
    """Training on `part`, without warm-up, decay and clipping, which the paper does not mention."""
    steps = EPOCHS * IMAGES // batch
    # The paper names flips and Gaussian noise, but no strength.
    return f"""data.dir=data/mammography/{part} data.kind=images data.labels=data/mammography/{part}.csv
    data.split=data/mammography/{part}_split.json data.classes=2 data.channels=1 data.flips=true data.noise=0.02
    train.batch={batch} train.max_steps={steps} train.warmup=0 train.weight_decay=0 train.clip=0 train.log_every=50
    eval.every_steps={steps // EPOCHS} eval.pictures_px=1 {more}"""


_PATCH = _stage("patches", 160, "data.resolution=512 train.lr=6e-4")
_IMAGE = _stage("images", 32, "data.resolution=3328 data.image_hw=[3328,2560] train.lr=2e-5")
_HALF = f"{_IMAGE} data.resolution=1664 data.image_hw=[1664,1280]"


def _network(name: str, model: str, text: str) -> dict[str, Experiment]:
    """Six experiments: patches, whole images and images of half the size, each by Adam and by ASAM."""
    found: dict[str, Experiment] = {}
    for ending, optimiser, by in (("", "adam", "Adam"), ("_asam", "asam", "Adam with ASAM")):
        before = f"{name}_patch{ending}"
        model_by = f"{model} train.optimiser={optimiser}"
        patches = Experiment(
            f"{text} on patches of 512 px, {by}: pretraining for whole mammograms.", f"{_PATCH} {model_by}"
        )
        model_by += f" train.init_from={patches.config(before).run_dir(1)}"
        found |= {
            before: patches,
            f"{name}_image{ending}": Experiment(
                f"{text} on whole mammograms of 3328 x 2560 px, {by}, from the weights of {before}.",
                f"{_IMAGE} {model_by}",
            ),
            f"{name}_half{ending}": Experiment(
                f"{text} on mammograms at half resolution, 1664 x 1280 px, {by}, from the weights of {before}.",
                f"{_HALF} {model_by}",
            ),
        }
    return found


EXPERIMENTS = {key: made for name, facts in NETWORKS.items() for key, made in _network(name, *facts).items()}
