"""APF, uniform patches and convolutional rivals on open data sets, for the same training time; must not import torch.

`jobs/experiments.sh` builds the token files and runs them all. The sets are what is freely available and is not PAIP:
kidney glomeruli (regions), nuclei in H&E (dense detail), vessels of the retina (thin lines; at 1024, 2048, 4096 px).
Splits are fixed in files, by patient but for glomeruli, whose patients are not known. Every row of a set has the same
images, seconds, optimiser and schedule. For apf, unet, their rows with standardised filters, uniform_tokens and unetr
the batch, peak learning rate (one for all sets), crop or part were chosen on validation and spare training slides. The
rows beside apf have its own; TransUNet and Swin UNETR have the U-Net's crop and batch, the convolutional decoders the
rate of unetr and half its channels, the rest defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hpc_models.segmentation.settings import SwinUNETRSettings, TransUNetSettings, UNETRSettings, UNetSettings
from hpc_models.settings import ModelSettings
from launch.config.config import CheckpointConfig, Config, EvalConfig, TrainConfig
from launch.config.data import DataConfig
from launch.experiments.registry import register

SECONDS = 150.0
TILE_PX = 256  # of the files crops are cut from
CROP_PX = 256
FOREGROUND = 0.33  # share of crops and parts around a foreground pixel
PAPER_THRESHOLDS = (100, 200)  # of Canny
WHOLE_PX = 2048  # largest frame that is trained on as a whole
UNETR_PX = 16  # patch of UNETR itself (Hatamizadeh et al. 2022)


@dataclass(frozen=True)
class Set:
    """A data set as it is cut.

    Attributes:
        split: JSON file of slide names.
        px: R.
        patch: p of the adaptive rows.
        length: L of the adaptive rows. On vessels at 1024 and 2048 px no tree of edges has more: they end where no
            edges are left (at 4096 px after about 7,000 leaves).
        square: L of those whose decoder takes the sequence as a picture: a square, less than (R / p)^2.
        part: Share of the frame's side that a training step sees, of adaptive rows and of uniform_leaf_unet.
        seen: Share of the frame's side that they see at once when they predict; None: all of it.
        token_part: The share that a training step sees of equal tokens with a linear head.
        fov: Scored and trained on inside the field of view that comes with the set.
        cache_gib: `data.cache_gib`; all training slides fit.
    """

    split: str
    px: int
    patch: int
    length: int
    square: int
    part: float
    seen: float | None
    token_part: float
    fov: bool = False
    cache_gib: float = 2.0


SETS = {
    "glomeruli": Set("data_prep/sample_data/glomeruli24/split.json", 1024, 32, 256, 256, 0.5, None, 0.5),
    "nuclei": Set("launch/splits/nuclei.json", 1024, 32, 928, 784, 0.15, None, 0.15),
    "vessels": Set("launch/splits/vessels.json", 1024, 32, 704, 576, 0.125, 0.25, 0.18, fov=True),
    "vessels_2k": Set("launch/splits/vessels.json", 2048, 32, 2560, 1024, 0.07, 0.19, 0.25, fov=True),
    "vessels_4k": Set("launch/splits/vessels.json", 4096, 32, 2560, 1024, 0.08, 0.2, 0.25, fov=True, cache_gib=6.0),
}


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        text: What it is, for the list of experiments.
        cut: How the frame is cut: apf, variance or entropy (splits where the luma has most of it), fixed (edges by the
            paper's thresholds), cubic (leaves shrunk by interpolation), half or double (so many leaves), square (as
            many leaves as the set's `square`), still (likewise, never flipped), patch or tokens (uniform, with the
            adaptive rows' smallest patch, or at least as many tokens), unetr (16 px), crops, unturned (as apf, never
            flipped), drop (likewise, of files with `--fit drop`).
        model: Its settings.
        batch: Images, or crops, per step.
        lr: Peak learning rate.
        part: Name of the set's share that a step sees; empty: all of the tree.
        crop_px: Side of a training crop; predictions slide windows of `CROP_PX`.
        quantiles: Of `--auto-quantile`, in percent: further folders of trees that training draws from.
    """

    text: str
    cut: str
    model: ModelSettings
    batch: int = 2
    lr: float = 1e-3
    part: Literal["", "part", "token_part"] = ""
    crop_px: int = CROP_PX
    quantiles: tuple[int, ...] = ()


def _vit(**other: Any) -> UNETRSettings:
    """The transformer of the token rows; more blocks take time for steps and give nothing so soon."""
    return UNETRSettings(**({"width": 192, "depth": 1, "heads": 4, "mlp_dim": 384, "leaf_base": 16} | other))


def _over_leaves(
    text: str,
    cut: str = "apf",
    lr: float = 5e-3,
    part: Literal["", "part"] = "part",
    quantiles: tuple[int, ...] = (),
    **model: Any,
) -> Variant:
    """A row with the network of apf, and what is different in it."""
    made = _vit(**({"decoder": "leaf_unet", "position": "geom"} | model))
    return Variant(text, cut, made, batch=1, lr=lr, part=part, quantiles=quantiles)


