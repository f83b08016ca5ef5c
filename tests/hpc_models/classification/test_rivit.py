"""Resolution-invariant ViT: token counts, the stock ViT's weights and costs, its position codes, pooling."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hpc_models.blocks import sdpa
from hpc_models.classification.rivit import RelativeBias, StockAttention, sinusoidal
from hpc_models.registry import build
from hpc_models.training.distill import scale_loss, teacher_loss


def weights(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_weights_of_the_stock_vit():
    assert weights(build("rivit", conv=False, position="sinusoidal")) == 801_674
    assert weights(build("rivit", conv=False, position="learned")) == 1_006_474
    assert weights(build("rivit", conv=False, position="learned", tokens=256)) == 834_442
    assert weights(build("rivit", conv=False).blocks[0]) == 132_288


@pytest.mark.parametrize(("side", "gflop"), [(64, 0.709), (96, 2.442), (128, 6.453), (160, 14.329)])
def test_cost_of_the_stock_encoder(side, gflop):
    with torch.device("meta"):
        model, image = build("rivit", conv=False, position="sinusoidal"), torch.zeros(1, 3, side, side)
    patches = (side // 4) ** 2
    with FlopCounterMode(display=False) as counter:
        model(image)
    others = 2 * patches * 48 * 128 + 2 * 128 * 10  # patch embedding and head
    assert (counter.get_total_flops() - others) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("side", [64, 96, 128, 160, 256, 320])
def test_every_size_becomes_256_tokens_and_the_plain_model_does_not(side):
    with torch.device("meta"):
        assert build("rivit").tokens_of(torch.zeros(1, 3, side, side)).shape == (1, 256, 128)
        plain = build("rivit", conv=False, position="sinusoidal").tokens_of(torch.zeros(1, 3, side, side))
    assert plain.shape[1] == (side // 4) ** 2


@pytest.mark.parametrize("factor", [1, 2, 4, 5])
def test_pooling_is_the_mean_over_squares(factor):
    pool = build("rivit").front[-1]
    x = torch.randn(1, 2, 64 * factor, 64 * factor)
    torch.testing.assert_close(pool(x), F.avg_pool2d(x, factor), atol=1e-6, rtol=1e-6)


def test_sinusoid():
    table = sinusoidal(50, 8)
    assert table[0].tolist() == [0, 1] * 4
    for position in (0, 1, 7, 49):
        expected = [(math.cos if i % 2 else math.sin)(position / 10000 ** (i / 8)) for i in range(8)]
        torch.testing.assert_close(table[position], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_relative_scores_are_q_times_r_of_the_offset():
    torch.manual_seed(0)
    bias = RelativeBias(3, 4)
    torch.nn.init.normal_(bias.table)
    q = torch.randn(2, 2, 7, 4)
    scores = bias(q)
    for i in range(7):
        for j in range(7):
            r = bias.table[max(-3, min(3, j - i)) + 3]
            torch.testing.assert_close(scores[:, :, i, j], q[:, :, i] @ r)


def test_relative_attention_is_softmax_of_both_scores_over_the_root():
    torch.manual_seed(0)
    layer = StockAttention(8, 2, 4, reach=2)
    torch.nn.init.normal_(layer.relative.table)
    x = torch.randn(1, 5, 8)
    q, k, v = layer.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) + layer.relative(q)) / math.sqrt(4)
    expected = layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    sdpa.reset_used()
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert len(sdpa.used()) == 1 and sdpa.used()[0].startswith("sdpa "), "records name the kernel"


def test_features_are_the_class_token_whose_norm_gives_the_logits():
    model = build("rivit", depth=1, grid_px=16).eval()
    image = torch.rand(2, 3, 32, 32)
    both = model({"image": image, "features": True})
    logits, cls = both[:, :10], both[:, 10:]
    assert torch.equal(logits, model(image)) and cls.shape == (2, 128)
    torch.testing.assert_close(model.head(model.norm(cls)), logits)


def test_self_distillation_losses():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, -1.0]], requires_grad=True)
    p = 1 / (1 + math.exp(-3))
    expected = -p * math.log(1 / (1 + math.exp(-1))) - (1 - p) * math.log(1 - 1 / (1 + math.exp(-1)))
    assert float(teacher_loss(student, teacher)) == pytest.approx(expected, abs=1e-6)
    assert not teacher_loss(student, teacher).requires_grad
    larger = torch.tensor([[3.0, 1.0]], requires_grad=True)  # normed: (1, -1)
    cls = torch.tensor([[1.5, 1.0]], requires_grad=True)
    loss = scale_loss(cls, larger)
    assert float(loss.detach()) == pytest.approx((0.5 * 0.5**2 + (2 - 0.5)) / 2, abs=1e-4)
    loss.sum().backward()
    assert larger.grad is None and cls.grad.abs().min() > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="position must be one of"):
        build("rivit", position="rope")
    with pytest.raises(ValueError, match="not a multiple of patch_px"):
        build("rivit", grid_px=30)
    with pytest.raises(ValueError, match="2304 patches, but the learned table has tokens=1600"):
        build("rivit", conv=False, depth=1)(torch.zeros(1, 3, 192, 192))
    with pytest.raises(ValueError, match="no multiples of patch_px 4"):
        build("rivit", conv=False, depth=1)(torch.zeros(1, 3, 66, 64))
