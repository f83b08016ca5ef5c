"""Experiments of PAIP, BTCV and the organs: the tables they come from, and that each can be built and run on meta."""

import math

import pytest
import torch

from launch.config.config import ConfigError
from launch.experiments.load import all_experiments, load
from launch.experiments.paip import SIZES
from launch.plan.inventory import meta_inputs
from launch.train.checks import check_model, check_world
from launch.train.trainer import build_model

MINE = [name for name in all_experiments() if name.startswith(("paip_", "btcv", "classify_paip"))]


def test_rows_of_table_iii():
    """Lengths are squares (the decoder draws them as one), UNETR's are (R / p)^2, R / p is a power of two."""
    assert [size.px for size in SIZES.values()] == [512 << i for i in (0, 1, 3, 4, 5, 6, 7)]
    for size in SIZES.values():
        for row in size.apf:
            assert math.isqrt(row.length) ** 2 == row.length < (size.px / row.patch) ** 2
            assert math.log2(size.px / row.patch) % 1 == 0
        for row in size.uniform:
            assert row.length == (size.px // row.patch) ** 2
    depths = [[int(math.log2(size.px // row.patch)) for row in size.apf] for size in SIZES.values()]
    assert depths == [
        [8, 7, 6],
        [9, 8, 7, 6],
        [11, 10, 9, 8],
        [12, 11, 10, 9],
        [13, 12, 11, 10],
        [13, 12, 11, 10],
        [13, 12, 11, 10],
    ]
    lengths = {row.length for size in SIZES.values() for row in size.apf}
    assert lengths == {729, 676, 576, 1024, 900, 784, 4096, 2116, 1521, 10609, 8464, 16384}


def test_four_models_at_every_resolution():
    for label, size in SIZES.items():
        kinds = {"": "unetr", "_uniform": "unetr", "_transunet": "transunet", "_unet": "unet_tiled"}
        for ending, model in kinds.items():
            config = load(f"paip_{label}{ending}")
            assert config.model.name == model and config.data.resolution == size.px
            assert config.data.patching == ("apf" if ending == "" else "uniform")
        finest = load(f"paip_{label}")
        assert (finest.data.patch, finest.data.length) == (size.apf[0].patch, size.apf[0].length)
        check_world(finest, size.apf[0].gpus)  # one image per GPU of the paper


@pytest.mark.parametrize("name", MINE)
def test_every_model_can_be_built(name):
    check_model(load(name))


@pytest.mark.parametrize(
    "name",
    [
        "paip_512",
        "paip_64k",
        "paip_4k_uniform",
        "paip_1k_transunet",
        "paip_64k_unet",
        "btcv_vit_seg",
        "btcv_swin_unetr",
        "classify_paip",
        "classify_paip_uniform",
    ],
)
def test_a_forward_pass_has_the_shape_of_the_answer(name):
    config = load(name, ["train.batch=2"])
    with torch.device("meta"):
        model, inputs = build_model(config), meta_inputs(config)
        with torch.no_grad():
            answer = model(inputs)
    data = config.data
    if config.model.task == "classification":
        assert answer.shape == (2, data.classes)
    elif data.kind == "tiles":
        assert answer.shape == (2, 1, data.crop_px, data.crop_px, data.classes)
    else:
        assert answer.shape == (2, data.length, data.patch, data.patch, data.classes)


def test_crops_need_the_layout_of_crops():
    with pytest.raises(ConfigError, match=r"layout=geometric does not go with data.kind=tiles"):
        load("paip_512_transunet", ["model.layout=geometric"])
    with pytest.raises(ConfigError, match=r"layout=tiles does not go with data.kind=tokens"):
        load("paip_512_transunet", ["data.kind=tokens"])


def test_a_model_that_does_not_fit_its_data_is_one_line():
    with pytest.raises(ConfigError, match=r"model.name=hipt: .*takes uniform tokens of 256 px"):
        check_model(load("classify_paip_hipt", ["data.patch=128"]))
    with pytest.raises(ConfigError, match=r"model.name=swin_unetr: .*larger than 32 px"):
        check_model(load("btcv_swin_unetr", ["data.crop_px=32"]))
