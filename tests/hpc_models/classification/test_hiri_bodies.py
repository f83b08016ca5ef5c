"""PVTv2, DaViT and HRNet against their published weights and costs, their attention against the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.classification.hiri_blocks import ReducedAttention
from hpc_models.classification.hiri_bodies import BODIES, WindowAttention
from hpc_models.classification.hrnet import FuseBlock
from hpc_models.registry import build, settings_class

# weights, then billion multiply-accumulates at 224 and at 448 px
PUBLISHED = {
    "pvt_v2_b2": (25_362_856, 4.027, 17.817),
    "davit_tiny": (28_360_168, 4.522, 18.085),
    "hrnet_w18": (21_299_004, 4.284, 17.128),
}


def gmacs(model: torch.nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("body", BODIES)
def test_plain_bodies_have_their_published_weights_and_costs(body):
    with torch.device("meta"):
        model = build("hiri_body", body=body).eval()
    weights, small, large = PUBLISHED[body]
    assert sum(p.numel() for p in model.parameters()) == weights
    assert (gmacs(model, 224), gmacs(model, 448)) == pytest.approx((small, large), abs=1e-3)
    assert not settings_class("hiri_body")(body=body).reconstruction


@pytest.mark.parametrize("body", BODIES)
def test_five_stages_at_448_cost_about_what_the_body_costs_at_224(body):
    """That is the point of the treatment: four times the pixels for at most a quarter more arithmetic."""
    with torch.device("meta"):
        model = build("hiri_body", body=body, five_stages=True).eval()
    assert gmacs(model, 448) < 1.25 * PUBLISHED[body][1]
    assert settings_class("hiri_body")(body=body, five_stages=True).reconstruction
    maps, x = [], torch.zeros(1, 3, 448, 448, device="meta")
    for stage in model.stages:
        x = stage(x)
        maps.append(448 // x.shape[-1])
    assert maps[:2] == [4, 8] and maps[-1] == 64


def test_window_attention_is_attention_within_each_window():
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, False, window=3)
    x = torch.randn(1, 8, 6, 3)
    out = layer(x)
    for row in (0, 3):
        tokens = x[:, :, row : row + 3].flatten(2).transpose(1, 2)
        q, k, v = layer.qkv(tokens).view(1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        expected = layer.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view(1, 8, 3, 3)
        torch.testing.assert_close(out[:, :, row : row + 3], expected, atol=1e-6, rtol=1e-5)
    assert layer(torch.randn(1, 8, 7, 5)).shape == (1, 8, 7, 5)


def test_channel_attention_mixes_channels_of_a_group_and_no_pixels():
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, True)
    x = torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(x.flatten(2).transpose(1, 2)).view(2, 15, 3, 2, 4).permute(2, 0, 3, 4, 1)
    scores = torch.einsum("bhcn,bhdn->bhcd", q, k) / math.sqrt(4)
    mixed = torch.einsum("bhcd,bhdn->bhcn", scores.softmax(-1), v)
    expected = layer.proj(mixed.flatten(1, 2).transpose(1, 2)).transpose(1, 2).view(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    order = torch.randperm(15)
    turned = layer(x.flatten(2)[:, :, order].view_as(x)).flatten(2)
    torch.testing.assert_close(turned, layer(x).flatten(2)[:, :, order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduction", [1, 2])
def test_reduced_attention_is_plain_attention_to_a_smaller_map(reduction):
    torch.manual_seed(0)
    layer = ReducedAttention(8, 2, reduction)
    x = torch.randn(1, 8, 4, 5)
    tokens = keys = x.flatten(2).transpose(1, 2)
    if reduction > 1:
        small = F.conv2d(x, layer.sr.weight, layer.sr.bias, stride=2)
        assert small.shape[-2:] == (2, 2)
        keys = F.layer_norm(small.flatten(2).transpose(1, 2), (8,))
    q = layer.q(tokens).view(1, 20, 2, 4).transpose(1, 2)
    k, v = layer.kv(keys).view(1, -1, 2, 2, 4).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
    expected = layer.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view(1, 8, 4, 5)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_a_picture_whose_map_cannot_shrink_is_refused():
    with pytest.raises(ValueError, match="picture too small: its map of 4x3 is to shrink 8-fold"):
        ReducedAttention(8, 2, 8)(torch.zeros(1, 8, 4, 3))


def test_exchange_lets_every_resolution_reach_every_other():
    torch.manual_seed(0)
    layer = FuseBlock((4, 8, 16)).eval()
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4), torch.randn(1, 16, 2, 2)]
    before = layer(maps)
    assert [tuple(m.shape) for m in before] == [tuple(m.shape) for m in maps]
    for i in range(3):
        changed = [m + (2.0 if j == i else 0.0) for j, m in enumerate(maps)]
        assert all(not torch.equal(a, b) for a, b in zip(before, layer(changed), strict=True))


def test_unknown_body_is_refused():
    with pytest.raises(ValueError, match="body must be one of pvt_v2_b2, davit_tiny, hrnet_w18"):
        build("hiri_body", body="resnet")
