"""`python -m launch models`: costs against closed forms, and what the command prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launch.__main__ import main
from launch.config.config import ConfigError, model_class
from launch.config.model import MODELS
from launch.experiments.load import all_experiments, load
from launch.plan.inventory import inventory, measure, meta_inputs, reference
from launch.records.text_table import text_table
from launch.train.checks import check_model
from launch.train.trainer import build_model
from tests.helpers.repository import ROOT


def test_attention_is_counted_on_meta_and_not_on_cpus():
    """Why everything is counted on meta: 4 * N^2 * D for two products, or nothing at all."""
    for device, expected in (("meta", 524288), ("cpu", 0)):
        q = torch.empty(1, 2, 64, 16, device=device)
        with FlopCounterMode(display=False) as counter:
            F.scaled_dot_product_attention(q, q, q)
        assert counter.get_total_flops() == expected
    with pytest.raises(ValueError, match="meta"):
        measure(nn.Linear(3, 4), torch.empty(2, 3))


def test_kept_activations_of_a_small_network_by_hand():
    """Linear keeps its input, ReLU its output, which the next linear keeps too: counted once. Weights do not count."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
        cost = measure(model, torch.empty(5, 6))
    assert cost.parameters == cost.trainable == 6 * 10 + 10 + 10 * 3 + 3
    assert cost.macs == 5 * (6 * 10 + 10 * 3) and cost.flops == 2 * cost.macs
    assert cost.activation_bytes == 4 * 5 * (6 + 10)
    assert cost.weight_bytes == 4 * cost.parameters


@pytest.mark.parametrize("batch", [1, 3])
def test_vit_with_a_linear_head_costs_what_the_formula_says(batch):
    """12 (24 N D^2 + 4 N^2 D) FLOPs of the blocks, 2 N D c P^2 of the embedding, 2 N D K P^2 of the head."""
    (row,) = inventory({"vit_seg": reference("vit_seg", batch)})
    n, d, p = 1024, 768, 16
    flops = 12 * (24 * n * d**2 + 4 * n**2 * d) + 2 * n * d * 3 * p**2 + 2 * n * d * p**2
    assert row["flops"] == batch * flops and row["macs"] == batch * flops // 2
    # 12 blocks without biases of q, k, v in UNETR; with them here.
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d
    assert row["parameters"] == 12 * block + 2 * d + (3 * p * p + 1) * d + n * d + (d + 1) * p * p


def test_recomputing_keeps_the_inputs_of_the_blocks_instead_of_what_is_inside():
    sizes = {}
    for on in (False, True):
        words = ["model.width=64", "model.depth=6", "model.heads=4", "model.decoder=token", f"model.checkpointing={on}"]
        config = load("paip_512_p8", [*words, "train.batch=1"])
        (row,) = inventory({"x": config})
        sizes[on] = row["activation_bytes"]
    inputs = 6 * 4 * 576 * 64
    assert inputs < sizes[True] < sizes[False] / 4


def test_activations_grow_with_the_batch_and_the_batch_is_the_experiments_shape():
    costs = []
    for batch in (1, 2):
        config = load("demo_apf", [f"train.batch={batch}"])
        inputs = meta_inputs(config)
        assert inputs["tokens"].shape == (batch, 256, 16, 16, 3)
        with torch.device("meta"):
            costs.append(measure(build_model(config), inputs))
    assert costs[1].macs == 2 * costs[0].macs and costs[1].parameters == costs[0].parameters
    # Not exactly twice: what a view of one image is, is a copy of two, or the other way round.
    assert 1.9 < costs[1].activation_bytes / costs[0].activation_bytes <= 2.0


