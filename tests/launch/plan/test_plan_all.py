"""`plan` answers for every experiment there is, on as many gpus as its paper used."""

import json

import pytest

from launch.__main__ import main
from launch.experiments.load import all_experiments, load
from launch.experiments.paip import SIZES

# Table V of APF (SC24), and HIRI-ViT's recipe; other papers tell of no number.
GPUS = {"classify_paip": 128, "classify_paip_uniform": 128, "classify_paip_hipt": 128, "hiri_": 8}
for label, size in SIZES.items():
    for kind, rows in (("", size.apf), ("_uniform", size.uniform)):
        GPUS |= {f"paip_{label}{kind}_p{row.patch}": row.gpus for row in rows[1:]}
        GPUS[f"paip_{label}{kind}"] = rows[0].gpus
    GPUS |= {f"paip_{label}_transunet": size.transunet_gpus, f"paip_{label}_unet": size.unet_gpus}
AGREEMENT = 3 * 8 + 8  # bytes by which the ranks agree on signals, time and loss in every step


def gpus(name: str) -> int:
    return GPUS.get(name) or next((n for start, n in GPUS.items() if start[-1] == "_" and name.startswith(start)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_experiments())
def test_every_experiment_on_the_papers_gpus(name, capsys):
    # Batches that the paper does not tell may be smaller than its number of gpus.
    micro = ["--micro", "1"] if load(name).train.batch % gpus(name) else []
    assert main(["plan", name, "--gpus", str(gpus(name)), "--site", "frontier", "--json", "--no-advice", *micro]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["engine"] == "ddp" and plan["gpus"] == gpus(name)
    kinds = plan["memory_gib"]
    assert sum(kinds.values()) == pytest.approx(plan["peak_memory_gib"])
    for kind, copies in (("gradients", 1), ("optimizer", 2)):  # of fp32 numbers, a few of them frozen
        assert kinds[kind] * 2**30 > 0.999 * 4 * copies * plan["parameters"]
    assert plan["flops"] > 1e9 and plan["time"]["step_s"] >= plan["time"]["overlapped_s"] > 0
    assert [row["kind"] for row in plan["collectives"]] == ["all_reduce"]
    # DDP reduces each gradient once, in fp32; ASAM looks at two.
    passes = 2 if name.endswith("_asam") else 1
    assert plan["collectives"][0]["bytes"] == pytest.approx(4 * passes * plan["parameters"] + AGREEMENT, rel=1e-3)


def test_the_papers_gpus_are_known():
    assert gpus("paip_64k") == 2048 and gpus("paip_1k_uniform_p16") == 16 and gpus("hiri_vit_row3") == 8
    assert {name for name in GPUS if name[-1] != "_"} <= set(all_experiments())
