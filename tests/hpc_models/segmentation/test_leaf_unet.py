"""The U-Net over leaves: on uniform leaves a U-Net of the picture; on trees the ring is checked cell by cell."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hpc_models.blocks.conv import StdConv2d
from hpc_models.segmentation.leaf_unet import (
    LeafConv,
    LeafUNetDecoder,
    LeafUNetEncoder,
    Seams,
    leaf_unet_widths,
    surround,
)
from hpc_models.segmentation.settings import UNETRSettings
from hpc_models.settings import DataShape
from hpc_models.tokens.batch import join_patches, uniform_batch
from hpc_models.tokens.geometry import ring_cells, ring_steps
from tests.helpers.trees import random_batch


def uniform(r, p, images=2):
    torch.manual_seed(1)
    image = torch.rand(images, 3, r, r, dtype=torch.float64)
    return image, uniform_batch(image.float(), p)


def whole(features, images, cells):
    """(M, C, q, q) of uniform leaves in Morton order to the picture (B, C, cells q, cells q)."""
    batch = uniform_batch(torch.zeros(images, 3, cells, cells), 1)
    place = batch["leaf_xy"][0, :, 1] * cells + batch["leaf_xy"][0, :, 0]
    rows = features.permute(0, 2, 3, 1).unflatten(0, (images, -1))
    return join_patches(rows[:, torch.argsort(place)], cells, cells)


def picture_conv(conv, x):
    """What a LeafConv and its ReLU do, on a picture."""
    weight = conv.conv.weight
    if isinstance(conv.conv, StdConv2d):
        weight = torch.stack([(w - w.mean()) / (w.var(unbiased=False) + 1e-5).sqrt() for w in weight])
    y = F.conv2d(x, weight, padding=1)
    return F.relu(F.instance_norm(y, weight=conv.weight, bias=conv.bias))


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_ring_holds_the_cells_that_cover_its_centres(seed, side, padded):
    batch, _, _ = random_batch(seed, 64, 8, images=2, split=0.5)
    valid = batch["valid"] if padded else None
    if not padded:  # the rows that both trees have, as if they were all there is
        n = int(batch["valid"].sum(1).min())
        batch = {key: value[:, :n] for key, value in batch.items()}
    other, found = ring_cells(batch["leaf_xy"], batch["leaf_size"], valid, 64, [2, side])
    assert other.shape == (len(found), 12)
    steps, _ = ring_steps(side)
    leaves = [
        (b, *batch["leaf_xy"][b, i].tolist(), int(batch["leaf_size"][b, i]))
        for b in range(2)
        for i in range(batch["valid"].shape[1])
        if batch["valid"][b, i]
    ]
    assert found.shape == (len(leaves), 4 * side + 4)
    for row, (b, x, y, size) in enumerate(leaves):
        for slot, (i, j) in enumerate(steps.tolist()):
            px, py = x + (2 * i + 1) * size // (2 * side), y + (2 * j + 1) * size // (2 * side)
            expected = -1
            for other, (b2, x2, y2, size2) in enumerate(leaves):
                if b2 == b and x2 <= px < x2 + size2 and y2 <= py < y2 + size2:
                    expected = (other * side + (py - y2) * side // size2) * side + (px - x2) * side // size2
            assert found[row, slot] == expected


def test_convolution_of_uniform_leaves_is_that_of_the_picture():
    image, batch = uniform(32, 8)
    torch.manual_seed(0)
    conv = LeafConv(3, 5)
    torch.nn.init.normal_(conv.bias)
    seams = Seams(batch["leaf_xy"], batch["leaf_size"], None, 32, [8])
    got = F.relu(conv(surround(batch["tokens"].flatten(0, 1).permute(0, 3, 1, 2), seams), seams))
    torch.testing.assert_close(whole(got, 2, 4), picture_conv(conv, image.float()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("standardise", [False, True])
def test_encoder_and_decoder_of_uniform_leaves_are_a_unet_of_the_picture(standardise):
    p, r = 16, 64
    image, batch = uniform(r, p)
    torch.manual_seed(0)
    widths = leaf_unet_widths(p, 4)
    assert widths == (4, 4, 8, 16)
    settings = UNETRSettings(width=24, leaf_base=4, decoder="leaf_unet", standardise=standardise)
    data = DataShape(patch=p, classes=2)
    encoder, decoder = LeafUNetEncoder(settings, data), LeafUNetDecoder(settings, data)
    convs = [m.conv for part in (encoder, decoder) for m in part.modules() if isinstance(m, LeafConv)]
    assert len(convs) == 14 and all(isinstance(conv, StdConv2d) is standardise for conv in convs)
    torch.nn.init.zeros_(decoder.project.weight)  # the token says nothing: what is left is a plain U-Net
    seams = Seams(batch["leaf_xy"], batch["leaf_size"], None, r, [16, 8, 4, 2])
    token, levels = encoder(batch["tokens"].flatten(0, 1).permute(0, 3, 1, 2), seams)
    logits = decoder(token, levels, seams)

    def double(block, x):
        return picture_conv(block.conv2, picture_conv(block.conv1, x))

    x, skips = image.float(), []
    for i, block in enumerate(encoder.blocks):
        x = double(block, F.max_pool2d(x, 2) if i else x)
        skips.append(x)
    for got, expected in zip(levels, skips, strict=True):
        torch.testing.assert_close(whole(got, 2, 4), expected, atol=1e-4, rtol=1e-3)
    for up, block, skip in zip(decoder.ups, decoder.blocks, skips[-2::-1], strict=True):
        x = double(block, torch.cat((skip, up(x)), 1))
    torch.testing.assert_close(whole(logits, 2, 4), decoder.out(x), atol=1e-3, rtol=1e-3)


def test_without_seams_every_leaf_lies_in_zeros():
    _, batch = uniform(32, 8, images=1)
    x = batch["tokens"].flatten(0, 1).permute(0, 3, 1, 2)
    alone = surround(x, Seams(batch["leaf_xy"], batch["leaf_size"], None, 32, [8], across=False))
    joined = surround(x, Seams(batch["leaf_xy"], batch["leaf_size"], None, 32, [8]))
    assert torch.equal(alone, F.pad(x, (1, 1, 1, 1)))
    assert torch.equal(alone[:, :, 1:-1, 1:-1], joined[:, :, 1:-1, 1:-1])
    assert not torch.equal(alone, joined)


@pytest.mark.parametrize("relu", [False, True])
def test_gradient_of_the_ring(relu):
    batch, _, _ = random_batch(3, 32, 8, images=2, split=0.4)
    seams = Seams(batch["leaf_xy"], batch["leaf_size"], batch["valid"], 32, [2])
    x = torch.randn(sum(seams.counts), 2, 2, 2, dtype=torch.float64, requires_grad=True)
    beside = torch.randn(sum(seams.counts), 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: surround(x, seams, relu=relu), (x,))
    assert torch.autograd.gradcheck(lambda x, beside: surround(x, seams, beside, relu), (x, beside))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joining_and_relu_on_the_way(across, dtype):
    batch, _, _ = random_batch(5, 64, 8, images=2, split=0.5)
    seams = Seams(batch["leaf_xy"], batch["leaf_size"], batch["valid"], 64, [4], across)
    torch.manual_seed(0)
    x, beside = torch.randn(sum(seams.counts), 3, 4, 4), torch.randn(sum(seams.counts), 5, 4, 4).to(dtype)
    joined = surround(F.relu(torch.cat((x, beside), dim=1)), seams)
    assert torch.equal(surround(x, seams, beside, relu=True), joined)
    assert joined.dtype == torch.float32  # the wider of the two, as torch.cat has it


def test_a_single_cell_is_normalised_to_the_bias():
    conv = LeafConv(3, 4)
    torch.nn.init.normal_(conv.bias)
    one = Seams(torch.zeros(1, 1, 2, dtype=torch.int64), torch.full((1, 1), 8), None, 8, [1])
    assert torch.equal(conv(surround(torch.rand(1, 3, 1, 1), one), one)[0, :, 0, 0], conv.bias)


@pytest.mark.parametrize(("patch", "coarsest"), [(2, 1), (4, 1), (8, 1), (16, 2), (32, 4), (64, 4), (128, 4)])
def test_coarsest_level(patch, coarsest):
    assert patch >> (len(leaf_unet_widths(patch)) - 1) == coarsest
