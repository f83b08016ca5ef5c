"""HIRI-ViT: five stages, two branches where the map is large, attention where it is small.

The paper's table of channels, depths and expansions is lost. Every configuration here is a RECONSTRUCTION. We chose its
numbers so that the known costs come out (Table VII: 4.7, 21.5, 5.1 and 5.0 billion multiply-accumulates in rows 6, 7, 9
and 10). Many other choices would do so too: do not quote these as the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.init import init_linears
from hpc_models.blocks.network import Network
from hpc_models.classification.hiri_blocks import Downsample, FeedBlock, HRBlock, Stem, TransformerBlock
from hpc_models.classification.settings import HIRIViTSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import Batch, images_of


@dataclass(frozen=True)
class StagePlan:
    """What the stages are made of: one entry per stage."""

    widths: tuple[int, ...]  # channels
    blocks: tuple[str, ...]  # hr, cffn or transformer
    depths: tuple[int, ...]  # number of blocks
    expansions: tuple[int, ...]  # E of the feed-forwards
    outer: tuple[str, ...]  # norm in front of the parts of a block, bn or ln
    stem: str  # vit, conv or hr
    downs: tuple[str, ...]  # downsampling in front of stages 2, 3, ...
    convolve: bool = True  # CFFN (True) or FFN
    inner: str = "bn"  # norm inside the feed-forwards
    stem_width: int = 32  # channels between the strides of the stem
    irds_expansion: int = 2  # inner width of the downsamplings over their input
    reductions: tuple[int, ...] = ()  # how much attention shrinks the map of its first stages' keys; 1 in all others
    size_px: int = 224  # side of the images it is meant for


def _s() -> StagePlan:
    return StagePlan(
        widths=(32, 64, 128, 256, 384),
        blocks=("hr", "hr", "cffn", "transformer", "transformer"),
        depths=(4, 6, 5, 12, 4),
        expansions=(8, 16, 8, 4, 4),
        outer=("bn", "bn", "bn", "ln", "ln"),
        stem="hr",
        downs=("irds_a", "irds_a", "irds_b", "irds_b"),
        size_px=448,
    )


def _ladder() -> dict[str, StagePlan]:
    """Rows 1 to 10 of Table VII, from a multi-stage ViT to HIRI-ViT-S without distillation."""
    row10 = _s()
    row9 = replace(
        row10, blocks=("cffn", "cffn", "cffn", *row10.blocks[3:]), depths=(2, 3, 5, 12, 4), expansions=(4, 8, 8, 4, 4)
    )
    row8 = replace(row9, stem="conv")
    row7 = replace(
        row8,
        widths=row8.widths[1:],
        blocks=row8.blocks[1:],
        depths=row8.depths[1:],
        expansions=row8.expansions[1:],
        outer=row8.outer[1:],
        downs=row8.downs[1:],
    )
    row6 = replace(row7, size_px=224)
    row5 = replace(row6, downs=("conv",) * 3)
    row4 = replace(row5, stem="vit")
    row3 = replace(row4, inner="ln", outer=("ln",) * 4)
    # As in PVT, the base model's attention has fewer keys in its first two stages (section 5.4).
    row2 = replace(row3, blocks=("transformer",) * 4, expansions=(7, 7, 4, 4), reductions=(8, 4))
    row1 = replace(row2, convolve=False)
    rows = (row1, row2, row3, row4, row5, row6, row7, row8, row9, row10)
    return {f"row{i}": plan for i, plan in enumerate(rows, 1)}


PLANS: dict[str, StagePlan] = {
    "s": _s(),
    "b": replace(_s(), widths=(48, 96, 192, 320, 512), depths=(4, 6, 6, 14, 5)),
    "l": replace(_s(), widths=(64, 128, 256, 448, 640), depths=(4, 8, 8, 18, 6)),
    **_ladder(),
}


class HIRIViT(Network):
    """HIRI-ViT and the steps of its ablation (a reconstruction, see the module)."""

    def __init__(self, settings: HIRIViTSettings, data: DataShape) -> None:
        super().__init__(settings)
        self.plan = plan = PLANS[settings.variant]
        self.stem = Stem(plan.stem, data.in_channels, plan.stem_width, plan.widths[0])
        self.downs = nn.ModuleList(
            Downsample(kind, plan.widths[i], plan.widths[i + 1], plan.irds_expansion)
            for i, kind in enumerate(plan.downs)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(self._block(plan, i) for _ in range(depth)) for i, depth in enumerate(plan.depths)
        )
        self.norm = nn.LayerNorm(plan.widths[-1])
        self.head = nn.Linear(plan.widths[-1], data.classes)
        init_linears(self)

    @staticmethod
    def _block(plan: StagePlan, stage: int) -> nn.Module:
        width, expansion, outer = plan.widths[stage], plan.expansions[stage], plan.outer[stage]
        if plan.blocks[stage] == "hr":
            return HRBlock(width, expansion)
        if plan.blocks[stage] == "cffn":
            return FeedBlock(width, expansion, plan.convolve, plan.inner, outer)
        reduction = plan.reductions[stage] if stage < len(plan.reductions) else 1
        return TransformerBlock(width, expansion, plan.convolve, plan.inner, outer, reduction)

    def fsdp_units(self) -> list[nn.Module]:
        """See `Network`."""
        units: list[nn.Module] = [self.stem]
        for i, stage in enumerate(self.stages):
            units += [self.downs[i - 1]] if i else []
            units += list(stage.children())
        return units

    def maps(self, image: Tensor) -> list[Tensor]:
        """The maps after each stage, finest first: strides 4, 8, 16, 32 and 64."""
        x = self.stem(self.centred(image))
        out = []
        for i, stage in enumerate(self.stages):
            x = self.downs[i - 1](x) if i else x
            for block in stage.children():
                x = recompute(self, block, x)
            out.append(x)
        return out

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Class logits (B, classes) of pictures (B, C, H, W) in [0, 1], as such or in a batch."""
        last = self.maps(images_of(batch))[-1]
        return cast(Tensor, self.head(self.norm(F.adaptive_avg_pool2d(last, 1).flatten(1))))
