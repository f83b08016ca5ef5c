"""ViT against its published counts and plain torch, APF-ViT on token sets, and the cost convention of papers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.registry import build
from hpc_models.tokens.batch import uniform_batch
from tests.helpers.trees import random_batch

SLIDES = {"size_px": 64, "patch": 8, "length": 25, "classes": 3, "width": 32, "depth": 2, "heads": 4}


@pytest.mark.parametrize(
    ("width", "heads", "parameters", "gmacs"),
    [(768, 12, 86_567_656, 17.564), (384, 6, 22_050_664, 4.599), (192, 3, 5_717_416, 1.254)],
)
def test_published_parameters_and_cost(width, heads, parameters, gmacs):
    with torch.device("meta"):
        model = build("vit", classes=1000, width=width, heads=heads)
        image = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(image).shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=6e-4)
    n, d = 197, width
    macs = 12 * (12 * n * d**2 + 2 * n**2 * d) + 196 * d * 3 * 16**2 + d * 1000
    assert counter.get_total_flops() == 2 * macs


def test_papers_call_macs_flops():
    """Swin-B at 224 px: published as 15.4 "GFLOPs", which is its number of multiply-accumulates (Liu et al. 2021)."""
    macs, side, c = 0, 56, 128
    macs += side**2 * c * 48  # patches of 4 x 4 x 3
    for blocks in (2, 2, 18, 2):
        n = side**2
        macs += blocks * (12 * n * c**2 + 2 * n * 49 * c)  # linear maps; attention in windows of 7 x 7
        if side > 7:
            side //= 2
            macs += side**2 * (4 * c) * (2 * c)  # merging of 2 x 2
            c *= 2
    macs += c * 1000
    assert macs / 1e9 == pytest.approx(15.43, rel=0.01)


def plain_vit(model, image):
    """The same network from torch's own encoder layers."""
    d, heads = model.head.in_features, model.body.vit.blocks[0].attn.heads
    x = F.conv2d((image - 0.5) / 0.5, model.embed.proj.weight, model.embed.proj.bias, stride=model.patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((model.body.cls.expand(len(x), -1, -1), x), 1) + model.body.table
    for block in model.body.vit.blocks:
        layer = nn.TransformerEncoderLayer(
            d, heads, block.mlp.linear1.out_features, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True
        )
        pairs = [
            (layer.self_attn.in_proj_weight, block.attn.qkv.weight),
            (layer.self_attn.in_proj_bias, block.attn.qkv.bias),
            (layer.self_attn.out_proj.weight, block.attn.out_proj.weight),
            (layer.self_attn.out_proj.bias, block.attn.out_proj.bias),
            (layer.linear1.weight, block.mlp.linear1.weight),
            (layer.linear1.bias, block.mlp.linear1.bias),
            (layer.linear2.weight, block.mlp.linear2.weight),
            (layer.linear2.bias, block.mlp.linear2.bias),
            (layer.norm1.weight, block.norm1.weight),
            (layer.norm1.bias, block.norm1.bias),
            (layer.norm2.weight, block.norm2.weight),
            (layer.norm2.bias, block.norm2.bias),
        ]
        with torch.no_grad():
            for theirs, mine in pairs:
                theirs.copy_(mine)
        x = layer(x)
    return F.linear(model.body.vit.norm(x)[:, 0], model.head.weight, model.head.bias)


def test_vit_is_what_plain_torch_makes_of_it():
    torch.manual_seed(0)
    model = build("vit", image_hw=(24, 40), classes=5, patch_px=8, width=48, depth=3, heads=4)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    image = torch.rand(2, 3, 24, 40)
    torch.testing.assert_close(model(image), plain_vit(model, image), atol=1e-5, rtol=1e-5)


def test_another_size_interpolates_the_table_and_a_wrong_one_is_refused():
    model = build("vit", image_hw=(32, 32), classes=5, patch_px=8, width=16, depth=1, heads=2)
    assert model(torch.rand(2, 3, 48, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"30x32 are no multiples of patch_px 8"):
        model(torch.rand(1, 3, 30, 32))
    with pytest.raises(ValueError, match="no multiples"):
        build("vit", image_hw=(30, 32), patch_px=8)
    with pytest.raises(ValueError, match="pool must be one of cls, mean"):
        build("vit", pool="max")
    with pytest.raises(ValueError, match="position must be one of"):
        build("vit", position="rope")


def test_uniform_tokens_give_what_pictures_give():
    """APF-ViT on equal leaves in Morton order is ViT on the picture, weight for weight."""
    torch.manual_seed(0)
    sizes = {"classes": 3, "width": 32, "depth": 2, "heads": 4, "pool": "cls", "position": "slot"}
    vit = build("vit", image_hw=(64, 64), patch_px=8, **sizes).eval()
    apf = build("apf_vit", size_px=64, patch=8, length=64, **sizes).eval()
    apf.load_state_dict(vit.state_dict())
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(apf(uniform_batch(image, 8)), vit(image), atol=1e-5, rtol=0)


def batch_of(seed=0):
    return random_batch(seed, 64, 8, length=25, images=2, classes=1, split=0.35)[0]


@pytest.mark.parametrize("more", [{}, {"pool": "cls"}, {"position": "both"}, {"attention": "packed"}])
@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_padding_has_no_influence(more, garbage):
    torch.manual_seed(0)
    model = build("apf_vit", **{**SLIDES, **more}).eval()
    batch = batch_of()
    clean = model(batch)
    hole = ~batch["valid"]
    assert hole.any()
    dirty = dict(batch)
    dirty["tokens"] = batch["tokens"].masked_fill(hole[:, :, None, None, None], garbage)
    dirty["leaf_xy"] = batch["leaf_xy"].masked_fill(hole[..., None], 17)
    assert torch.equal(model(dirty), clean)
    n = int(batch["valid"].sum(1).max())
    torch.testing.assert_close(model({k: v[:, :n] for k, v in batch.items()}), clean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_order_does_not_matter_but_place_does(pool):
    torch.manual_seed(0)
    model = build("apf_vit", **SLIDES, pool=pool).eval()
    batch = batch_of()
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    shuffled = {k: v[:, order] for k, v in batch.items()}
    torch.testing.assert_close(model(shuffled), model(batch), atol=1e-5, rtol=1e-4)
    moved = {**batch, "leaf_xy": (batch["leaf_xy"] + 8) % 64}
    assert not torch.allclose(model(moved), model(batch), atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_slide_without_any_token_stays_finite(pool):
    batch = batch_of()
    batch["valid"][1] = False
    assert torch.isfinite(build("apf_vit", **SLIDES, pool=pool)(batch)).all()


def test_a_sequence_longer_than_the_slot_table_is_an_error():
    with pytest.raises(ValueError, match="slot table has length=10"):
        build("apf_vit", **{**SLIDES, "length": 10, "position": "slot"})(batch_of())
    with pytest.raises(ValueError, match=r"patch \* 2\^k"):
        build("apf_vit", **{**SLIDES, "size_px": 96})


def test_a_class_token_needs_attention_that_reaches_every_token():
    with pytest.raises(ValueError, match="the class token sees the first window alone: use pool=mean"):
        build("apf_vit", **SLIDES, pool="cls", attention="window", window=8)
    model = build("apf_vit", **SLIDES, pool="mean", attention="window", window=8).eval()
    batch = batch_of()
    for i in range(int(batch["valid"][0].sum())):
        changed = {**batch, "tokens": batch["tokens"].clone()}
        changed["tokens"][0, i] += 1
        assert not torch.equal(model(changed)[0], model(batch)[0]), i
