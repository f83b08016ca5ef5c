"""Effective receptive fields: stacks whose field is known, ways to get a map, GMIC against HCT."""

import math

import pytest
import torch
from torch import nn

from hpc_models import build
from hpc_models.erf import Field, effective_receptive_field, map_of
from hpc_models.hct import GMIC, HCT


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


def test_profiles_and_root_of_a_known_map():
    field = Field(torch.tensor([[0.0, 4.0, 0.0], [1.0, 16.0, 0.0]], dtype=torch.float64), 1)
    assert field.profile_row.tolist() == [4, 17] and field.profile_col.tolist() == [1, 20, 0]
    assert field.square_root().tolist() == [[0, 0.5, 0], [0.25, 1, 0]]
    assert field.support_hw() == (2, 2) and field.share_nonzero() == 0.5
    empty = Field(torch.zeros(2, 3, dtype=torch.float64), 1)
    assert empty.support_hw() == (0, 0) and math.isnan(empty.std_hw()[0]) and not empty.square_root().any()


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
        effective_receptive_field(
            ones_stack(1), [torch.zeros(1, 5, s, dtype=torch.float64) for s in (5, 6)]
        )


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
    gmic = GMIC(strides=(1, 1, 2, 1, 1), normalise=False)
    size = theoretical_field((1, 1, 2, 1, 1))
    assert size == 259
    assert small_field(gmic, 320).support_hw() == (size, size)
    hct = HCT(strides=(1, 1, 2, 1, 1), normalise=False)
    assert small_field(hct, 320).share_nonzero() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 2, 2, 2, 2)])
def test_gmic_at_2048_px_sees_its_theoretical_field(strides):
    torch.manual_seed(0)
    size = theoretical_field(strides)
    assert small_field(GMIC(strides=strides, normalise=False), 2048).support_hw() == (size, size)


@pytest.mark.slow
def test_hct_at_2048_px_sees_the_whole_picture():
    torch.manual_seed(0)
    field = small_field(HCT(normalise=False), 2048)
    assert field.support_hw() == (2048, 2048) and field.share_nonzero() > 0.99
