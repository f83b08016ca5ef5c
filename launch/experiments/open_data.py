"""APF, uniform patches and convolutional rivals on open data sets, for the same training time.

`python -m launch study` builds the token files and runs them all. The sets are freely available: kidney glomeruli
(regions), nuclei in H&E (dense detail), vessels of the retina (thin lines; at 1024, 2048, 4096 px). Files fix the
splits, by patient except for glomeruli, whose patients are not known.

Every row of a set has the same images, seconds, optimiser and schedule. Batch, peak learning rate (one for all sets),
crop and part of apf, unet, apf_std, unet_std, uniform_tokens and unetr were chosen on validation and spare training
slides. Variants of apf take apf's. TransUNet and Swin UNETR take the U-Net's crop and batch. The convolutional decoders
take unetr's rate and half the channels.
"""

from dataclasses import dataclass

from launch.experiments.experiment import Experiment

SECONDS = 150
PATCH_PX = 32  # the adaptive rows' smallest patch
WHOLE_PX = 2048  # largest frame that is trained on as a whole


@dataclass(frozen=True)
class OpenSet:
    """A data set as it is cut.

    Attributes:
        folder: Name of the folder, with `images` and `masks`, and perhaps `fov` for fields of view.
        split: JSON file of slide names.
        px: R.
        length: L of the adaptive rows. On vessels at 1024 and 2048 px no tree of edges has more leaves.
        square: L of the rows whose decoder takes the sequence as a picture: a square, less than (R / p)^2.
        part: Share of the frame's side in a training step of adaptive rows and of uniform_leaf_unet.
        seen: Share of the frame's side that these rows see at once when they predict; None: all.
        token_part: Share of the frame's side in a training step of equal tokens with a linear head.
        split_value: apf_drop: edge pixels above which a square is split, so that trees have about L leaves.
        fov: Score and train inside the set's field of view only.
        cache_gib: `data.cache_gib`; all training slides fit.
    """

    folder: str
    split: str
    px: int
    length: int
    square: int
    part: float
    seen: float | None
    token_part: float
    split_value: int
    fov: bool = False
    cache_gib: float = 2.0

    def tokens(self, patch_px: int) -> int:
        """Tokens of equal patches."""
        return (self.px // patch_px) ** 2

    @property
    def equal_px(self) -> int:
        """The largest patch that gives at least L equal tokens, a power of two."""
        patch = self.px
        while self.tokens(patch) < self.length:
            patch //= 2
        return patch


_GLOMERULI, _NUCLEI, _VESSELS = (
    "data_prep/sample_data/glomeruli24/split.json",
    "launch/splits/nuclei.json",
    "launch/splits/vessels.json",
)
SETS = {
    "glomeruli": OpenSet("glomeruli24", _GLOMERULI, 1024, 256, 256, 0.5, None, 0.5, 700),
    "nuclei": OpenSet("monuseg_train", _NUCLEI, 1024, 928, 784, 0.15, None, 0.15, 225),
    "vessels": OpenSet("hrf", _VESSELS, 1024, 704, 576, 0.125, 0.25, 0.18, 3, fov=True),
    "vessels_2k": OpenSet("hrf", _VESSELS, 2048, 2560, 1024, 0.07, 0.19, 0.25, 3, fov=True),
    "vessels_4k": OpenSet("hrf", _VESSELS, 4096, 2560, 1024, 0.08, 0.2, 0.25, 235, fov=True, cache_gib=6.0),
}


# What every row changes: the network of apf on whole trees. It has one transformer block, as more cost steps.
_BASE = """
data.dir={root}/apf data.split={split} data.resolution={px} data.patch=32 data.length={length} data.jitter=0.2
data.fov={fov} data.cache_gib={cache_gib}
model.name=unetr model.decoder=leaf_unet model.position=geom
model.width=192 model.depth=1 model.heads=4 model.mlp_dim=384
train.batch=1 train.lr=5e-3 train.max_seconds={seconds} checkpoint.every_seconds=60 eval.every_seconds=60
run_root=runs/open/runs
"""
# A third of the parts, and of the crops, lie around a foreground pixel.
_PART = "data.part={part} data.foreground_crops=0.33 eval.part={seen}"
_LINEAR = "model.decoder=token train.batch=2 train.lr=1e-3"
# Convolutional decoders take features from four blocks. With 16 channels a step would take seconds.
_CONV = "model.depth=4 model.feature_size=8 train.lr=3e-3"
_SQUARE = "data.dir={root}/{square_folder} data.length={square}"
_EQUAL_32 = "data.dir={root}/uniform32 data.patching=uniform data.length={tokens_32}"
_CROPS = """
data.kind=tiles data.dir={root}/uniform256 data.patching=uniform data.patch=256 data.length={tokens_256}
data.crop_px=128 data.window_px=256 data.foreground_crops=0.33
"""
# The rows in the order of their runs: the row that it changes, what it is, its own settings. Words in braces are facts
# of the set (`_facts`).
ROWS = {
    "apf": ("", "adaptive tokens, U-Net over the leaves", _PART),
    "unet": ("", "U-Net on crops, sliding windows", f"{_CROPS} model.name=unet_tiled model.widths=[16,16,32,64,128]"),
    "apf_std": ("apf", "as apf, its filters standardised, 2e-3", "train.lr=2e-3 model.standardise=true"),
    "unet_std": ("unet", "as unet, its filters standardised, 2e-3", "train.lr=2e-3 model.standardise=true"),
    "uniform_leaf_unet": ("apf", "as apf on equal tokens as small as apf's smallest", _EQUAL_32),
    "uniform_leaf_unet_std": ("apf_std", "as apf_std on the same equal tokens", _EQUAL_32),
    "uniform_tokens": (
        "",
        "at least as many equal tokens as apf, linear head",
        """data.dir={root}/uniform{equal_px} data.patching=uniform data.patch={equal_px} data.length={tokens_equal}
        data.part={token_part} data.foreground_crops=0.33 model.decoder=token train.batch=2 train.lr=1e-3""",
    ),
    "unetr": (
        "",
        "UNETR: equal patches of 16 px, convolutional decoder",
        """data.dir={root}/uniform16 data.patching=uniform data.patch=16 data.length={tokens_16}
        model.decoder=geometric model.position=slot model.depth=4 train.lr=3e-3""",
    ),
    "uniform_patch": (
        "uniform_tokens",
        "equal tokens as small as apf's smallest, linear head",
        f"{_EQUAL_32} data.patch=32",
    ),
    # The published size, 105 million weights, would make a tenth of the steps on two cores.
    "transunet": (
        "",
        "TransUNet, narrow, on crops, sliding windows",
        f"""{_CROPS} train.lr=1e-3 model.name=transunet model.layout=tiles model.norm=instance model.stem_width=16
        model.units=[1,2,2] model.decoder_widths=[64,64,32,16]
        model.width=192 model.depth=1 model.heads=4 model.mlp_dim=384""",
    ),
    "swin_unetr": (
        "",
        "Swin UNETR on crops, sliding windows",
        f"{_CROPS} train.lr=1e-3 model.name=swin_unetr model.layout=tiles",
    ),
    "apf_alone": ("apf", "as apf, every leaf in zeros", "model.seams=false"),
    "apf_whole": ("", "as apf, every step on a whole tree with its white leaves", ""),
    "apf_blind": ("apf", "as apf without position code", "model.position=none"),
    "apf_variance": (
        "apf",
        "as apf, splits where the luma's variance is largest",
        "data.dir={root}/variance data.split_on=variance",
    ),
    "apf_entropy": (
        "apf",
        "as apf, splits where the luma's entropy is largest",
        "data.dir={root}/entropy data.split_on=entropy",
    ),
    "apf_fixed": (
        "apf",
        "as apf, edges by the paper's thresholds 100 and 200",
        "data.dir={root}/fixed data.thresholds=[100,200]",
    ),
    "apf_jittered": (
        "apf",
        "as apf, each step's tree from thresholds drawn among three",
        "data.variants=[{root}/apf_q80,{root}/apf_q95]",
    ),
    "apf_cubic": ("apf", "as apf, leaves shrunk by bicubic interpolation", "data.dir={root}/cubic data.resample=cubic"),
    "apf_half": ("apf", "as apf, half as many leaves", "data.dir={root}/half data.length={half}"),
    "apf_double": ("apf", "as apf, twice as many leaves", "data.dir={root}/double data.length={double}"),
    "apf_deep": ("apf", "as apf, four transformer blocks instead of one", "model.depth=4"),
    "apf_unturned": ("apf", "as apf, without flips and turns", "data.flips=false"),
    "apf_drop": (
        "apf_unturned",
        "as apf_unturned, trees by the paper's rule: split by a threshold, then tokens dropped at random",
        "data.dir={root}/drop",
    ),
    "apf_leaf": (
        "apf",
        "adaptive tokens, leaf network",
        "model.decoder=leaf model.leaf_base=8 train.batch=2 train.lr=1e-3",
    ),
    "apf_token": ("apf", "adaptive tokens, linear head", _LINEAR),
    "apf_token_still": (
        "",
        "adaptive tokens, linear head, slot positions, every step on a whole tree that is never flipped",
        f"{_SQUARE} {_LINEAR} data.flips=false model.position=slot",
    ),
    "apf_token_placed": (
        "apf_token_still",
        "as apf_token_still with the code of centre and scale",
        "model.position=geom",
    ),
    "apf_token_blind": ("apf_token_still", "as apf_token_still without position code", "model.position=none"),
    "apf_token_strip": (
        "apf_token_still",
        "as apf_token_still, leaves mixed as by the packing of the authors' code",
        "model.packing=strip",
    ),
    "apf_geometric": (
        "",
        "adaptive tokens, convolutional decoder on the grid of the frame",
        f"{_SQUARE} {_CONV} model.decoder=geometric",
    ),
    "apf_raster": (
        "",
        "adaptive tokens, the paper's decoder on the sequence as a picture, slot positions",
        f"{_SQUARE} {_CONV} model.decoder=raster model.position=slot",
    ),
    "apf_still": ("apf_raster", "as apf_raster without flips and turns", "data.flips=false"),
    "apf_strip": (
        "apf_still",
        "as apf_still, leaves mixed as by the packing of the authors' code",
        "model.packing=strip",
    ),
}
# Options of `data_prep build` that settings do not have, by folder of token files.
_PREP = {
    "drop": "--fit drop --split-value {split_value}",
    "apf_q80": "--auto-quantile 0.80",
    "apf_q95": "--auto-quantile 0.95",
}


def _facts(name: str) -> dict[str, object]:
    """The words in braces of rows, for one set."""
    chosen = SETS[name]
    root = f"runs/open/tokens/{name}{'_fov' if chosen.fov else ''}"
    return {
        **vars(chosen),
        "root": root,
        "seconds": SECONDS,
        "square_folder": "apf" if chosen.square == chosen.length else "square",
        "half": chosen.length // 2,
        "double": chosen.length * 2,
        "equal_px": chosen.equal_px,
        **{f"tokens_{px}": chosen.tokens(px) for px in (16, PATCH_PX, 256)},
        "tokens_equal": chosen.tokens(chosen.equal_px),
    }


def row_settings(key: str) -> str:
    """The settings of a row over those of its base, with the words in braces."""
    if not key:
        return _BASE
    base, _, settings = ROWS[key]
    return f"{row_settings(base)} {settings}"


def prep_options(name: str, folder: str) -> list[str]:
    """Options of `data_prep build` that a folder of token files needs besides its settings."""
    return _PREP.get(folder.rpartition("/")[2], "").format_map(vars(SETS[name])).split()


def left_out(name: str) -> dict[str, str]:
    """Rows that a set does not have, and why: another row is the same, or they take a whole frame beyond 2048 px."""
    chosen = SETS[name]
    out = {}
    if chosen.equal_px == PATCH_PX:
        out["uniform_patch"] = f"it would be open_{name}_uniform_tokens again"
    if 2 * chosen.length >= chosen.tokens(PATCH_PX):
        out["apf_double"] = "it would be the whole grid, or apf again"
    if chosen.px > WHOLE_PX:  # UNETR would have 65,536 tokens
        settings = {key: row_settings(key) for key in ROWS}
        whole = [key for key, words in settings.items() if "data.part=" not in words and "=tiles" not in words]
        out |= dict.fromkeys(whole, "it takes whole frames")
    return out


def rows_of(name: str) -> list[str]:
    """Rows of a set, in the order in which they run."""
    return [key for key in ROWS if key not in left_out(name)]


def _of_set(name: str) -> dict[str, Experiment]:
    facts = _facts(name)
    what = f"{name.replace('_', ' ')} at {SETS[name].px:,} px, {SECONDS} s"
    return {
        f"open_{name}_{key}": Experiment(f"{what}: {ROWS[key][1]}.", row_settings(key).format_map(facts))
        for key in rows_of(name)
    }


EXPERIMENTS = {key: made for name in SETS for key, made in _of_set(name).items()}
