"""Networks that MONAI has: published counts and costs, and our front end around its Swin UNETR."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.registry import build
from hpc_models.segmentation.swin_unetr import build_net
from hpc_models.tokens.batch import uniform_batch
from tests.helpers.monai_weights import OnPictures

pytest.importorskip("monai", reason="MONAI is the oracle: pip install the test extra")
SMALL = {"classes": 2, "feature_size": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4), "window": 4}


def counted(model, *shape):
    """Parameters and GFLOP on meta."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        answer = model(torch.empty(*shape, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e9, tuple(answer.shape)


@pytest.mark.parametrize(("features", "parameters", "gflop"), [(24, 6_302_875, 36.39), (48, 25_139_275, 142.24)])
def test_swin_unetr_has_the_measured_parameters_and_cost(features, parameters, gflop):
    with torch.device("meta"):
        model = build("swin_unetr", size_px=512, patch=16, length=1024, feature_size=features)
    assert all(p.is_meta for p in model.parameters())
    count, cost, shape = counted(model, 1, 3, 512, 512)
    assert (count, shape) == (parameters, (1, 1, 512, 512)) and cost == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize(
    ("size", "parameters", "gflop"),
    [(224, 87_681_265, 39.88), (256, 87_727_345, 52.65), (512, 88_317_169, 239.60), (1024, 90_676_465, 1422.27)],
)
def test_unetr_grows_by_one_row_per_token(size, parameters, gflop):
    """MONAI's counts, and ours beside them where the frame is a power of two: 14 x 14 tokens have no quadtree."""
    with torch.device("meta"):
        nets = [build_net("UNETR", in_channels=3, out_channels=1, img_size=size, spatial_dims=2, norm_name="instance")]
        if size != 224:
            nets.append(OnPictures(build("unetr", size_px=size, patch=16, length=(size // 16) ** 2)))
    for net in nets:
        count, cost, _ = counted(net, 1, 3, size, size)
        assert count == parameters == 88_317_169 + 768 * ((size // 16) ** 2 - 1024)
        assert cost == pytest.approx(gflop, abs=0.01)


def test_basic_unet_is_near_the_unet_of_2015():
    """MONAI's stand-in has 31,113,217 parameters, our U-Net of 2015 with batch norm 31,037,633."""
    with torch.device("meta"):
        theirs = build_net(
            "BasicUNet", spatial_dims=2, in_channels=3, out_channels=1, features=(64, 128, 256, 512, 1024, 64)
        )
        ours = build("unet", widths=(64, 128, 256, 512, 1024), norm="batch")
    count, cost, _ = counted(theirs, 1, 3, 512, 512)
    assert count == 31_113_217 and cost == pytest.approx(408.96, abs=0.01)
    assert counted(ours, 1, 3, 512, 512)[0] == 31_037_633


def small_volume(**more):
    torch.manual_seed(0)
    return build("swin_unetr", **{"size_px": 64, "patch": 8, "length": 64, **SMALL, **more}).eval()


def test_the_wrapper_adds_only_the_front_end():
    model, image = small_volume(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), model.net((image - 0.5) / 0.5))
        tokens = model(uniform_batch(image, 8))
    torch.testing.assert_close(tokens, uniform_batch(model(image).detach(), 8)["tokens"], atol=1e-5, rtol=0)


def test_sides_that_do_not_divide_by_32_are_padded_by_the_border():
    model, image = small_volume(), torch.rand(1, 3, 70, 50)
    with torch.no_grad():
        logits = model(image)
        wide = torch.nn.functional.pad(image, (0, 14, 0, 26), mode="replicate")
        assert logits.shape == (1, 2, 70, 50)
        torch.testing.assert_close(logits, model(wide)[..., :70, :50])


def test_pictures_of_one_pixel_at_the_bottom_are_refused():
    with pytest.raises(ValueError, match="larger than 32 px, got 32"):
        small_volume(size_px=32, length=16)


def test_without_monai_the_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks", None)
    with pytest.raises(ValueError, match="pip install the extra `monai`"):
        build_net("UNet")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ValueError, match=r"einops is missing\): pip install"):
        build_net("UNet")
