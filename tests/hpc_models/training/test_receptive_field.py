"""Effective receptive fields: stacks whose field is known, ways to get a map, GMIC against HCT."""

import math

import pytest
import torch
from torch import nn

from hpc_models.registry import build
from hpc_models.tokens.batch import uniform_batch
from hpc_models.tokens.geometry import owner_of
from hpc_models.training.receptive_field import Field, effective_receptive_field, map_of, token_field
from tests.helpers.monai_weights import OnPictures
from tests.helpers.trees import painted, random_batch


def ones_stack(n: int) -> nn.Module:
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64) for _ in range(n)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 20])
def test_all_ones_convolutions_have_support_2n_plus_1_and_std_sqrt_2n_over_3(n):
    side = 2 * n + 5
    field = effective_receptive_field(ones_stack(n), [torch.rand(1, side, side, dtype=torch.float64)])
    assert field.support_hw() == (2 * n + 1, 2 * n + 1)
    assert field.share_nonzero() == pytest.approx(((2 * n + 1) / side) ** 2)
    for std in field.std_hw():
        assert std == pytest.approx(math.sqrt(2 * n / 3), abs=1e-6)
    assert float(field.map.sum()) == pytest.approx(9**n, rel=1e-12)
    torch.testing.assert_close(field.profile_row, field.profile_col)
    on = field.profile_row.nonzero()
    assert int(on.min() + on.max()) == 2 * (side // 2)  # around the centre
    if n == 1:
        assert (field.map > 0).sum() == 9 and field.map.max() == 1


def test_profiles_of_a_known_map():
    field = Field(torch.tensor([[0.0, 4.0, 0.0], [1.0, 16.0, 0.0]], dtype=torch.float64), 1)
    assert field.profile_row.tolist() == [4, 17] and field.profile_col.tolist() == [1, 20, 0]
    assert field.support_hw() == (2, 2) and field.share_nonzero() == 0.5
    empty = Field(torch.zeros(2, 3, dtype=torch.float64), 1)
    assert empty.support_hw() == (0, 0) and math.isnan(empty.std_hw()[0])


def test_it_is_the_mean_of_absolute_gradients_and_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))
    model[1].eval()
    images = torch.randn(4, 2, 9, 9)
    field = effective_receptive_field(model, images)
    model.eval()
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for image in images:
        x = image[None].clone().requires_grad_()
        model(x)[0, :, 4, 4].sum().backward()
        expected += x.grad[0].abs().double().sum(0) / 4
        model.zero_grad()
    torch.testing.assert_close(field.map, expected)
    assert field.images == 4
    model.train()
    model[1].eval()
    effective_receptive_field(model, images[:1])
    assert model.training and not model[1].training and model[3].training
    assert all(p.grad is None for p in model.parameters())


def test_maps_of_models_with_and_without_one():
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64)]
    unet = effective_receptive_field(build("unet", classes=2, widths=(4, 8)), images)
    assert unet.map.shape == (64, 64) and unet.map[32, 32] > 0
    vit = build("rivit", depth=2, grid_px=32, conv=False, position="sinusoidal")
    with pytest.raises(ValueError, match=r"RIViT gives \(1, 10\), which is no map of a 64 x 64 picture"):
        effective_receptive_field(vit, images)
    field = effective_receptive_field(vit, images, layer="blocks.1")  # class token, then 16 x 16 patches
    assert field.share_nonzero() > 0.99
    assert map_of(vit, "blocks.1")(images[0][None]).shape == (1, 128, 16, 16)
    assert map_of(vit, "blocks.0")(torch.rand(1, 3, 32, 64)).shape == (1, 128, 8, 16)
    # The first layer's input knows its own patch only.
    assert effective_receptive_field(vit, images, layer="embed").support_hw() == (4, 4)
    with pytest.raises(ValueError, match=r"no layer 'blocks.9' in RIViT; e.g. embed, blocks"):
        map_of(vit, "blocks.9")


def test_pictures_must_be_there_and_of_one_size():
    with pytest.raises(ValueError, match="at least one picture"):
        effective_receptive_field(ones_stack(1), [])
    with pytest.raises(ValueError, match=r"pictures of \(5, 5\) and of \(5, 6\) px"):
        effective_receptive_field(ones_stack(1), [torch.zeros(1, 5, s, dtype=torch.float64) for s in (5, 6)])


UNETR_SIZES = {"size_px": 64, "patch": 8, "width": 24, "depth": 2, "heads": 3, "position": "geom"}


@pytest.mark.parametrize("decoder", ["token", "leaf", "geometric"])
def test_equal_tokens_have_the_field_of_the_picture(decoder):
    torch.manual_seed(0)
    model = build("unetr", **UNETR_SIZES, length=64, decoder=decoder, feature_size=4)
    images = torch.rand(2, 3, 64, 64)
    expected = effective_receptive_field(OnPictures(model), images)
    found = token_field(model, [uniform_batch(image[None], 8) for image in images], 64, 64)
    torch.testing.assert_close(found.map, expected.map, atol=1e-7, rtol=1e-4)
    assert found.images == 2 and found.pixel_px == 1
    coarse = token_field(model, [uniform_batch(image[None], 8) for image in images], 64, 16)
    torch.testing.assert_close(coarse.map, nn.functional.avg_pool2d(expected.map[None], 4)[0], atol=1e-7, rtol=1e-4)
    assert coarse.pixel_px == 4 and coarse.support_hw() == (64, 64)