_DEEP = 4  # blocks that the convolutional decoders take features from
_CONVOLUTIONS = {"depth": _DEEP, "feature_size": 8}  # with 16 a step takes seconds of a core
_UNET = UNetSettings(widths=(16, 16, 32, 64, 128))
# The published size, 105 million weights, makes a tenth of the steps on two cores.
_TRANSUNET = TransUNetSettings(
    layout="tiles",
    norm="instance",
    stem_width=16,
    units=(1, 2, 2),
    decoder_widths=(64, 64, 32, 16),
    width=192,
    depth=1,
    heads=4,
    mlp_dim=384,
)
VARIANTS = {
    "apf": _over_leaves("adaptive tokens, U-Net over the leaves"),
    "apf_std": _over_leaves("as apf, its filters standardised, 2e-3", lr=2e-3, standardise=True),
    "apf_whole": _over_leaves("as apf, every step on a whole tree with its white leaves", part=""),
    "apf_alone": _over_leaves("as apf, every leaf in zeros", seams=False),
    "apf_blind": _over_leaves("as apf without position code", position="none"),
    "apf_variance": _over_leaves("as apf, splits where the luma's variance is largest", "variance"),
    "apf_entropy": _over_leaves("as apf, splits where the luma's entropy is largest", "entropy"),
    "apf_fixed": _over_leaves("as apf, edges by the paper's thresholds 100 and 200", "fixed"),
    "apf_jittered": _over_leaves("as apf, each step's tree from thresholds drawn among three", quantiles=(80, 95)),
    "apf_cubic": _over_leaves("as apf, leaves shrunk by bicubic interpolation", "cubic"),
    "apf_half": _over_leaves("as apf, half as many leaves", "half"),
    "apf_double": _over_leaves("as apf, twice as many leaves", "double"),
    "apf_deep": _over_leaves("as apf, four transformer blocks instead of one", depth=_DEEP),
    "apf_unturned": _over_leaves("as apf, without flips and turns", "unturned"),
    "apf_drop": _over_leaves(
        "as apf_unturned, trees by the paper's rule: split by a threshold, then tokens dropped at random", "drop"
    ),
    "apf_leaf": Variant(
        "adaptive tokens, leaf network", "apf", _vit(decoder="leaf", position="geom", leaf_base=8), part="part"
    ),
    "apf_token": Variant("adaptive tokens, linear head", "apf", _vit(decoder="token", position="geom"), part="part"),
    "apf_token_still": Variant(
        "adaptive tokens, linear head, slot positions, every step on a whole tree that is never flipped",
        "still",
        _vit(decoder="token", position="slot"),
    ),
    "apf_token_placed": Variant(
        "as apf_token_still with the code of centre and scale", "still", _vit(decoder="token", position="geom")
    ),
    "apf_token_blind": Variant(
        "as apf_token_still without position code", "still", _vit(decoder="token", position="none")
    ),
    "apf_token_strip": Variant(
        "as apf_token_still, leaves mixed as by the packing of the authors' code",
        "still",
        _vit(decoder="token", position="slot", packing="strip"),
    ),
    "apf_geometric": Variant(
        "adaptive tokens, convolutional decoder on the grid of the frame",
        "square",
        _vit(decoder="geometric", position="geom", **_CONVOLUTIONS),
        batch=1,
        lr=3e-3,
    ),
    "apf_raster": Variant(
        "adaptive tokens, the paper's decoder on the sequence as a picture, slot positions",
        "square",
        _vit(decoder="raster", position="slot", **_CONVOLUTIONS),
        batch=1,
        lr=3e-3,
    ),
    "apf_still": Variant(
        "as apf_raster without flips and turns",
        "still",
        _vit(decoder="raster", position="slot", **_CONVOLUTIONS),
        batch=1,
        lr=3e-3,
    ),
    "apf_strip": Variant(
        "as apf_still, leaves mixed as by the packing of the authors' code",
        "still",
        _vit(decoder="raster", position="slot", packing="strip", **_CONVOLUTIONS),
        batch=1,
        lr=3e-3,
    ),
    "uniform_leaf_unet": _over_leaves("as apf on equal tokens as small as apf's smallest", "patch"),
    "uniform_leaf_unet_std": _over_leaves("as apf_std on the same equal tokens", "patch", lr=2e-3, standardise=True),
    "uniform_tokens": Variant(
        "at least as many equal tokens as apf, linear head",
        "tokens",
        _vit(decoder="token", position="geom"),
        part="token_part",
    ),
    "uniform_patch": Variant(
        "equal tokens as small as apf's smallest, linear head",
        "patch",
        _vit(decoder="token", position="geom"),
        part="token_part",
    ),
    "unetr": Variant(
        "UNETR: equal patches of 16 px, convolutional decoder",
        "unetr",
        _vit(decoder="geometric", depth=_DEEP),
        batch=1,
        lr=3e-3,
    ),
    "unet": Variant("U-Net on crops, sliding windows", "crops", _UNET, batch=1, lr=5e-3, crop_px=128),
    "unet_std": Variant(
        "as unet, its filters standardised, 2e-3",
        "crops",
        replace(_UNET, standardise=True),
        batch=1,
        lr=2e-3,
        crop_px=128,
    ),
    "transunet": Variant("TransUNet, narrow, on crops, sliding windows", "crops", _TRANSUNET, batch=1, crop_px=128),
    "swin_unetr": Variant(
        "Swin UNETR on crops, sliding windows", "crops", SwinUNETRSettings(layout="tiles"), batch=1, crop_px=128
    ),
}


