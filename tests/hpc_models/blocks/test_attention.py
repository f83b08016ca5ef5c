"""Attention: kernels against the written-out formula, packed and windowed forms against one sequence at a time."""

import math

import pytest
import torch

from hpc_models.blocks import sdpa
from hpc_models.blocks.attention import Attention, Block
from hpc_models.blocks.vit_encoder import ViTEncoder
from hpc_models.registry import build
from hpc_models.tokens.batch import Batch
from tests.helpers.trees import random_batch


def written_out(q, k, v, key_mask=None):
    """softmax(q k^T / sqrt(d)) v in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1) @ v


def random_qkv(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, requires_grad=True) for _ in range(3)]


def test_attend_is_the_formula_and_says_which_kernel_ran():
    q, k, v = random_qkv(2, 3, 17, 8)
    mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) > 0.4
    sdpa.reset_used()
    torch.testing.assert_close(sdpa.attend(q, k, v).double(), written_out(q, k, v), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sdpa.attend(q, k, v, mask).double(), written_out(q, k, v, mask), atol=1e-6, rtol=1e-5)
    assert sdpa.used() == ["sdpa flash (cpu)"]
    sdpa.reset_used()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        sdpa.attend(q, k, v)
    assert sdpa.used() == ["sdpa math (cpu)"]


def test_packed_is_one_sequence_at_a_time_with_gradients():
    lengths = torch.tensor([5, 0, 125, 1])
    q, k, v = random_qkv(131, 2, 8)
    out = sdpa.attend_packed(q, k, v, lengths)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weight).sum().backward()
    gradients = [x.grad.clone() for x in (q, k, v)]
    parts = []
    for x in (q, k, v):
        x.grad = None
    for part in torch.arange(131).split(lengths.tolist()):
        if len(part):
            rows = [x[part].transpose(0, 1)[None] for x in (q, k, v)]
            parts.append(written_out(*rows)[0].transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    (expected * weight).sum().backward()
    for got, x in zip(gradients, (q, k, v), strict=True):
        torch.testing.assert_close(got, x.grad, atol=1e-5, rtol=1e-4)
    assert sdpa.attend_packed(q[:0], k[:0], v[:0], torch.tensor([0, 0])).shape == (0, 2, 8)


@pytest.mark.parametrize("window", [1, 4, 7, 16, 40])
def test_window_is_attention_within_each_window(window):
    q, k, v = random_qkv(2, 2, 16, 4)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[:, 0] = True
    mask[1, 8:] = False
    for key_mask in (None, mask):
        out = sdpa.attend_window(q, k, v, window, key_mask)
        for first in range(0, 16, window):
            cut = slice(first, min(16, first + window))
            for b in range(2):
                keys = None if key_mask is None else key_mask[b : b + 1, cut]
                if keys is not None and not keys.any():
                    assert not out[b, :, cut].any()
                    continue
                rows = [x[b : b + 1, :, cut] for x in (q, k, v)]
                torch.testing.assert_close(
                    out[b : b + 1, :, cut].double(), written_out(*rows, keys), atol=1e-6, rtol=1e-5
                )


def test_packed_batches_equal_sequences_one_by_one():
    """Lengths that differ 25-fold, as between slides; padded, packed and alone agree to 1e-5."""
    lengths = (4, 100, 37)
    config = {"size_px": 128, "patch": 8, "length": 100, "width": 32, "depth": 3, "heads": 4, "decoder": "leaf"}
    batches = [random_batch(seed, 128, 8, length=n, images=1, split=0.6)[0] for seed, n in enumerate(lengths)]
    together = {
        key: torch.cat(
            [torch.cat((b[key], b[key].new_zeros(1, 100 - b[key].shape[1], *b[key].shape[2:])), 1) for b in batches]
        )
        for key in batches[0]
    }
    answers, gradients = {}, {}
    for kind in ("full", "packed"):
        torch.manual_seed(0)
        model = build("unetr", **config, position="geom", attention=kind)
        answers[kind] = model(Batch(**together))
        answers[kind][together["valid"]].square().mean().backward()
        gradients[kind] = [p.grad for p in model.parameters() if p.grad is not None]
    valid = together["valid"]
    assert int(valid.sum(1).max()) >= 20 * int(valid.sum(1).min())
    torch.testing.assert_close(answers["packed"][valid], answers["full"][valid], atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients["packed"], gradients["full"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for i, batch in enumerate(batches):
        alone = model(batch)[0][batch["valid"][0]]
        torch.testing.assert_close(alone, answers["packed"][i][valid[i]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [(7, 7), (7, 5), (7, 0), (12, 12)])
def test_padding_at_the_end_of_all_sequences_is_cut_and_needs_no_mask(ends, monkeypatch):
    """With equal lengths attention sees no mask, so that its fastest kernel may run; the answers do not change."""
    torch.manual_seed(0)
    encoder = ViTEncoder(16, 2, 2, 32, taps=(0,)).eval()
    x = torch.randn(2, 12, 16)
    valid = torch.arange(12) < torch.tensor(ends)[:, None]
    masks = []
    monkeypatch.setattr(
        Block,
        "forward",
        lambda self, x, mask=None, lengths=None: (masks.append((x.shape[1], mask)), self._forward(x, mask, lengths))[1],
    )
    last, (tap,) = encoder(x, valid)
    assert last.shape == tap.shape == x.shape
    assert {n for n, _ in masks} == {max(ends)}
    assert all((mask is None) == (len(set(ends)) == 1) for _, mask in masks)
    want, (want_tap,) = encoder._dense(x, valid)
    torch.testing.assert_close(last[valid], want[valid], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tap[valid], want_tap[valid], atol=1e-6, rtol=1e-5)
    assert torch.isfinite(last).all()


def test_exchange_sees_every_part():
    """The hook that sequence parallelism uses: an exchange that doubles v's way back doubles what the map sees."""

    class Doubling:
        def __init__(self):
            self.calls = []

        def to_heads(self, x):
            self.calls.append("heads")
            return x

        def to_tokens(self, x):
            self.calls.append("tokens")
            return 2 * x

    torch.manual_seed(0)
    layer = Attention(16, 2)
    x = torch.randn(1, 5, 16)
    plain = layer(x)
    layer.exchange = Doubling()
    doubled = layer(x)
    bias = layer.out_proj.bias
    torch.testing.assert_close(doubled - bias, 2 * (plain - bias))
    assert layer.exchange.calls == ["heads"] * 3 + ["tokens"]
    with pytest.raises(ValueError, match="packed sequences cannot be spread"):
        layer(x[0], lengths=torch.tensor([5]))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="attention must be one of full, packed, window, performer_relu"):
        Block(16, 2, 32, kind="flash")
    with pytest.raises(ValueError, match="window must be at least 1"):
        Attention(16, 2, kind="window", window=0)
    with pytest.raises(ValueError, match="not a multiple"):
        Attention(15, 2)
    q, k, v = random_qkv(1, 1, 4, 2)
    with pytest.raises(ValueError, match="a bias or a key mask"):
        sdpa.attend(q, k, v, torch.ones(1, 4, dtype=torch.bool), bias=torch.zeros(1, 1, 4, 4))
