"""UNETR against MONAI's, published parameter counts, costs, and uniform tokens against whole images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from data_prep.tokens.paper_sequences import pack_strip, unpack_strip
from hpc_models.blocks.conv import StdConv2d
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.registry import build
from hpc_models.segmentation.leaf_cnn import leaf_widths
from hpc_models.segmentation.leaf_unet import LeafConv
from hpc_models.tokens.batch import uniform_batch
from hpc_models.tokens.layout import leaves_to_strip, strip_to_leaves
from tests.helpers.monai_weights import OnPictures, load_monai_unetr
from tests.helpers.trees import random_batch


def reference(size, **more):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is the oracle: pip install the test extra")
    torch.manual_seed(1)
    return nets.UNETR(in_channels=3, out_channels=1, img_size=size, spatial_dims=2, norm_name="instance", **more).eval()


def ours(size, decoder="raster", **more):
    length = (size // 16) ** 2
    return build("unetr", size_px=size, patch=16, length=length, decoder=decoder, normalise=False, **more).eval()


SMALL = {"width": 24, "depth": 12, "heads": 3, "mlp_dim": 40, "feature_size": 4}
SMALL_MONAI = {"hidden_size": 24, "mlp_dim": 40, "num_heads": 3, "feature_size": 4}


@pytest.mark.parametrize("decoder", ["raster", "geometric"])
def test_small_unetr_equals_monai(decoder):
    theirs, mine = reference(64, **SMALL_MONAI), ours(64, decoder, **SMALL)
    load_monai_unetr(mine, theirs.state_dict())
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(image)
        torch.testing.assert_close(OnPictures(mine)(image), expected, atol=1e-5, rtol=0)
        tokens = mine(uniform_batch(image, 16))
    painted = uniform_batch(expected, 16)["tokens"]
    torch.testing.assert_close(tokens, painted, atol=1e-5, rtol=0)


def test_gradients_equal_monai():
    theirs, mine = reference(32, **SMALL_MONAI).train(), ours(32, **SMALL).train()
    load_monai_unetr(mine, theirs.state_dict())
    image = torch.rand(1, 3, 32, 32)
    theirs(image).square().mean().backward()
    OnPictures(mine)(image).square().mean().backward()
    a, b = theirs.vit.blocks[0].attn.qkv.weight.grad, mine.vit.blocks[0].attn.qkv.weight.grad
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    a, b = (
        theirs.encoder2.blocks[1][1].conv1.conv.weight.grad,
        mine.decoder.projections[0].steps[1][1].conv1.weight.grad,
    )
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.slow  # small ones are held against MONAI above, and the counts of this one below
def test_full_size_unetr_equals_monai():
    theirs, mine = reference(512), ours(512)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters()) == 88_317_169
    load_monai_unetr(mine, theirs.state_dict())
    image = torch.rand(1, 3, 512, 512)
    with torch.no_grad():
        torch.testing.assert_close(OnPictures(mine)(image), theirs(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("patch", "parameters", "gflop"),
    [
        (4, 97_905_905, 12695.9),
        (8, 89_023_729, 1335.7),
        (16, 88_317_169, 239.604),
        (32, 93_181_169, 79.36),
        (64, 112_512_241, 51.46),
    ],
)
def test_parameters_and_cost_for_every_patch_size(patch, parameters, gflop):
    with torch.device("meta"):
        model = build("unetr", size_px=512, patch=patch, length=(512 // patch) ** 2)
        image = torch.empty(1, 3, 512, 512)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert OnPictures(model)(image).shape == (1, 1, 512, 512)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.parametrize(
    ("patch", "parameters", "gflop"),
    [
        (4, 97_667_328, 12679.95),
        (8, 88_340_736, 1315.47),
        (16, 86_423_808, 213.81),
        (32, 87_603_456, 47.11),
        (64, 94_533_888, 12.23),
    ],
)
def test_the_encoder_alone_is_vit_b_for_every_patch_size(patch, parameters, gflop):
    """Weights and cost of MONAI's ViT on 512 px; the cost is 12 (24 N D^2 + 4 N^2 D) + 2 N D c P^2 to the last one."""
    n, d = (512 // patch) ** 2, 768
    with torch.device("meta"):
        model = build("unetr", size_px=512, patch=patch, length=n)
        tokens = torch.empty(1, n, patch, patch, 3)
    parts = (model.embed, model.position, model.vit)
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vit(model.embed(tokens))
    assert counter.get_total_flops() == 12 * (24 * n * d**2 + 4 * n**2 * d) + 2 * n * d * 3 * patch**2
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.01)


