"""TransUNet against its published counts and costs, its parts against plain torch, and every kind of input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.blocks.conv import StdConv2d
from hpc_models.blocks.resnet import ResNet, Unit
from hpc_models.registry import build
from hpc_models.tokens.batch import uniform_batch
from hpc_models.tokens.position import resize_table
from tests.helpers.trees import random_batch

SMALL = {
    "classes": 2,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 48,
    "stem_width": 8,
    "units": (1, 2, 1),
    "decoder_widths": (16, 16, 8, 8),
    "norm": "instance",
}


@pytest.mark.parametrize(
    ("size", "classes", "parameters", "gflop"),
    [(224, 9, 105_277_081, 58.45), (512, 1, 105_911_825, 336.19), (512, 2, 105_911_970, 336.27)],
)
def test_published_parameters_and_cost(size, classes, parameters, gflop):
    with torch.device("meta"):
        model = build("transunet", size_px=size, patch=16, length=1, classes=classes, layout="tiles")
        image = torch.empty(1, 3, size, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(image).shape == (1, classes, size, size)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.01)


def test_each_further_16_px_square_costs_one_row_of_the_table():
    def count(size):
        with torch.device("meta"):
            model = build("transunet", size_px=size, patch=16, length=1, layout="tiles")
        return sum(p.numel() for p in model.parameters())

    assert [count(s) - count(224) for s in (256, 512, 1024)] == [768 * ((s // 16) ** 2 - 196) for s in (256, 512, 1024)]


def test_filters_are_standardised_each_time():
    torch.manual_seed(0)
    conv = StdConv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8)
    w = conv.weight.detach()
    mean = w.mean((1, 2, 3), keepdim=True)
    var = w.var((1, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(conv(x), F.conv2d(x, (w - mean) / (var + 1e-5).sqrt(), padding=1), atol=1e-5, rtol=0)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(3).add_(1)
    torch.testing.assert_close(conv(x), before, atol=1e-2, rtol=1e-3)  # scale and offset do not matter


@pytest.mark.parametrize(("channels", "stride"), [((64, 64), 1), ((64, 128), 1), ((64, 128), 2)])
def test_a_unit_is_what_plain_torch_makes_of_it(channels, stride):
    torch.manual_seed(0)
    unit = Unit(*channels, stride)
    for p in unit.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, channels[0], 9, 8)

    def conv(layer, z):
        w = layer.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return F.conv2d(z, w, stride=layer.stride, padding=w.shape[-1] // 2)

    def group(layer, z, groups, eps):
        return F.group_norm(z, groups, layer.weight, layer.bias, eps)

    middle, out = channels[1] // 4, channels[1]
    y = F.relu(group(unit.norm1, conv(unit.conv1, x), min(32, middle), 1e-6))
    y = F.relu(group(unit.norm2, conv(unit.conv2, y), min(32, middle), 1e-6))
    y = group(unit.norm3, conv(unit.conv3, y), 32, 1e-6)
    changes = stride != 1 or channels[0] != channels[1]
    assert (unit.shortcut is not None) == changes
    skip = group(unit.shortcut_norm, conv(unit.shortcut, x), out, 1e-5) if changes else x
    torch.testing.assert_close(unit(x), F.relu(skip + y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [32, 112, 224])
def test_maps_halve_and_the_short_one_ends_in_zeros(side):
    maps = ResNet(3, 8, (1, 1, 1))(torch.rand(1, 3, side, side))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (8, side // 2, side // 2),
        (32, side // 4, side // 4),
        (64, side // 8, side // 8),
        (128, side // 16, side // 16),
    ]
    assert maps[1][..., -1, :].abs().max() == 0 == maps[1][..., -1].abs().max()
    assert maps[1][..., :-1, :-1].abs().max() > 0


@pytest.mark.parametrize("layout", ["geometric", "sequence"])
def test_uniform_tokens_in_morton_order_give_the_whole_image_result(layout):
    torch.manual_seed(0)
    model = build("transunet", size_px=64, patch=8, length=64, layout=layout, **SMALL).eval()
    image = torch.rand(2, 3, 64, 64)
    whole = model(image)
    assert whole.shape == (2, 2, 64, 64)
    torch.testing.assert_close(model(uniform_batch(image, 8)), uniform_batch(whole, 8)["tokens"], atol=1e-5, rtol=0)


def test_crops_are_pictures_of_their_own():
    torch.manual_seed(0)
    model = build("transunet", size_px=32, patch=32, length=4, layout="tiles", **SMALL).eval()
    image = torch.rand(1, 3, 64, 64)
    batch = uniform_batch(image, 32)
    batch["valid"][0, 3] = False
    logits = model(batch)
    for i, (x, y) in enumerate(batch["leaf_xy"][0, :3].tolist()):
        alone = model(image[:, :, y : y + 32, x : x + 32])
        torch.testing.assert_close(logits[0, i].permute(2, 0, 1), alone[0], atol=1e-5, rtol=0)
    assert (logits[0, 3] == 0).all()


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (50, 33), (64, 64)])
def test_any_size_goes_in_and_comes_out(size):
    model = build("transunet", size_px=64, patch=8, length=64, layout="tiles", **SMALL).eval()
    logits = model(torch.rand(1, 3, *size))
    assert logits.shape == (1, 2, *size) and torch.isfinite(logits).all()


def test_the_table_of_positions_is_a_picture():
    table = torch.rand(1, 12, 5)
    assert resize_table(table, (3, 4), (3, 4)) is table
    flat = resize_table(torch.full((1, 16, 5), 2.5), (4, 4), (7, 6))
    torch.testing.assert_close(flat, torch.full((1, 42, 5), 2.5))
    # A ramp from left to right stays one: rows equal, values rising.
    ramp = torch.arange(8.0).repeat(8)[None, :, None]
    wide = resize_table(ramp, (8, 8), (8, 16)).unflatten(1, (8, 16))[0, ..., 0]
    assert (wide[0] == wide).all() and (wide[0, 2:-2].diff() > 0).all()


def test_sequence_order_draws_another_picture_than_geometry():
    batch, _, _ = random_batch(0, 64, 8, length=25, images=2, classes=2, split=0.35)
    results = []
    for layout in ("geometric", "sequence"):
        torch.manual_seed(0)
        model = build("transunet", size_px=64, patch=8, length=25, layout=layout, **SMALL).eval()
        assert model.picture_px == (64 if layout == "geometric" else 40)
        results.append(model(batch))
    assert results[0].shape == results[1].shape == (2, 25, 8, 8, 2)
    assert not torch.allclose(results[0][batch["valid"]], results[1][batch["valid"]], atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "raster"}, "layout must be one of geometric, sequence, tiles"),
        ({"layout": "sequence", "length": 24}, "perfect square of tokens, got 24; use 16"),
        ({"size_px": 96}, r"patch \* 2\^k"),
        ({"grid": 16}, "at most size_px / patch = 8"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"width": 30}, "not a multiple of heads"),
        ({"prior": 1.5}, "prior must lie between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build("transunet", **{"size_px": 64, "patch": 8, "length": 25, **SMALL, **wrong})
    model = build("transunet", size_px=64, patch=8, length=64, **SMALL)
    with pytest.raises(ValueError, match="takes tokens of 8 cells a side, got 32"):
        model(uniform_batch(torch.rand(1, 3, 64, 64), 32))


def test_decoder_norms_and_dropout():
    batch_norms = [
        m
        for m in build("transunet", size_px=64, patch=8, length=64, **{**SMALL, "norm": "batch"}).modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    assert len(batch_norms) == 9  # bridge and two per doubling
    torch.manual_seed(0)
    model = build("transunet", size_px=32, patch=8, length=16, dropout=0.5, **SMALL)
    assert [(block.attn.dropout, block.mlp.dropout) for block in model.vit.blocks] == [(0.0, 0.5)] * 2
    image = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model(image), model(image))
    assert torch.equal(model.eval()(image), model(image))
