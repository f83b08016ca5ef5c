"""HIRI-ViT against the costs of its Table VII that survive, its strides, its blocks; all configurations are ours."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.classification.hiri_blocks import Downsample, FeedBlock, HRBlock, Stem, TransformerBlock, repeat2
from hpc_models.classification.hiri_vit import PLANS
from hpc_models.registry import build, settings_class


def gmacs(variant: str, side: int) -> float:
    with torch.device("meta"):
        model, image = build("hiri_vit", variant=variant).eval(), torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


def block_macs(block: torch.nn.Module, channels: int, side: int) -> int:
    with FlopCounterMode(display=False) as counter:
        block.to("meta").eval()(torch.zeros(1, channels, side, side, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("row", "published"), [("row6", 4.7), ("row7", 21.5), ("row9", 5.1), ("row10", 5.0)])
def test_costs_of_the_ablation(row, published):
    """Table VII prints one decimal: ours must round to it."""
    assert gmacs(row, PLANS[row].size_px) == pytest.approx(published, abs=0.05)


def test_ratios_of_the_ablation():
    row6, row7, final = gmacs("row6", 224), gmacs("row7", 448), gmacs("s", 448)
    assert 4.52 < row7 / row6 < 4.63
    assert final / row7 == pytest.approx(5.0 / 21.5, rel=0.03)
    assert gmacs("row9", 448) > gmacs("row10", 448)
    assert gmacs("row3", 224) < gmacs("row2", 224)


def test_row_3_has_fewer_weights_than_row_2_and_no_attention_in_stages_1_and_2():
    counts = {row: sum(p.numel() for p in build("hiri_vit", variant=row).parameters()) for row in ("row2", "row3")}
    assert counts["row3"] < counts["row2"]
    assert PLANS["row3"].blocks[:2] == ("cffn", "cffn") and PLANS["row3"].expansions[0] > PLANS["row2"].expansions[0]


@pytest.mark.parametrize("row", ["row1", "row2"])
def test_the_base_model_has_fewer_keys_where_its_maps_are_large(row):
    """Section 5.4: strided convolutions before keys and values in the first two stages, none in the last two."""
    with torch.device("meta"):
        model, keys = build("hiri_vit", variant=row), []
        for stage in model.stages:
            stage[0].attn.kv.register_forward_pre_hook(lambda _m, given: keys.append(given[0].shape[1]))
        model(torch.zeros(1, 3, 224, 224))
    assert keys == [7 * 7, 7 * 7, 14 * 14, 7 * 7]
    assert not any(
        isinstance(m, TransformerBlock) for stage in build("hiri_vit", variant="row3").stages[:2] for m in stage
    )


def test_five_stages_have_strides_4_to_64():
    with torch.device("meta"):
        maps = build("hiri_vit").maps(torch.zeros(1, 3, 448, 448))
    assert [tuple(m.shape[-2:]) for m in maps] == [(s, s) for s in (112, 56, 28, 14, 7)]
    assert [m.shape[1] for m in maps] == list(PLANS["s"].widths)


@pytest.mark.parametrize("side", [224, 384, 448, 768])
def test_every_published_resolution_passes(side):
    with torch.device("meta"):
        assert build("hiri_vit")(torch.zeros(2, 3, side, side)).shape == (2, 1000)


@pytest.mark.parametrize(("channels", "expansion", "side"), [(16, 2, 8), (32, 4, 16)])
def test_two_hr_blocks_against_one_cffn(channels, expansion, side):
    """22.5 C N + 2 E C^2 N against 2 E C^2 N + 9 E C N, with twice the expansion in the HR blocks."""
    n = side * side
    hr = 2 * block_macs(HRBlock(channels, 2 * expansion), channels, side)
    cffn = block_macs(FeedBlock(channels, expansion, True, "bn", "bn"), channels, side)
    assert hr == 22.5 * channels * n + 2 * expansion * channels**2 * n
    assert cffn == 2 * expansion * channels**2 * n + 9 * expansion * channels * n


@pytest.mark.parametrize("side_hw", [(8, 8), (7, 9)])
def test_hr_block_is_the_sum_of_its_branches_and_repeats_the_low_one(side_hw):
    torch.manual_seed(0)
    block = HRBlock(4, 2).eval()
    x = torch.randn(2, 4, *side_hw)
    low = block.low(x)
    assert low.shape[-2:] == tuple((s + 1) // 2 for s in side_hw)
    repeated = low.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., : side_hw[0], : side_hw[1]]
    assert torch.equal(repeat2(low, x.shape[-2:]), repeated)
    torch.testing.assert_close(block(x), x + block.high(x) + repeated)
    # High frequencies pass by the high branch alone: the low one answers the same within each 2 x 2 square.
    even = repeated[..., : side_hw[0] // 2 * 2, : side_hw[1] // 2 * 2]
    assert torch.equal(F.avg_pool2d(even, 2), even[..., ::2, ::2])


@pytest.mark.parametrize("kind", ["conv", "irds_a", "irds_b"])
def test_downsampling_halves_the_side_and_its_shortcut_carries_the_mean(kind):
    torch.manual_seed(0)
    down = Downsample(kind, 4, 6).eval()
    x = torch.randn(1, 4, 9, 8)
    assert down(x).shape == (1, 6, 5, 4)
    if kind != "conv":
        torch.testing.assert_close(down(x) - down.body(x), down.shortcut(x))
    activations = [m for m in down.body if isinstance(m, torch.nn.GELU)]
    norms = [m for layer in down.body.modules() for m in [layer] if isinstance(m, torch.nn.BatchNorm2d)]
    assert (len(activations), len(norms)) == {"conv": (0, 1), "irds_a": (1, 2), "irds_b": (1, 1)}[kind]


def test_hr_stem_has_two_branches_and_wrong_names_are_refused():
    stem = Stem("hr", 3, 8, 16).eval()
    image = torch.randn(1, 3, 32, 32)
    x = stem.body(image)
    torch.testing.assert_close(stem(image), stem.norm(stem.high(x) + stem.low(x)))
    assert stem(image).shape == (1, 16, 8, 8)
    with pytest.raises(ValueError, match="stem must be one of"):
        Stem("patch", 3, 8, 16)
    with pytest.raises(ValueError, match="variant must be one of s, b, l, row1"):
        build("hiri_vit", variant="xl")


def test_norms_are_where_the_paper_puts_them():
    model = build("hiri_vit")
    for i, stage in enumerate(model.stages):
        for block in stage:
            layer = {type(m).__name__ for key, m in block.named_modules() if key in ("norm", "norm1", "norm2")}
            assert layer <= ({"BatchNorm2d"} if i < 3 else {"ChannelNorm"})
            inside = [m for key, m in block.named_modules() if key.startswith("feed.norm")]
            assert all(isinstance(m, torch.nn.BatchNorm2d | torch.nn.Identity) for m in inside)
    assert settings_class("hiri_vit")().reconstruction