@pytest.mark.parametrize("decoder", ["raster", "geometric", "token", "leaf", "leaf_unet"])
def test_cost_of_token_sets_can_be_counted_on_meta(decoder):
    with torch.device("meta"):
        model = build("unetr", size_px=512, patch=16, length=1024, decoder=decoder, position="geom", width=192, heads=6)
        batch = uniform_batch(torch.empty(2, 3, 512, 512), 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(batch).shape == (2, 1024, 16, 16, 1)
    tokens, width = 1024, 192
    assert counter.get_total_flops() > 2 * 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)


def test_encoder_cost_formula():
    tokens, width, depth = 100, 48, 5
    with torch.device("meta"):
        encoder, x = ViTEncoder(width, depth, 4, 4 * width), torch.empty(1, tokens, width)
    with FlopCounterMode(display=False) as counter:
        encoder(x)
    assert counter.get_total_flops() == depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


def assert_order_does_not_matter(model, image, patch):
    """Uniform tokens in any order give what the whole image gives."""
    batch = uniform_batch(image, patch)
    order = torch.randperm(batch["valid"].shape[1], generator=torch.Generator().manual_seed(3))
    shuffled = {key: value[:, order] for key, value in batch.items()}
    expected = uniform_batch(OnPictures(model)(image), patch)["tokens"][:, order]
    torch.testing.assert_close(model(shuffled), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", ["raster", "geometric", "token", "leaf", "leaf_unet"])
@pytest.mark.parametrize("patch", [2, 4, 16, 32])
def test_uniform_tokens_in_any_order_give_the_whole_image_result(decoder, patch):
    size = 4 * patch
    torch.manual_seed(0)
    model = build(
        "unetr",
        size_px=size,
        patch=patch,
        length=16,
        decoder=decoder,
        position="both",
        width=24,
        depth=6,
        heads=3,
        feature_size=4,
        halo=1 if decoder == "leaf" else 0,
    ).eval()
    assert_order_does_not_matter(model, torch.rand(2, 3, size, size), patch)


def test_geometric_with_a_coarser_grid_agrees_with_itself():
    torch.manual_seed(0)
    model = build(
        "unetr", size_px=64, patch=8, length=64, decoder="geometric", grid=4, width=24, depth=3, heads=3
    ).eval()
    assert_order_does_not_matter(model, torch.rand(1, 3, 64, 64), 8)


def test_raster_block_i_belongs_to_token_i():
    """With instance norm and 3x3 convolutions taken out of play, block i depends on token i alone."""
    torch.manual_seed(0)
    model = build(
        "unetr",
        size_px=64,
        patch=8,
        length=16,
        decoder="raster",
        position="none",
        width=24,
        depth=2,
        heads=3,
        feature_size=4,
    ).eval()
    with torch.no_grad():
        for block in model.vit.blocks:
            block.attn.out_proj.weight.zero_()  # tokens do not mix
    for module in model.modules():
        if isinstance(module, torch.nn.InstanceNorm2d):
            module.forward = lambda x: x
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.data[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    batch = {
        "tokens": torch.rand(1, 16, 8, 8, 3),
        "leaf_xy": torch.zeros(1, 16, 2, dtype=torch.int64),
        "leaf_size": torch.full((1, 16), 8),
        "valid": torch.ones(1, 16, dtype=torch.bool),
    }
    before = model(batch)
    for i in (0, 5, 15):
        changed = dict(batch, tokens=batch["tokens"].clone())
        changed["tokens"][0, i] = torch.rand(8, 8, 3)
        moved = (model(changed) - before).abs().amax((2, 3, 4))[0] > 1e-6
        assert moved.nonzero()[:, 0].tolist() == [i]


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32, 64])
def test_leaf_network_for_every_patch_size(patch):
    widths = leaf_widths(patch)
    bottleneck = patch >> (len(widths) - 1)
    assert bottleneck == {2: 1, 4: 1, 8: 2, 16: 4, 32: 4, 64: 8}[patch]
    model = build("unetr", size_px=2 * patch, patch=patch, length=4, decoder="leaf", width=24, depth=2, heads=3)
    assert model(uniform_batch(torch.rand(1, 3, 2 * patch, 2 * patch), patch)).shape == (1, 4, patch, patch, 1)


