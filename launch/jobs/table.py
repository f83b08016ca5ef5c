"""The job scripts there are: name, experiment, GPUs, hours. GPU counts come from the experiments where these have them.

Must not import torch: it is read on login nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.experiments.paip import SIZES

Kind = Literal["train", "prep", "scaling", "bench"]


@dataclass(frozen=True)
class Job:
    """One script of jobs/.

    Attributes:
        name: Of the script, without .sh, and of the job.
        text: What it does, one line.
        gpus: Ranks; the renderer shares them over nodes.
        hours: Asked for; less where a site's limit for so many nodes is shorter.
        kind: Part of jobs/body.sh that it runs.
        experiment: Named experiment.
        uniform: The same with equal patches (`PATCHING=uniform`); empty when there is none.
        overrides: Settings baked into the script, before those of the command line.
    """

    name: str
    text: str
    gpus: int
    hours: float
    kind: Kind = "train"
    experiment: str = ""
    uniform: str = ""
    overrides: tuple[str, ...] = ()


def _paip(label: str, hours: float) -> Job:
    size = SIZES[label]
    name = f"paip_{label}"
    return Job(
        name,
        f"APF-UNETR on PAIP at {size.px:,} px, on as many GPUs as in the paper; PATCHING=uniform: UNETR.",
        size.apf[0].gpus,
        hours,
        "train",
        name,
        f"{name}_uniform",
    )


_JOBS = (
    *(_paip(label, 24) for label in SIZES),
    Job(
        "prep_paip",
        "Slides of PAIP to the token files of an experiment (EXPERIMENT=paip_16k), over MPI ranks.",
        32,
        12,
        "prep",
        "paip_64k",
        "paip_64k_uniform",
    ),
    Job(
        "btcv",
        "APF-UNETR on BTCV's CT slices, 13 organs; PATCHING=uniform: UNETR.",
        8,
        12,
        "train",
        "btcv",
        "btcv_uniform",
    ),
    Job(
        "classify_paip",
        "Classification of PAIP's slides by APF-ViT.",
        8,
        12,
        "train",
        "classify_paip",
        "classify_paip_uniform",
    ),
    Job("hct_patch", "HCT on patches of mammograms.", 8, 12, "train", "hct_patch"),
    Job("hct_image", "HCT on whole mammograms.", 8, 12, "train", "hct_image"),
    Job("hiri_vit", "HIRI-ViT-S on ImageNet-1K at 448 px.", 64, 24, "train", "hiri_vit"),
    Job("rivit", "Resolution-invariant ViT on Imagenette.", 8, 6, "train", "rivit"),
    Job(
        "scaling",
        "A scaling study in one allocation: 1, 2, 4, ... ranks; MODE=strong or weak.",
        64,
        4,
        "scaling",
        "paip_16k",
        "paip_16k_uniform",
    ),
    Job("bench", "Seconds per image of the paper's rows on one GPU: `python -m launch bench`.", 1, 2, "bench", "smoke"),
)
JOBS: dict[str, Job] = {job.name: job for job in _JOBS}
