"""What engines can do beside training the same model: compile, hpZ, offload; and what they say where it is missing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_models import registry
from launch import engines
from launch.config.config import ConfigError, EngineConfig
from launch.engines.base import EngineSetup, compiled_units, repeated, units_of
from launch.engines.fsdp import shard_axis, shard_size
from tests.helpers.small_runs import Group, free_port, launch_rank, losses, overrides


def build(config: EngineConfig):
    return engines.build(nn.Linear(3, 2), config, EngineSetup(torch.device("cpu"), "fp32"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(compile=True), "engine.compile=true needs a C++ compiler"),
        (EngineConfig(name="deepspeed", offload=True), "no C++ compiler on PATH"),
    ],
)
def test_a_missing_compiler_is_a_setting(config, words, one_rank, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=words.replace("+", r"\+")):
        build(config)


def test_a_missing_deepspeed_names_its_extra(one_rank, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install deepspeed==0.19.8 torch==2.13.0 \(extra: deepspeed\)"):
        build(EngineConfig(name="deepspeed"))


def test_shard_groups_are_nodes_beyond_one_node():
    plain, asked = EngineConfig(name="fsdp"), EngineConfig(name="fsdp", shard=4)
    assert [shard_size(plain, *sizes) for sizes in ((8, 8), (16, 8), (2048, 4), (6, 4))] == [8, 8, 4, 6]
    assert shard_size(asked, 16, 8) == 4 and shard_size(asked, 2, 2) == 2


@pytest.mark.parametrize(("shape", "axis"), [((8, 3), 0), ((1, 16, 4), 1), ((3, 5, 12), 2), ((3, 5), None), ((), None)])
def test_weights_are_cut_where_nothing_has_to_be_padded(shape, axis):
    found = shard_axis(nn.Parameter(torch.zeros(shape)), 4)
    assert (found and found.dim) == axis


def test_only_repeated_blocks_are_compiled():
    first, second, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
    assert repeated([other, first, second]) == [first, second]
    assert repeated([other]) == [other]


def test_a_single_transformer_block_is_compiled_without_the_leaf_networks():
    model = registry.build(
        "unetr",
        size_px=64,
        patch=8,
        length=16,
        classes=1,
        width=8,
        depth=1,
        heads=2,
        mlp_dim=8,
        decoder="leaf_unet",
        position="geom",
        leaf_base=4,
    )
    assert len(units_of(model)) > 1 and compiled_units(model) == [*model.vit.blocks]
    assert compiled_units(nn.Linear(2, 2)) == []


def train(files: Path, root: Path, world: int, **cases: dict[str, object]) -> dict[str, list[float]]:
    """Losses of four steps of each case on the same ranks."""
    more = {"train__max_steps": 4, "train__clip": 0.3, "checkpoint__every_seconds": "null", "eval__pictures_px": 0}
    (root / "jobs.json").write_text(
        json.dumps([overrides(files, root, run_id=name, **more, **case) for name, case in cases.items()])
    )
    port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(root / "jobs.json")]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(550) == [0] * world, group.errors
    return {name: losses(root / "smoke" / name) for name in cases}


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize("case", ["compile", "offload"])
def test_with_a_compiler_the_losses_are_the_same(case, apf_files, tmp_path):
    changed = {
        "compile": {"engine__name": "fsdp", "engine__compile": True},
        "offload": {"engine__name": "deepspeed", "engine__zero": 2, "engine__offload": True},
    }[case]
    found = train(apf_files, tmp_path, 2, plain={}, changed=changed)
    assert found["changed"] == pytest.approx(found["plain"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.gloo
def test_hpz_gathers_within_a_group_and_trains_the_same(apf_files, tmp_path):
    hpz = {"engine__name": "deepspeed", "engine__zero": 3, "engine__shard": 2}
    found = train(apf_files, tmp_path, 4, plain={}, hpz=hpz)
    assert found["hpz"] == pytest.approx(found["plain"], abs=1e-5)