def test_leaf_model_of_the_demo_has_about_two_and_a_half_million_parameters():
    with torch.device("meta"):
        model = build(
            "unetr", size_px=1024, patch=16, length=256, decoder="leaf", position="geom", width=192, depth=4, heads=6
        )
    assert 2.3e6 < sum(p.numel() for p in model.parameters()) < 2.6e6


@given(leaves=st.lists(st.integers(0, 20), min_size=1, max_size=3), p=st.sampled_from([1, 2, 4]))
def test_leaves_are_mixed_as_by_the_authors_reshape_and_put_back(leaves, p):
    length = max([1, *leaves])
    whole = np.random.default_rng(0).random((len(leaves), length, p, p, 2))
    packed = whole.copy()
    for image, n in enumerate(leaves):
        if n:
            packed[image, :n] = pack_strip(whole[image, :n])
            np.testing.assert_array_equal(unpack_strip(packed[image, :n]), whole[image, :n])
    valid = torch.arange(length) < torch.tensor(leaves)[:, None]
    np.testing.assert_array_equal(leaves_to_strip(torch.from_numpy(whole), valid), packed)
    np.testing.assert_array_equal(strip_to_leaves(torch.from_numpy(packed), valid), whole)


@pytest.mark.parametrize("decoder", ["raster", "token"])
def test_mixed_leaves_go_in_and_the_answer_is_put_back(decoder):
    """As if image and mask had been packed alike and compared in that order."""
    batch, *_ = random_batch(3, 64, 8, length=36)
    size = {"size_px": 64, "patch": 8, "length": 36, "width": 24, "depth": 4, "heads": 2, "feature_size": 4}
    torch.manual_seed(0)
    model = build("unetr", decoder=decoder, **size).eval()
    strip = build("unetr", decoder=decoder, packing="strip", **size).eval()
    strip.load_state_dict(model.state_dict())
    rows = [int(n) for n in batch["valid"].sum(1)]
    assert min(rows) < 36
    packed, mask = batch["tokens"].clone(), batch["mask_counts"].clone()
    for image, n in enumerate(rows):
        for whole in (packed, mask):
            whole[image, :n] = torch.from_numpy(pack_strip(whole[image, :n].numpy()))
    with torch.no_grad():
        theirs, mine, leaf = model({**batch, "tokens": packed}), strip(batch), model(batch)
    valid = batch["valid"]
    truth = batch["mask_counts"]
    pairs = ((theirs, mask), (mine, truth), (leaf, truth))
    errors = [(out - wanted)[valid].flatten().sort().values for out, wanted in pairs]
    torch.testing.assert_close(errors[1], errors[0], rtol=0, atol=0)
    assert not torch.allclose(errors[1], errors[2])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"packing": "rows"}, "packing must be one of leaf, strip, got 'rows'"),
        ({"packing": "strip", "length": 64}, "length must be less than .* = 64"),
        ({"packing": "strip", "decoder": "leaf"}, "decoder must be raster or token"),
        ({"packing": "strip", "position": "both"}, "position slot or none"),
        ({"standardise": True, "decoder": "leaf"}, "standardise=True is for decoder leaf_unet, got leaf"),
    ],
)
def test_packings_and_filters_that_cannot_be_are_refused(more, why):
    with pytest.raises(ValueError, match=why):
        build("unetr", **{"size_px": 64, "patch": 8, "length": 36, "width": 24, "heads": 2, **more})


def test_standardised_filters_are_in_the_whole_of_the_leaf_unet():
    size = {"size_px": 64, "patch": 8, "length": 36, "width": 24, "depth": 1, "heads": 2, "decoder": "leaf_unet"}
    plain, standard = (build("unetr", standardise=on, **size) for on in (False, True))
    found = [[type(m.conv) for m in model.modules() if isinstance(m, LeafConv)] for model in (plain, standard)]
    assert len(found[0]) == len(found[1]) == 14
    assert set(found[0]) == {torch.nn.Conv2d} and set(found[1]) == {StdConv2d}