@pytest.fixture
def rows(capsys):
    """What `models` says of each model, by its name."""
    assert main(["models", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_model_is_listed_with_its_cost(rows):
    assert set(rows) == set(MODELS)
    for name, row in rows.items():
        assert "error" not in row, row
        assert row["task"] == model_class(name).task and row["inputs"] == list(model_class(name).inputs)
        assert row["flops"] == 2 * row["macs"] > 0 and row["activation_bytes"] > 0
        assert row["parameters"] >= row["trainable"] > 0


def test_the_papers_models_have_the_papers_sizes(rows):
    assert rows["hiri_vit"]["reconstruction"] and not rows["transunet"]["reconstruction"]
    assert rows["unetr"]["parameters"] == 88_317_169
    assert rows["unetr"]["flops"] / 1e9 == pytest.approx(239.604, rel=1e-4)
    assert rows["transunet"]["parameters"] == 105_911_825
    assert rows["hct"]["parameters"] == 1_737_010


def test_the_network_over_leaves_is_counted_without_memory():
    """Its places around leaves depend on values, which there are none of on meta."""
    (row,) = inventory({"x": load("open_glomeruli_apf_deep")})
    assert row["flops"] > 1e9 and row["parameters"] > 1e6


def test_what_is_a_reconstruction_says_so_in_the_table(capsys):
    names = ["hiri_pvt_v2_b2_448", "hiri_pvt_v2_b2_224", "hiri_vit_row6"]
    assert main(["models", *(word for name in names for word in ("--experiment", name))]) == 0
    lines = capsys.readouterr().out.splitlines()[1:4]
    assert [line.startswith(f"{name} (a reconstruction)") for line, name in zip(lines, names, strict=True)] == [
        True,
        False,
        True,
    ]


def test_the_table_names_the_factor_of_two_and_what_it_leaves_out(capsys):
    assert main(["models", "--name", "unet_tiled", "--experiment", "smoke", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "FLOPs = 2 x" in out and "not counted" in out and "batch: 2" in out
    lines = out.splitlines()
    assert lines[0].split()[0] == "name" and lines[1].startswith("unet_tiled") and lines[2].startswith("smoke")
    assert len({len(line) for line in lines[:3]}) == 1


@pytest.mark.parametrize("other", [[], ["model.name=transunet", "model.layout=sequence"]])
def test_a_tree_as_long_as_a_full_grid_is_not_read_as_one(other):
    full = [*other, "data.length=1024"]  # (1024 / 32)^2
    with pytest.raises(ConfigError, match="reads as uniform patching: choose a smaller square"):
        check_model(load("open_nuclei_apf_raster", full))
    check_model(load("open_nuclei_apf_raster", other))
    check_model(load("open_nuclei_apf_raster", [*full, "data.patching=uniform"]))


def test_every_experiment_on_photographs_can_be_built_and_scored():
    names = [name for name in all_experiments() if name.startswith(("hiri_", "rivit"))]
    sides = set()
    for name in names:
        config = load(name, ["train.init_from=null"])
        check_model(config)
        sides |= {config.data.resolution, *config.data.sizes, *config.eval.sizes}
    assert sides == {96, 128, 160, 256, 320, 224, 448, 768}
    variants = {load(name).model.variant for name in names if load(name).model.name == "hiri_vit"}
    assert variants == {"s", "b", "l", *(f"row{i}" for i in range(1, 11))}
    assert len([name for name in names if name.startswith("rivit")]) == 7
    assert Path(str(load("hiri_vit_768").train.init_from)) == load("hiri_vit").run_dir(1)


def test_costs_of_another_input_are_those_of_its_size(capsys):
    words = ["--name", "hct", "--name", "gmic", "data.image_hw=[1664,1280]", "--json", "--batch", "2"]
    assert main(["models", *words]) == 0
    hct, gmic = json.loads(capsys.readouterr().out)
    assert hct["input"] == "1 x 1664 x 1280 px" and hct["flops"] / 2e9 == pytest.approx(3.4003, rel=0.01)
    assert gmic["flops"] / 2e9 == pytest.approx(3.6464, rel=0.01)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--name", "hct", "data.image_hv=[1664,1280]"], "did you mean data.image_hw?"),
        (["--name", "unter"], "model.name='unter' is unknown (did you mean unetr?)"),
        (["--experiment", "paip_128k"], "unknown experiment 'paip_128k'"),
        (["--batch", "0"], "at least 1"),
        (["--batch", "two"], "invalid"),
    ],
)
def test_wrong_words_end_with_64(words, part, capsys):
    assert main(["models", *words]) == 64
    assert part in capsys.readouterr().err


def test_without_monai_its_models_say_which_extra_is_missing():
    program = (
        "import sys; sys.modules['monai'] = None\n"
        "from launch.__main__ import main\n"
        "sys.exit(main(['models', '--name', 'swin_unetr', '--name', 'unet_tiled']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "pip install the extra `monai`" in lines["swin_unetr"]
    assert "1,942,577" in lines["unet_tiled"]


def test_what_ends_a_row_early_widens_no_column():
    rows = [["name", "n", "GiB"], ["a", "12,345", "1"], ["longer", "no such thing"]]
    shown = ["name         n  GiB", "a       12,345    1", "longer  no such thing     "]
    assert text_table(rows, left=1).split("\n") == shown
    assert text_table(rows[:2]).split("\n") == ["name  n       GiB", "a     12,345  1"]
