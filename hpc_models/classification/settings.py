"""Settings of the networks that answer once per picture or slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hpc_models.settings import (
    CHECKPOINTING,
    NORMALISE,
    Attention,
    Inputs,
    ModelSettings,
    PositionCode,
    TaskName,
    TransformerSizes,
    assumed,
    option,
)

Pool = Literal["cls", "mean"]


@dataclass(frozen=True, kw_only=True)
class _ClassifierSettings(ModelSettings):
    task: ClassVar[TaskName] = "classification"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tiles")


@dataclass(frozen=True, kw_only=True)
class _ViTSizes(TransformerSizes, _ClassifierSettings):
    """What ViT and APF-ViT share."""

    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)


@dataclass(frozen=True, kw_only=True)
class ViTSettings(_ViTSizes):
    """`vit`: vision transformer on pictures, ViT-B/16 by default.

    Its table of positions is made for pictures of `image_hw`; for other sizes it is interpolated.
    """

    name: ClassVar[str] = "vit"
    data = assumed(image_hw=(224, 224), classes=1000, in_channels=3)

    patch_px: int = option(16, "side of a patch in pixels", gt=0)
    pool: Pool = option("cls", "class token, or mean of the tokens")
    position: PositionCode = option("slot", "position code of a token")


@dataclass(frozen=True, kw_only=True)
class APFViTSettings(_ViTSizes):
    """`apf_vit`: vision transformer on token sets, one label per slide."""

    name: ClassVar[str] = "apf_vit"
    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens",)
    data = assumed(size_px=..., patch=..., length=..., classes=2, in_channels=3)

    pool: Pool = option("mean", "class token, or mean of the valid tokens")
    position: PositionCode = option("geom", "position code of a token")
    attention: Attention = option(
        "full", "packed: on valid tokens only; window: within `window` tokens; others: linear in L"
    )
    window: int = option(256, "attention=window: tokens per window; nystrom: landmarks", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "cls" and self.attention == "window":
            raise ValueError("with attention=window the class token sees the first window alone: use pool=mean")


@dataclass(frozen=True, kw_only=True)
class HIPTSettings(_ClassifierSettings):
    """`hipt`: three transformers over patches, squares and regions; uniform tokens are its squares.

    The tables have 14 rows a side, since the authors trained at 224 px; they are interpolated to the grid at hand.
    """

    name: ClassVar[str] = "hipt"
    inputs: ClassVar[tuple[Inputs, ...]] = ("images", "tokens")
    data = assumed(size_px=4096, patch=1, length=1, classes=2, in_channels=3, image_hw=None)

    scales: tuple[int, int, int] = option((16, 256, 4096), "pixels of patch, square and region")
    widths: tuple[int, int] = option((384, 192), "channels of the first level and of the others")
    depths: tuple[int, int, int] = option((12, 6, 2), "blocks of the levels")
    heads: tuple[int, int, int] = option((6, 6, 3), "attention heads of the levels")
    table_side: int = option(14, "side of the learned tables of positions, in tokens", gt=0)
    dropout: float = option(0.25, "in the third level", ge=0, lt=1)
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        small, square, region = self.scales
        if small < 1 or square % small or region % square:
            raise ValueError(f"scales must divide each other, got {list(self.scales)}")


@dataclass(frozen=True, kw_only=True)
class GMICSettings(_ClassifierSettings):
    """`gmic`: the global network of GMIC, convolutions throughout, without its patches of interest."""

    name: ClassVar[str] = "gmic"
    has_attention: ClassVar[bool] = False
    data = assumed(classes=2, in_channels=1)

    strides: tuple[int, int, int, int, int] = option(
        (2, 2, 2, 2, 2), "stride of each stage; GMIC itself had 1, 2, 2, 2, 2"
    )
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.strides) != 5 or min(self.strides) < 1:
            raise ValueError(f"strides must be 5 positive numbers, got {list(self.strides)}")


@dataclass(frozen=True, kw_only=True)
class HCTSettings(GMICSettings):
    """`hct`: convolutions where maps are large, linear attention over the whole picture where they are small."""

    name: ClassVar[str] = "hct"
    has_attention: ClassVar[bool] = True

    attention: Literal["performer_relu", "performer_softmax", "nystrom"] = option(
        "performer_relu", "how attention is made linear in the number of tokens"
    )
    conv_stages: int = option(3, "stages of convolutions only, of five", ge=1, le=4)
    heads: int = option(8, "attention heads; must divide the channels of every stage's input", gt=0)
    dropout: float = option(0.1, "after the attention's output", ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class DefGMICSettings(GMICSettings):
    """`def_gmic`: GMIC with deformable convolutions in its last two stages."""

    name: ClassVar[str] = "def_gmic"

    offset_bias: bool = option(True, "bias in the convolutions that make the offsets")


@dataclass(frozen=True, kw_only=True)
class HIRIViTSettings(_ClassifierSettings):
    """`hiri_vit`: five stages, two branches where maps are large; its numbers are a reconstruction."""

    name: ClassVar[str] = "hiri_vit"
    data = assumed(classes=1000, in_channels=3)

    variant: Literal["s", "b", "l", "row1", "row2", "row3", "row4", "row5", "row6", "row7", "row8", "row9", "row10"] = (
        option("s", "s, b, l, or a row of the ablation (Table VII); all are reconstructions")
    )
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)

    @property
    def reconstruction(self) -> bool:
        """Always: the paper's table of numbers is lost."""
        return True


@dataclass(frozen=True, kw_only=True)
class HIRIBodySettings(_ClassifierSettings):
    """`hiri_body`: PVTv2, DaViT or HRNet, plain or with HIRI-ViT's front (a reconstruction)."""

    name: ClassVar[str] = "hiri_body"
    data = assumed(classes=1000, in_channels=3)

    body: Literal["pvt_v2_b2", "davit_tiny", "hrnet_w18"] = option("pvt_v2_b2", "the published network")
    five_stages: bool = option(False, "HR-stem and two stages of HR blocks in front")
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)

    @property
    def reconstruction(self) -> bool:
        """With HIRI-ViT's front."""
        return self.five_stages


@dataclass(frozen=True, kw_only=True)
class RIViTSettings(_ClassifierSettings):
    """`rivit`: every resolution becomes the same token grid; also the stock ViT it is compared with."""

    name: ClassVar[str] = "rivit"
    gives_token: ClassVar[bool] = True
    data = assumed(classes=10, in_channels=3)

    conv: bool = option(True, "convolutions and adaptive pooling in front; false: the stock ViT")
    position: Literal["learned", "sinusoidal", "relative"] = option("learned", "position code of a patch")
    patch_px: int = option(4, "side of a patch in pixels of the token grid's picture", gt=0)
    grid_px: int = option(64, "conv: side that every picture is pooled to", gt=0)
    tokens: int = option(1600, "conv=false, learned: rows of the table of positions", gt=0)
    conv_width: int = option(32, "conv: channels of both convolutions (a choice of ours)", gt=0)
    width: int = option(128, "channels of a token", gt=0)
    depth: int = option(6, "layers", gt=0)
    heads: int = option(3, "attention heads", gt=0)
    head_width: int = option(64, "channels of each head", gt=0)
    mlp_dim: int = option(128, "hidden channels of a layer's MLP", gt=0)
    reach: int = option(256, "relative: offsets beyond this count as this", gt=0)
    normalise: bool = option(True, NORMALISE)
    checkpointing: bool = option(False, CHECKPOINTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_px % self.patch_px:
            raise ValueError(f"grid_px {self.grid_px} is not a multiple of patch_px {self.patch_px}")
