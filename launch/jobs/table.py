"""All job scripts: name, experiment, GPUs (from the experiments, where they have them) and hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.experiments.paip import SIZES


@dataclass(frozen=True)
class Job:
    """One script of jobs/.

    Attributes:
        name: Name of the job, and of the script without .sh.
        text: What it does, one line.
        gpus: Ranks; the renderer shares them over nodes.
        hours: Time limit, unless the site's limit is shorter.
        kind: Part of jobs/body.sh that it runs.
        experiment: Named experiment; empty: `name`.
        uniform: Experiment with equal patches (`PATCHING=uniform`); empty: none.
        overrides: Settings in the script, before the settings of the command line.
    """

    name: str
    text: str
    gpus: int
    hours: float
    kind: Literal["train", "prep", "scaling", "bench"] = "train"
    experiment: str = ""
    uniform: str = ""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "experiment", self.experiment or self.name)


_PAIP = "APF-UNETR on PAIP at {} px, on as many GPUs as in the paper; PATCHING=uniform: UNETR."
_PREP = "Slides of PAIP to the token files of an experiment (EXPERIMENT=paip_16k), over MPI ranks."
_BTCV = "APF-UNETR on BTCV's CT slices, 13 organs; PATCHING=uniform: UNETR."
_ORGANS = "Classification of PAIP's slides by APF-ViT."
_SCALING = "A scaling study in one allocation: 1, 2, 4, ... ranks; MODE=strong or weak."
_BENCH = "Seconds per image of the paper's rows on one GPU: `python -m launch bench`."
_JOBS = (
    *(
        Job(f"paip_{label}", _PAIP.format(f"{size.px:,}"), size.apf[0].gpus, 24, uniform=f"paip_{label}_uniform")
        for label, size in SIZES.items()
    ),
    Job("prep_paip", _PREP, 32, 12, "prep", "paip_64k", "paip_64k_uniform"),
    Job("btcv", _BTCV, 8, 12, uniform="btcv_uniform"),
    Job("classify_paip", _ORGANS, 8, 12, uniform="classify_paip_uniform"),
    Job("hct_patch", "HCT on patches of mammograms.", 8, 12),
    Job("hct_image", "HCT on whole mammograms.", 8, 12),
    Job("hiri_vit", "HIRI-ViT-S on ImageNet-1K at 448 px.", 64, 24),
    Job("rivit", "Resolution-invariant ViT on Imagenette.", 8, 6),
    Job("scaling", _SCALING, 64, 4, "scaling", "paip_16k", "paip_16k_uniform"),
    Job("bench", _BENCH, 1, 2, "bench", "smoke"),
)
JOBS: dict[str, Job] = {job.name: job for job in _JOBS}
