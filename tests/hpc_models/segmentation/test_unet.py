"""U-Net of 2015 and sliding windows."""

import pytest
import torch
from torch import nn

from hpc_models.blocks.conv import StdConv2d
from hpc_models.registry import build
from hpc_models.segmentation.sliding_window import sliding_window
from hpc_models.segmentation.unet import DoubleConv
from hpc_models.tokens.batch import uniform_batch


def test_unet_of_2015_has_the_published_parameters():
    with torch.device("meta"):
        model = build("unet", in_channels=1, classes=2, widths=(64, 128, 256, 512, 1024), norm="none")
        assert sum(p.numel() for p in model.parameters()) == 31_030_658
        assert model.forward_image(torch.empty(1, 1, 96, 80)).shape == (1, 2, 96, 80)


@pytest.mark.parametrize(
    ("channels", "norm", "parameters"), [(3, "none", 31_031_745), (3, "batch", 31_037_633), (3, "instance", 31_037_633)]
)
def test_parameters_with_colour_and_norms(channels, norm, parameters):
    with torch.device("meta"):
        model = build("unet", in_channels=channels, classes=1, widths=(64, 128, 256, 512, 1024), norm=norm)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
def test_a_level_is_what_plain_torch_makes_of_it(norm):
    torch.manual_seed(0)
    level = DoubleConv(3, 6, norm)
    x = torch.randn(2, 3, 9, 7)
    layers = {"none": nn.Identity, "batch": nn.BatchNorm2d, "instance": lambda c: nn.InstanceNorm2d(c, affine=True)}
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=norm == "none"),
        layers[norm](6) if norm != "none" else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=norm == "none"),
        layers[norm](6) if norm != "none" else nn.Identity(),
        nn.ReLU(),
    )
    assert len(list(plain.parameters())) == len(list(level.parameters()))
    with torch.no_grad():
        for theirs, mine in zip(plain.parameters(), level.parameters(), strict=True):
            theirs.copy_(mine)
    torch.testing.assert_close(level(x), plain(x), atol=1e-6, rtol=0)


def test_scale_and_offset_of_standardised_filters_do_not_matter():
    """The norms forget a filter's scale anyway; its offset (a blur of all channels) only where it is standardised."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 32, 32)
    for standardise in (True, False):
        model = build("unet", widths=(4, 8), standardise=standardise).eval()
        convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convs) == 6 and all(isinstance(m, StdConv2d) is standardise for m in convs)
        with torch.no_grad():
            before = model(image)
            for conv in convs:
                conv.weight.mul_(5).add_(1)
            assert torch.allclose(model(image), before, atol=2e-2) is standardise


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (16, 1), (65, 31)])
def test_any_size_goes_in_and_comes_out(size):
    model = build("unet", widths=(4, 8, 16, 32), classes=2).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 2, *size)


def test_tiles_are_images_of_their_own():
    torch.manual_seed(0)
    model = build("unet", widths=(4, 8, 16)).eval()
    image = torch.rand(1, 3, 64, 64)
    batch = uniform_batch(image, 32)
    logits = model(batch)
    for i, (x, y) in enumerate(batch["leaf_xy"][0].tolist()):
        alone = model(image[:, :, y : y + 32, x : x + 32])
        torch.testing.assert_close(logits[0, i, :, :, 0], alone[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [40, 53, 64, 1000])
def test_a_window_as_large_as_the_image_is_one_forward_pass(window):
    model = build("unet", widths=(4, 8)).eval()
    image = torch.rand(3, 40, 33)
    expected = model(image[None])[0].detach()
    assert torch.equal(sliding_window(model, image, window), expected)


class Constant(nn.Module):
    """Logits that do not depend on the input."""

    def forward(self, x):
        return torch.tensor([1.5, -2.0])[None, :, None, None].expand(x.shape[0], 2, *x.shape[2:])


class Pointwise(nn.Module):
    """Logit = first channel, so that the result must be the image itself."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        return x[:, :1]


@pytest.mark.parametrize("size", [(64, 64), (37, 101), (5, 40), (17, 16)])
@pytest.mark.parametrize("window", [16, 17])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("weighting", ["gaussian", "constant"])
def test_windows_cover_everything_and_average_to_what_they_agree_on(size, window, overlap, weighting):
    image = torch.rand(3, *size)
    constant = sliding_window(Constant(), image, window, overlap, batch=3, weighting=weighting)
    torch.testing.assert_close(constant, Constant()(image[None])[0], atol=1e-5, rtol=0)
    model = Pointwise()
    torch.testing.assert_close(
        sliding_window(model, image, window, overlap, batch=3, weighting=weighting), image[:1], atol=1e-5, rtol=0
    )
    assert all(n <= 3 and (h, w) == (min(window, size[0]), min(window, size[1])) for n, _, h, w in model.sizes)


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_windows_without_wanted_pixels_are_left_out_and_change_nothing_elsewhere(overlap):
    image, wanted = torch.rand(3, 64, 80), torch.zeros(64, 80, dtype=torch.bool)
    wanted[5:20, 30:33], wanted[63, 79] = True, True
    model = build("unet", widths=(4, 8)).eval()
    some, every = Pointwise(), Pointwise()
    sliding_window(some, image, 16, overlap, batch=1, wanted=wanted)
    sliding_window(every, image, 16, overlap, batch=1)
    assert 4 <= len(some.sizes) < len(every.sizes) / 2
    found = sliding_window(model, image, 16, overlap, wanted=wanted)
    whole = sliding_window(model, image, 16, overlap)
    torch.testing.assert_close(found[:, wanted], whole[:, wanted], atol=1e-6, rtol=0)
    assert found.isfinite().all() and not found[:, :2, :2].any()
    assert sliding_window(model, image, 16, overlap, wanted=torch.zeros_like(wanted)).isfinite().all()


def test_gaussian_trusts_the_middle_of_a_window():
    class Border(nn.Module):
        def forward(self, x):
            z = torch.zeros_like(x[:, :1])
            z[..., 0], z[..., -1] = 1, 1
            return z

    image = torch.zeros(3, 16, 48)
    soft = sliding_window(Border(), image, 16, 0.5)[0, 8, 1:-1]
    hard = sliding_window(Border(), image, 16, 0.5, weighting="constant")[0, 8, 1:-1]
    assert soft.max() < 0.1 < 0.4 < hard.max()


def test_wrong_arguments_are_refused():
    image = torch.rand(3, 32, 32)
    with pytest.raises(ValueError, match="overlap"):
        sliding_window(Constant(), image, 16, 1.0)
    with pytest.raises(ValueError, match="weighting"):
        sliding_window(Constant(), image, 16, weighting="hann")
    with pytest.raises(ValueError, match="norm must be one of"):
        build("unet", norm="layer")
    with pytest.raises(ValueError, match="standardise=True needs a norm"):
        build("unet", norm="none", standardise=True)
    with pytest.raises(ValueError, match="two levels"):
        build("unet", widths=(8,))
