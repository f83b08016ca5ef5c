"""HIPT: published counts and costs of its levels, its real input on meta, the order of squares on small pictures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.classification.hipt import GatedPool
from hpc_models.registry import build
from hpc_models.tokens.batch import uniform_batch

SMALL = {
    "classes": 3,
    "scales": (4, 16, 64),
    "widths": (24, 16),
    "depths": (2, 2, 2),
    "heads": (3, 2, 2),
    "table_side": 3,
}


def gflop(module, *inputs):
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 1e9


def test_published_parameters_and_costs_of_the_levels():
    with torch.device("meta"):
        model = build("hipt", classes=4)
        squares, vectors = torch.empty(1, 256, 256, 3), torch.empty(1, 256, 384)
    assert sum(p.numel() for p in model.squares.parameters()) == 21_665_664
    assert sum(p.numel() for p in model.regions.parameters()) == 2_781_504
    assert gflop(model.squares, squares) == pytest.approx(12.28, abs=0.005)
    assert gflop(model.regions, vectors, 16) == pytest.approx(1.706, abs=0.001)
    d = 192
    layer = 4 * d * d + 4 * d + 2 * (d * d + d) + 4 * d
    pool = 2 * (d * d + d) + d + 1
    assert sum(p.numel() for p in model.slide.parameters()) == 2 * (d * d + d) + 2 * layer + pool + 4 * d + 4


def test_real_regions_have_256_squares_and_cost_what_the_levels_cost():
    with torch.device("meta"):
        model = build("hipt")
        image = torch.empty(1, 3, 4096, 8192)
        levels = 2 * (256 * gflop(model.squares, torch.empty(1, 256, 256, 3)))
        levels += 2 * gflop(model.regions, torch.empty(1, 256, 384), 16) + gflop(model.slide, torch.empty(1, 2, 192))
        assert model(image).shape == (1, 2)
    assert gflop(model, image) == pytest.approx(levels, rel=1e-9)


def test_gated_pool_by_hand():
    torch.manual_seed(0)
    pool, x = GatedPool(6, 0.0), torch.randn(2, 5, 6)
    for b in range(2):
        scores = torch.stack([pool.score(pool.tanh(h).tanh() * pool.gate(h).sigmoid())[0] for h in x[b]])
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(pool(x)[b], sum(w * h for w, h in zip(weights, x[b], strict=True)))


def test_tokens_in_any_order_give_what_the_picture_gives():
    torch.manual_seed(0)
    model = build("hipt", size_px=128, patch=16, length=64, **SMALL).eval()
    image = torch.rand(2, 3, 128, 128)
    expected = model(image)
    batch = uniform_batch(image, 16)
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model({k: v[:, order] for k, v in batch.items()}), expected, atol=1e-5, rtol=0)


def test_regions_are_a_set_and_squares_have_their_place():
    torch.manual_seed(0)
    model = build("hipt", **SMALL).eval()
    image = torch.rand(1, 3, 64, 192)
    swapped = torch.cat((image[..., 128:], image[..., 64:128], image[..., :64]), dim=-1)
    torch.testing.assert_close(model(swapped), model(image), atol=1e-5, rtol=0)
    inside = torch.cat((image[..., 16:32], image[..., :16], image[..., 32:]), dim=-1)
    assert not torch.allclose(model(inside), model(image), atol=1e-6)


def test_a_square_reaches_level_one_as_it_lies_in_the_picture():
    """Vectors of level 1, computed square by square from the picture, are those that level 2 gets."""
    torch.manual_seed(0)
    model = build("hipt", **SMALL).eval()
    image = torch.rand(1, 3, 64, 64)
    seen = []
    model.regions.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    model(image)
    z = (image - 0.5) / 0.5
    for row in range(4):
        for col in range(4):
            square = z[0, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16].permute(1, 2, 0)
            torch.testing.assert_close(seen[0][0, 4 * row + col], model.squares(square[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": (4, 18, 64)}, "scales must divide each other"),
        ({"size_px": 128, "patch": 8, "length": 256}, "uniform tokens of 16 px, 64 of them at 128 px; got patch 8"),
        ({"size_px": 128, "patch": 16, "length": 49}, "got patch 16 and length 49"),
        ({"size_px": 32, "patch": 16, "length": 4}, "not a multiple of the region"),
        ({"image_hw": (64, 100)}, "64x100 are no multiples of the region of 64 px"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        build("hipt", **{**SMALL, **wrong})