def test_a_leafs_gradient_is_shared_by_its_pixels():
    """A frame pixel moves its cell by one over the cell's pixels; without attention only the centre's leaf counts."""
    batch, _, _ = random_batch(3, 64, 8, images=1, split=0.35)
    torch.manual_seed(0)
    model = build("unetr", **UNETR_SIZES, length=batch["tokens"].shape[1], decoder="token").eval()
    whole = token_field(model, [batch], 64, 64)
    tokens = batch["tokens"].clone().requires_grad_()
    row = int(owner_of(torch.tensor([[32, 32]]), batch["leaf_xy"], batch["leaf_size"], batch["valid"])[0, 0])
    (x, y), side = batch["leaf_xy"][0, row].tolist(), int(batch["leaf_size"][0, row])
    assert side > 8, "a leaf that was made smaller"
    logits = model({**batch, "tokens": tokens})[0, row, (32 - y) * 8 // side, (32 - x) * 8 // side]
    (gradient,) = torch.autograd.grad(logits.sum(), tokens)
    values = gradient.abs().sum(-1, keepdim=True)
    cells = painted(values[0].numpy() / (batch["leaf_size"][0, :, None, None, None].numpy() / 8) ** 2, batch, 0, 64)
    torch.testing.assert_close(whole.map, torch.from_numpy(cells)[..., 0].double(), atol=1e-7, rtol=1e-4)
    assert float(whole.map.sum()) == pytest.approx(float(values.sum()), rel=1e-4)
    with torch.no_grad():
        for block in model.vit.blocks:
            block.attn.out_proj.weight.zero_()
    alone = token_field(model, [batch], 64, 64)
    assert alone.support_hw() == (side, side) and (alone.map[y : y + side, x : x + side] > 0).all()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_classifier_of_tokens_needs_a_layer(pool):
    batch, _, _ = random_batch(3, 64, 8, length=30, images=1, split=0.35)
    torch.manual_seed(0)
    model = build("apf_vit", **UNETR_SIZES, length=30, pool=pool)
    with pytest.raises(ValueError, match=r"APFViT gives \(1, 2\), no answer per token; name a layer"):
        token_field(model, [batch], 64, 64)
    first = token_field(model, [batch], 64, 64, "embed")  # a token's own pixels
    row = int(owner_of(torch.tensor([[32, 32]]), batch["leaf_xy"], batch["leaf_size"], batch["valid"])[0, 0])
    assert first.support_hw() == (int(batch["leaf_size"][0, row]),) * 2
    assert token_field(model, [batch], 64, 64, "body.vit.blocks.1").share_nonzero() > 0.99
    batch["valid"][0, row] = False
    with pytest.raises(ValueError, match="no token covers the centre"):
        token_field(model, [batch], 64, 64, "embed")


def theoretical_field(strides: tuple[int, ...]) -> int:
    """Pixels that one place of GMIC's map can see: kernel by kernel, 1 + sum of (k - 1) times the stride so far."""
    size, jump = 1, 1
    kernels = [(7, 2), (3, 2)]
    for stride in strides:
        kernels += [(3, stride), (3, 1), (3, 1), (3, 1)]
    for kernel, stride in kernels:
        size += (kernel - 1) * jump
        jump *= stride
    return size


def test_theoretical_field_of_gmic():
    assert theoretical_field((2, 2, 2, 2, 2)) == 1747 and theoretical_field((1, 2, 2, 2, 2)) == 883


def small_field(model: nn.Module, side: int) -> Field:
    torch.manual_seed(0)
    return effective_receptive_field(model, [torch.randn(1, side, side)])


def test_gmic_sees_its_theoretical_field_and_hct_all_of_the_picture():
    torch.manual_seed(0)
    gmic = build("gmic", strides=(1, 1, 2, 1, 1), normalise=False)
    size = theoretical_field((1, 1, 2, 1, 1))
    assert size == 259
    assert small_field(gmic, 320).support_hw() == (size, size)
    hct = build("hct", strides=(1, 1, 2, 1, 1), normalise=False)
    assert small_field(hct, 320).share_nonzero() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 2, 2, 2, 2)])
def test_gmic_at_2048_px_sees_its_theoretical_field(strides):
    torch.manual_seed(0)
    size = theoretical_field(strides)
    assert small_field(build("gmic", strides=strides, normalise=False), 2048).support_hw() == (size, size)


@pytest.mark.slow
def test_hct_at_2048_px_sees_the_whole_picture():
    torch.manual_seed(0)
    field = small_field(build("hct", normalise=False), 2048)
    assert field.support_hw() == (2048, 2048) and field.share_nonzero() > 0.99
