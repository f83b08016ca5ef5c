"""Performer and Nystrom attention against explicit kernel and softmax attention over the whole matrix."""

import math

import pytest
import torch

from hpc_models.blocks import sdpa
from hpc_models.blocks.linear_attention import (
    Nystrom,
    Performer,
    feature_count,
    kernel_attention,
    nystrom_attention,
    orthogonal_features,
    pseudo_inverse,
    relu_features,
    softmax_features,
)

B, H, L, D = 2, 3, 37, 16


def qkv(scale=1.0, length=L, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(B, H, length, D, generator=generator, dtype=dtype) for _ in range(3)]


def softmax_attention(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def keys(valid_counts, length):
    return torch.arange(length)[None, :] < torch.tensor(valid_counts)[:, None]


@pytest.mark.parametrize(("head_width", "features"), [(8, 16), (16, 44), (32, 110)])
def test_feature_count_of_the_paper(head_width, features):
    assert feature_count(head_width) == features
    assert Performer(8 * head_width, 8).projection.shape == (features, head_width)


def test_features_are_orthogonal_within_blocks_and_of_length_sqrt_d():
    torch.manual_seed(0)
    p = orthogonal_features(44, 16)
    torch.testing.assert_close(p.norm(dim=1), torch.full((44,), 4.0))
    for first in (0, 16, 32):
        block = p[first : first + 16]
        torch.testing.assert_close(block @ block.t(), 16 * torch.eye(len(block)), atol=2e-5, rtol=0)
    # The first row of a block must not prefer a half space, as the bare factorisation's would.
    torch.manual_seed(1)
    rows = torch.stack([orthogonal_features(4, 4)[0] for _ in range(2000)])
    assert rows.mean(0).abs().max() < 4 * 1 / math.sqrt(2000)  # four standard errors; a row's entries have variance 1


@pytest.mark.parametrize("kernel", ["relu", "softmax"])
def test_linear_order_equals_the_explicit_normalised_kernel_matrix(kernel):
    q, k, v = qkv()
    torch.manual_seed(1)
    p = orthogonal_features(44, D)
    if kernel == "relu":
        fq, fk = relu_features(q, p), relu_features(k, p)
        plain = [torch.relu(x / D**0.25 @ p.t()) + 1e-3 for x in (q, k)]
    else:
        fq, fk = softmax_features(q, p, True), softmax_features(k, p, False)
        plain = [fq, fk]
    matrix = plain[0] @ plain[1].transpose(-1, -2)  # (B, H, L, L)
    explicit = matrix / matrix.sum(-1, keepdim=True) @ v
    assert (kernel_attention(fq, fk, v) - explicit).abs().max() < 1e-5


def test_softmax_features_are_the_published_ones_up_to_their_maximum():
    q, k, _ = qkv(0.5, dtype=torch.float64)
    torch.manual_seed(1)
    p = orthogonal_features(512, D).double()
    x = k / D**0.25
    bare = ((x @ p.t()) - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(512)
    scaled = softmax_features(k, p, False) - 1e-4 / math.sqrt(512)
    ratio = scaled / bare  # one factor per head: it cancels in the normalisation
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    ratio = (softmax_features(q, p, True) - 1e-4 / math.sqrt(512)) / (
        (q / D**0.25 @ p.t() - (q / D**0.25).square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(512)
    )
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def test_more_features_come_closer_to_softmax_attention():
    q, k, v = qkv(0.5, length=128)
    exact = softmax_attention(q, k, v)
    errors = []
    for m in (44, 512, 4096):
        each = []
        for seed in range(4):
            torch.manual_seed(seed)
            p = orthogonal_features(m, D)
            y = kernel_attention(softmax_features(q, p, True), softmax_features(k, p, False), v)
            each.append((y - exact).square().mean())
        errors.append(float(torch.stack(each).mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 3 * errors[2], errors
    assert errors[2] < 0.2 * float(exact.std())


def test_large_inputs_do_not_overflow():
    q, k, v = qkv(60.0)
    torch.manual_seed(0)
    p = orthogonal_features(44, D)
    y = kernel_attention(softmax_features(q, p, True), softmax_features(k, p, False), v)
    assert torch.isfinite(y).all() and y.abs().max() <= v.abs().max() * 1.001


@pytest.mark.parametrize(
    "make", [lambda: Performer(24, 3), lambda: Performer(24, 3, "softmax"), lambda: Nystrom(24, 3, 4)]
)
def test_masked_tokens_have_no_influence(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(2, 20, 24)
    mask = keys([20, 13], 20)
    clean = layer(x, mask)
    for garbage in (1e4, float("nan")):
        dirty = torch.where(mask[..., None], x, garbage)
        torch.testing.assert_close(layer(dirty, mask)[mask], clean[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x, torch.ones_like(mask)), layer(x), atol=1e-5, rtol=1e-5)
    nobody = mask & torch.tensor([True, False])[:, None]
    assert torch.isfinite(layer(x, nobody)).all()


@pytest.mark.parametrize("kernel", ["relu", "softmax"])
def test_performer_with_padding_equals_the_short_sequence(kernel):
    torch.manual_seed(0)
    layer = Performer(24, 3, kernel)
    x = torch.randn(2, 20, 24)
    padded = layer(x, keys([13, 13], 20))[:, :13]
    torch.testing.assert_close(padded, layer(x[:, :13]), atol=1e-5, rtol=1e-5)


def test_the_order_of_tokens_does_not_matter_to_a_performer():
    torch.manual_seed(0)
    layer, x, order = Performer(24, 3), torch.randn(2, 20, 24), torch.randperm(20)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-5)


def test_the_draw_is_part_of_the_weights_and_fixed():
    first, second = Performer(24, 3), Performer(24, 3)
    assert not torch.equal(first.projection, second.projection)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 9, 24)
    assert torch.equal(first(x), first(x)) and torch.equal(first(x), second(x))
    assert "projection" not in dict(first.named_parameters())


def test_sums_stay_exact_under_16_bit_autocast():
    """8000 equal keys: a 16-bit sum stops growing at 256 and would scale the answer by 30."""
    torch.manual_seed(0)
    layer, x = Performer(24, 3), torch.randn(1, 1, 24).expand(1, 8000, 24)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = layer(x)
    assert (rough.float() - exact).abs().max() < 0.03 * exact.abs().max()


# -- Nystrom ----------------------------------------------------------------------------------------------------------


def test_pseudo_inverse_of_softmax_matrices():
    torch.manual_seed(0)
    matrix = torch.randn(2, 3, 12, 12, dtype=torch.float64).mul(2).softmax(-1)
    rough = pseudo_inverse(matrix)
    fine = pseudo_inverse(matrix, steps=40)
    torch.testing.assert_close(fine, torch.linalg.pinv(matrix), atol=1e-6, rtol=1e-6)
    assert (matrix @ rough @ matrix - matrix).norm() < 0.1 * matrix.norm()
    torch.testing.assert_close(pseudo_inverse(matrix[:1]), rough[:1])


def test_as_many_landmarks_as_tokens_is_softmax_attention():
    """Then all three matrices are the same A, and A A+ A = A, up to the inverse's iteration."""
    q, k, v = qkv(1.0, length=24, dtype=torch.float64)
    near = nystrom_attention(q, k, v, 24)
    a = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    torch.testing.assert_close(near, a @ pseudo_inverse(a) @ a @ v)
    assert (near - a @ v).norm() < 0.05 * (a @ v).norm()


@pytest.mark.parametrize(("length", "landmarks"), [(24, 6), (26, 6), (7, 30)])
def test_nystrom_equals_its_definition_token_by_token(length, landmarks):
    q, k, v = qkv(1.0, length=length, dtype=torch.float64)
    segment = math.ceil(length / landmarks)
    means = [torch.stack([x[:, :, i : i + segment].mean(2) for i in range(0, length, segment)], dim=2) for x in (q, k)]
    f = (q @ means[1].transpose(-1, -2) / 4).softmax(-1)
    a = (means[0] @ means[1].transpose(-1, -2) / 4).softmax(-1)
    g = (means[0] @ k.transpose(-1, -2) / 4).softmax(-1)
    torch.testing.assert_close(nystrom_attention(q, k, v, landmarks), f @ pseudo_inverse(a) @ g @ v)


def test_nystrom_weights_are_those_of_the_library_and_the_residual_follows_the_tokens():
    assert sum(p.numel() for p in Nystrom(64, 8).parameters()) == 4 * 64**2 + 64 + 33 * 8
    layer = Nystrom(24, 3, 4)
    with torch.no_grad():
        layer.qkv.weight[:48] = 0  # q = k = 0: attention is the mean of v over all tokens
        layer.residual.weight.zero_()
        layer.residual.weight[:, 0, 16] = 1  # centre tap: plus v itself
    x = torch.randn(2, 20, 24)
    v = x @ layer.qkv.weight[48:].t()
    expected = layer.out_proj(v.mean(1, keepdim=True) + v)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_records_can_name_what_ran():
    sdpa.reset_used()
    Performer(24, 3, "softmax")(torch.randn(1, 5, 24))
    Nystrom(24, 3)(torch.randn(1, 5, 24))
    assert sdpa.used() == ["nystrom (cpu)", "performer softmax (cpu)"]
    sdpa.reset_used()


def test_wrong_settings_are_told():
    with pytest.raises(ValueError, match="kernel must be one of relu, softmax, got 'elu'"):
        Performer(24, 3, "elu")
    for layer in (Performer, Nystrom):
        with pytest.raises(ValueError, match="width 24 is not a multiple of heads 5"):
            layer(24, 5)
