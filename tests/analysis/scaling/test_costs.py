"""Closed formulas of arithmetic and weights against torch's own counter on the real models."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.scaling import costs
from analysis.scaling.costs import cost_of, encoder_flops, raster_decoder_flops, unet_cost
from hpc_models.registry import build, settings_class
from hpc_models.tokens.batch import Batch, uniform_batch
from launch.experiments.load import load


def count(model: torch.nn.Module, *inputs: object) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def unetr_cost(resolution: int, patch: int, length: int, *, classes: int = 1, tokens: float | None = None, **shape):
    frame = SimpleNamespace(resolution=resolution, patch=patch, length=length, classes=classes, channels=3)
    return costs.unetr_cost(frame, settings_class("unetr")(**{"heads": 1, **shape}), tokens)


def tokens(n: int, p: int) -> Batch:
    """n tokens on meta; their places do not matter for a cost."""
    return Batch(
        tokens=torch.zeros(1, n, p, p, 3, device="meta"),
        leaf_xy=torch.zeros(1, n, 2, dtype=torch.int64, device="meta"),
        leaf_size=torch.ones(1, n, dtype=torch.int64, device="meta"),
        valid=torch.ones(1, n, dtype=torch.bool, device="meta"),
    )


@pytest.mark.parametrize("patch", [4, 8, 16, 32, 64])
def test_uniform_unetr_at_every_patch(patch):
    with torch.device("meta"):
        model = build("unetr", size_px=512, patch=patch, length=(512 // patch) ** 2, position="none").eval()
        counted = count(model, tokens((512 // patch) ** 2, patch))
    cost = unetr_cost(512, patch, (512 // patch) ** 2)
    assert cost.flops == counted
    spare = sum(p.numel() for n, p in model.named_parameters() if "norm_cross_attn" in n)
    assert cost.weights == sum(p.numel() for p in model.parameters()) - spare


def test_published_cost_of_unetr_16():
    assert raster_decoder_flops(1024, 16) == unetr_cost(512, 16, 1024).decoder
    assert unetr_cost(512, 16, 1024).flops / 1e9 == pytest.approx(239.604, abs=0.001)
    assert encoder_flops(1024, 768, 12) == 12 * (24 * 1024 * 768**2 + 4 * 1024**2 * 768)


@pytest.mark.parametrize("decoder", ["token", "leaf", "leaf_unet", "raster"])
@pytest.mark.parametrize("patch", [2, 8, 32])
def test_adaptive_unetr(decoder, patch):
    shape = {"width": 64, "depth": 3, "mlp_dim": 96, "decoder": decoder, "feature_size": 4, "leaf_base": 8}
    with torch.device("meta"):
        model = build("unetr", size_px=1024, patch=patch, length=100, heads=4, position="none", classes=2, **shape)
        counted = count(model.eval(), tokens(100, patch))
    cost = unetr_cost(1024, patch, 100, classes=2, **shape)
    assert cost.flops == counted
    spare = sum(p.numel() for n, p in model.named_parameters() if "norm_cross_attn" in n)
    assert cost.weights == sum(p.numel() for p in model.parameters()) - spare


@pytest.mark.parametrize("decoder", ["leaf", "leaf_unet", "token"])
@pytest.mark.parametrize("attention", ["full", "packed"])
def test_padding_costs_what_the_model_computes_of_it(attention, decoder):
    """40 valid tokens of 64: convolutions and transformer see 40, linear maps of tokens all 64."""
    shape = {"width": 32, "depth": 2, "decoder": decoder, "leaf_base": 4}
    model = build("unetr", size_px=128, patch=8, length=64, heads=4, position="none", attention=attention, **shape)
    batch = tokens(64, 8)
    batch = {name: torch.zeros_like(value, device="cpu") for name, value in batch.items()}
    batch["leaf_size"] += 8
    batch["valid"][:, :40] = True
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = count(model.eval(), batch)
    assert unetr_cost(128, 8, 64, tokens=40, **shape).flops == counted


def test_geometric_unetr_on_real_places():
    shape = {"width": 32, "depth": 2, "decoder": "geometric", "feature_size": 4}
    model = build("unetr", size_px=64, patch=8, length=64, heads=4, position="none", **shape).eval()
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = count(model, uniform_batch(torch.zeros(1, 3, 64, 64), 8))
    assert unetr_cost(64, 8, 64, **shape).flops == counted


@pytest.mark.parametrize("widths", [(4, 8), (16, 16, 32, 64, 128), (64, 128, 256, 512, 1024)])
def test_unet(widths):
    with torch.device("meta"):
        model = build("unet", widths=widths, norm="none")
        counted = count(model, torch.zeros(1, 3, 64, 64))
    cost = unet_cost(64, widths)
    assert cost.flops == counted and cost.weights == sum(p.numel() for p in model.parameters())


def test_cost_of_an_experiment_is_per_frame():
    apf, tiled = load("demo_apf"), load("demo_tiled_unet")
    full, few = cost_of(apf), cost_of(apf, tokens=64)
    assert (full.tokens, few.tokens) == (256, 64) and few.decoder == full.decoder / 4
    assert few.encoder == encoder_flops(64, apf.model.width, apf.model.depth, apf.model.mlp_dim)
    assert cost_of(tiled).flops == 16 * unet_cost(256, tiled.model.widths).flops
    assert cost_of(load("hiri_vit")) is None
