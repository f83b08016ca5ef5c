"""Deformable convolution against plain convolution and against loops over every tap."""

import math

import pytest
import torch
import torch.nn.functional as F

from hpc_models.blocks.deformable_conv import DeformConv2d, deform_conv2d


def bilinear(plane, y, x):
    """Value at (y, x) of one plane; what lies outside of it is zero."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for col in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= col < plane.shape[1]:
                total += float(plane[row, col]) * (1 - abs(y - row)) * (1 - abs(x - col))
    return total


def by_loops(x, offset, weight, stride, padding):
    b, c, _, _ = x.shape
    d, _, k, _ = weight.shape
    _, _, rows, cols = offset.shape
    out = torch.zeros(b, d, rows, cols, dtype=torch.float64)
    for image in range(b):
        for i in range(rows):
            for j in range(cols):
                for tap in range(k * k):
                    ty, tx = divmod(tap, k)
                    y = i * stride - padding + ty + float(offset[image, 2 * tap, i, j])
                    z = j * stride - padding + tx + float(offset[image, 2 * tap + 1, i, j])
                    for channel in range(c):
                        value = bilinear(x[image, channel], y, z)
                        out[image, :, i, j] += value * weight[:, channel, ty, tx].double()
    return out.float()


@pytest.mark.parametrize(("stride", "hw"), [(1, (9, 7)), (2, (9, 8)), (2, (2, 1)), (1, (1, 1))])
def test_zero_offsets_are_a_plain_convolution(stride, hw):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, *hw), torch.randn(4, 5, 3, 3)
    plain = F.conv2d(x, weight, stride=stride, padding=1)
    offset = torch.zeros(2, 18, *plain.shape[-2:])
    torch.testing.assert_close(deform_conv2d(x, offset, weight, stride, 1), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_any_offsets_equal_loops_over_every_tap(stride):
    torch.manual_seed(1)
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 3, 3)
    rows, cols = F.conv2d(x, weight, stride=stride, padding=1).shape[-2:]
    offset = 2.5 * torch.randn(2, 18, rows, cols)  # many leave the picture
    torch.testing.assert_close(
        deform_conv2d(x, offset, weight, stride, 1), by_loops(x, offset, weight, stride, 1), atol=1e-4, rtol=1e-4
    )


def test_whole_offsets_move_the_picture():
    torch.manual_seed(2)
    x, weight = torch.randn(1, 3, 12, 12), torch.randn(2, 3, 3, 3)
    offset = torch.zeros(1, 18, 12, 12)
    offset[:, 0::2], offset[:, 1::2] = 2, -1  # dy, dx
    moved = F.conv2d(torch.roll(x, (-2, 1), (2, 3)), weight, padding=1)
    inner = (..., slice(2, -4), slice(3, -3))
    torch.testing.assert_close(deform_conv2d(x, offset, weight, 1, 1)[inner], moved[inner], atol=2e-5, rtol=1e-4)


def test_gradients_of_input_offset_and_weight_are_those_of_finite_differences():
    torch.manual_seed(3)
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    offset = 0.3 + 0.4 * torch.rand(1, 18, 5, 5)  # away from the kinks at whole pixels
    parts = [x, offset, weight]
    for i, part in enumerate(parts):
        inputs = [p.clone().requires_grad_(p is part) for p in parts]
        deform_conv2d(*inputs, 1, 1).square().sum().backward()
        direction = torch.randn_like(part)
        step = 1e-3
        ends = []
        for sign in (1, -1):
            moved = [p + sign * step * direction if p is part else p for p in parts]
            ends.append(float(deform_conv2d(*moved, 1, 1).double().square().sum()))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((inputs[i].grad * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.05)


def test_a_new_layer_is_a_plain_convolution_and_can_learn_to_move():
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 6, 3, 2), torch.randn(2, 4, 11, 9)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, stride=2, padding=1), atol=2e-5, rtol=1e-4)
    layer(x).square().sum().backward()
    assert layer.offset.weight.grad.abs().max() > 0 and layer.offset.bias.grad.abs().max() > 0


def test_an_offset_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"offset is \(1, 18, 4, 4\), should be \(1, 18, 5, 5\)"):
        deform_conv2d(torch.zeros(1, 2, 5, 5), torch.zeros(1, 18, 4, 4), torch.zeros(2, 2, 3, 3), 1, 1)