def _patch_for(chosen: Set) -> int:
    """The largest patch that gives at least L equal tokens, a power of two."""
    patch = chosen.px
    while (chosen.px // patch) ** 2 < chosen.length:
        patch //= 2
    return patch


def _data(name: str, variant: Variant) -> DataConfig:
    chosen, cut = SETS[name], variant.cut
    uniform = {
        "patch": chosen.patch,
        "tokens": _patch_for(chosen),
        "unetr": UNETR_PX,
        "crops": TILE_PX,
    }
    common: dict[str, Any] = {
        "split": chosen.split,
        "resolution": chosen.px,
        "jitter": 0.2,
        "fov": chosen.fov,
        "cache_gib": chosen.cache_gib,
    }
    if variant.part:
        common |= {"part": getattr(chosen, variant.part), "foreground_crops": FOREGROUND}
    root = f"runs/open/tokens/{name}{'_fov' if chosen.fov else ''}"  # older files are of the whole picture
    if cut in uniform:
        patch = uniform[cut]
        length = (chosen.px // patch) ** 2
        more: dict[str, Any] = {}
        if cut == "crops":
            more = {"kind": "tiles", "crop_px": variant.crop_px, "window_px": CROP_PX, "foreground_crops": FOREGROUND}
        return DataConfig(
            dir=f"{root}/uniform{patch}", patching="uniform", patch=patch, length=length, **common, **more
        )
    flips = cut not in ("still", "unturned", "drop")
    split: dict[str, Any] = {"split_on": cut} if cut in ("variance", "entropy") else {}
    if cut == "fixed":
        split["thresholds"] = PAPER_THRESHOLDS
    if cut == "cubic":
        split["resample"] = "cubic"
    lengths = {"half": chosen.length // 2, "double": 2 * chosen.length}
    lengths |= dict.fromkeys(("square", "still"), chosen.square)
    folder = {"still": "square", "unturned": "apf"}.get(cut, cut)
    if folder == "square" and chosen.square == chosen.length:
        folder = "apf"
    common["variants"] = tuple(f"{root}/{cut}_q{percent}" for percent in variant.quantiles)
    return DataConfig(
        dir=f"{root}/{folder}",
        patching="apf",
        patch=chosen.patch,
        length=lengths.get(cut, chosen.length),
        flips=flips,
        **common,
        **split,
    )


def _config(name: str, key: str) -> Config:
    variant = VARIANTS[key]
    return Config(
        experiment=f"open_{name}_{key}",
        data=_data(name, variant),
        model=variant.model,
        train=TrainConfig(batch=variant.batch, lr=variant.lr, max_seconds=SECONDS),
        checkpoint=CheckpointConfig(every_seconds=60),
        eval=EvalConfig(every_seconds=60, part=SETS[name].seen if variant.part == "part" else None),
        run_root="runs/open/runs",
    )


def rows_of(name: str) -> list[str]:
    """Rows of a set, without those that would be another one again.

    Where L tokens need patches as small as apf's smallest, the two uniform rows would be one; where twice L is all that
    the grid has, twice as many leaves are the whole grid or what apf has. Beyond 2048 px models that take a whole frame
    at once are left out: UNETR would have 65,536 tokens.
    """
    chosen = SETS[name]
    out = set()
    if _patch_for(chosen) == chosen.patch:
        out.add("uniform_patch")
    if 2 * chosen.length >= (chosen.px // chosen.patch) ** 2:
        out.add("apf_double")
    if chosen.px > WHOLE_PX:
        out.update(key for key, variant in VARIANTS.items() if not variant.part and variant.cut != "crops")
    return [key for key in VARIANTS if key not in out]


for _name, _set in SETS.items():
    for _key in rows_of(_name):
        register(
            f"open_{_name}_{_key}",
            lambda name=_name, key=_key: _config(name, key),  # type: ignore[misc]
            f"{_name.replace('_', ' ')} at {_set.px:,} px, {SECONDS:g} s: {VARIANTS[_key].text}.",
        )
